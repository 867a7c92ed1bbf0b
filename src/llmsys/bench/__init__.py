"""Training under every combination of techniques: measured, predicted, and answered (arXiv 2311.03687)."""
