"""Generation, token by token, as a graph: keys and values are variables, which each step reads and leaves changed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.decentral.trace import Traced, trace


def trace_decoder(model: Any, rows: int, length: int, *, chosen: bool = False, noise: bool = False) -> Traced:
    """One token of each of `rows` sequences of at most `length`: from `input_ids` [rows, 1] and `cache_position` [1] to
    logits [rows, 1, V]; `chosen`: to the token of the largest one [rows], with `noise` [rows, V] added to them.

    `model`, a transformers model with a language modelling head, is as it was when this returns. ValueError as of
    `trace`.
    """
    from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

    device = next(model.parameters()).device
    example = {
        "input_ids": torch.zeros(rows, 1, dtype=torch.long, device=device),
        "cache_position": torch.zeros(1, dtype=torch.long, device=device),
    }
    if noise:
        example["noise"] = torch.zeros(rows, model.config.vocab_size, device=device)
    with _for_generation(model):
        module = TorchExportableModuleWithStaticCache(model, batch_size=rows, max_cache_len=length)
        return trace(_Bound(module, chosen), example)


class _Bound(nn.Module):
    """The module's cache on the module's own buffers, as they are while it is traced: without that tracing sees tensors
    that nobody has registered, and takes them for constants. But for the length so far, which the module sets to the
    position that it is given: it is no state, and whoever needs it computes it from the position."""

    def __init__(self, module: Any, chosen: bool) -> None:
        super().__init__()
        self.module, self.chosen = module, chosen

    def forward(self, input_ids: Tensor, cache_position: Tensor, noise: Tensor | None = None) -> Tensor:
        for at, layer in enumerate(self.module.static_cache.layers):
            layer.keys = getattr(self.module, f"key_cache_{at}")
            layer.values = getattr(self.module, f"value_cache_{at}")
            layer.cumulative_length = torch.zeros((), dtype=torch.long, device=cache_position.device)
        logits: Tensor = self.module(input_ids=input_ids, cache_position=cache_position)
        if not self.chosen:
            return logits
        last = logits[:, -1]
        return (last if noise is None else last.float() + noise).argmax(dim=-1)


@contextlib.contextmanager
def _for_generation(model: Any) -> Iterator[None]:
    """In evaluation mode, with a static cache, and without gradients, which the cache would have to carry on."""
    settings, training = model.generation_config, model.training
    trained = [each for each in model.parameters() if each.requires_grad]
    model.generation_config = copy.deepcopy(settings)
    model.generation_config.use_cache = True
    model.generation_config.cache_implementation = "static"
    model.eval()
    for each in trained:
        each.requires_grad_(False)
    try:
        yield
    finally:
        model.generation_config = settings
        model.train(training)
        for each in trained:
            each.requires_grad_()
