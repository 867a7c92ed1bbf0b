"""The model that is served: with adapters, and as a folder for servers that read one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsys import schema
from llmsys.bench.serve import words

if TYPE_CHECKING:
    import torch

    from llmsys.context import Context


def load(config: schema.Config, context: Context, device: torch.device | None = None) -> Any:
    """The model, on the run's device or another. ValueError for one that generates no text."""
    from llmsys import models
    from llmsys.models import weights

    folder = weights.find(config.model, config.results, context.run_folder)
    how: dict[str, Any] = {"objective": "causal_lm", "num_labels": 0, "device": device or context.device}
    model: Any = models.load(config.model, **how, seed=config.train.seed, folder=folder).eval()
    own = config.server
    if not isinstance(own, schema.ModelServer) or not own.adapter:
        return model
    return adapted(model, own, config.train.seed, context.inputs.get("adapter", own.adapter))


def adapted(model: Any, own: schema.ModelServer, seed: int, folder: str) -> Any:
    """With `own.adapter`, which lies in `folder`, merged or beside the weights. What `load_adapter` and `merge`
    raise."""
    from llmsys import lorafa

    kind, _, rank = own.adapter.partition(":")
    if kind == "random":
        lorafa.inject(model, lorafa.LoRAFAConfig(r=int(rank), seed=seed))
    else:
        lorafa.load_adapter(model, folder)
    return lorafa.merge(model, keep=False) if own.merge else model


def store(config: schema.Config, context: Context, folder: Path) -> None:
    """The model as a folder of Hugging Face's, with the tokenizer of words. It is made in the host's memory: the
    device's is for the server."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    model = load(config, context, torch.device("cpu"))
    model.config.eos_token_id = model.generation_config.eos_token_id = None  # no text ends before its length
    model.save_pretrained(folder)
    assert isinstance(config.model, schema.Transformer)
    words.write(folder, config.model.vocab_size)
