"""Chains of models that are too large to be at hand: traced on the meta device with three layers, and lengthened.

The first and the last layer may differ from those between (embeddings are read before, the head after), so what is
repeated is the second; `Chain.repeated` refuses it where another amount goes into it than comes out.
"""

from __future__ import annotations

import dataclasses
import re

import torch

from llmsys import schema
from llmsys.decentral.chain import Chain, chain
from llmsys.decentral.trace import Traced, trace
from llmsys.models import build

TRACED = 3
"""Layers."""
_LAYER = re.compile(r"^(.*)\.1$")


def of_model(
    cfg: schema.Model, rows: int, length: int, *, train: bool = True, attention: str = "sdpa", level: str = "operator"
) -> Chain:
    """Of `cfg` with `rows` examples of `length` tokens, in `cfg.dtype`; without `train` no loss, and nothing saved."""
    return lengthened(chain(traced(cfg, rows, length, train=train, attention=attention).graph, level), cfg)


def traced(cfg: schema.Model, rows: int, length: int, *, train: bool = True, attention: str = "sdpa") -> Traced:
    """With three layers, where it has more, on the meta device."""
    if isinstance(cfg, schema.Transformer):
        cfg = dataclasses.replace(cfg, num_layers=min(TRACED, cfg.num_layers))
    model = build.skeleton(cfg, attention=attention)
    model = model.train() if train else model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if hasattr(model, "config"):
        model.config.use_cache = False
    return trace(model, example(cfg, rows, length, train))


def lengthened(short: Chain, cfg: schema.Model) -> Chain:
    """A chain of `TRACED` layers with all of `cfg`'s."""
    if not isinstance(cfg, schema.Transformer) or cfg.num_layers <= TRACED:
        return short
    for prefix in sorted({found[1] for each in short.blocks if (found := _LAYER.match(each))}):
        begin, end = (short.blocks.index(f"{prefix}.{at}") for at in (1, 2))
        times = cfg.num_layers - TRACED + 1
        short = _numbered(short.repeated(begin, end, times), prefix, begin, end - begin, times)
    return short


def _numbered(own: Chain, prefix: str, begin: int, count: int, times: int) -> Chain:
    """With layers called by their numbers in the whole model."""
    blocks = [f"{prefix}.{times + 1}" if block == f"{prefix}.2" else block for block in own.blocks]
    for layer in range(times):
        blocks[begin + layer * count : begin + (layer + 1) * count] = [f"{prefix}.{layer + 1}"] * count
    return dataclasses.replace(own, blocks=tuple(blocks))


def example(cfg: schema.Model, rows: int, length: int, train: bool) -> dict[str, torch.Tensor]:
    """What the model is called with, on the meta device."""
    with torch.device("meta"):
        if isinstance(cfg, schema.ConvNet):
            size = cfg.image_size
            images = torch.empty(rows, cfg.channels, size, size, dtype=build.DTYPES[cfg.dtype])
            return {"pixel_values": images} | ({"labels": torch.empty(rows, dtype=torch.long)} if train else {})
        tokens = torch.empty(rows, length, dtype=torch.long)
        found = {"input_ids": tokens}
        if cfg.family == "t5":
            found["decoder_input_ids"] = torch.empty(rows, length, dtype=torch.long)
        if train:
            classes = cfg.objective == "classification"
            found["labels"] = torch.empty((rows,) if classes else (rows, length), dtype=torch.long)
        return found
