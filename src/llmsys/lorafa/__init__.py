"""LoRA-FA (arXiv 2308.03303): low-rank adapters whose down-projection A is frozen, so that the full-rank input of an
adapted layer need not be stored for the backward pass."""
