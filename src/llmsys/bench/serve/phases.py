"""Passes of a model that serves: prefills and decoding steps, with and without clocks of modules, in turns."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from llmsys.bench.serve.pace import DECODE
from llmsys.profile.modules import ModuleSpans
from llmsys.profile.taxonomy import FORWARD
from llmsys.train.peaks import wait


class Cell(NamedTuple):
    """`batch` sequences of `context` tokens: read, or one more token behind them."""

    phase: str
    batch: int
    context: int

    @property
    def key(self) -> str:
        return f"{self.phase}/{self.batch}x{self.context}"


@dataclass
class Passes:
    """Of one cell, ms: passes without clocks, with them, and rows of the latter."""

    bare_ms: list[float] = field(default_factory=list)
    clocked_ms: list[float] = field(default_factory=list)
    rows: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ms(self) -> float:
        return statistics.median(self.bare_ms)

    @property
    def overhead_percent(self) -> float:
        """What clocks of modules add, the median over rounds."""
        pairs = zip(self.clocked_ms, self.bare_ms, strict=True)
        return 100 * statistics.median(ours / bare - 1 for ours, bare in pairs)


def measure(
    model: Any, cell: Cell, vocabulary: int, device: torch.device, rounds: int, warmup: int, beat: Callable[[], None]
) -> Passes:
    """In each round a bare pass and one with clocks, each with a cache of its own; `model` is in evaluation."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocabulary, (cell.batch, cell.context + 1), generator=draw).to(device)
    new = ids[:, -1:] if cell.phase == DECODE else ids[:, : cell.context]
    spans, clocks = ModuleSpans(model, device, warmup), ModuleSpans(model, device, warmup)
    with torch.inference_mode():
        for number in range(rounds + warmup):
            for clocked in (True, False) if number % 2 else (False, True):
                before = _cache(model, ids[:, : cell.context]) if cell.phase == DECODE else None
                wait(device)
                own = clocks if clocked else spans
                with own.attached() if clocked else contextlib.nullcontext(), own.step(), own(FORWARD):
                    model(input_ids=new, past_key_values=before, use_cache=True, logits_to_keep=1)
                wait(device)
            beat()
    rows = {row: [sum(each) for each in zip(*kinds.values(), strict=True)] for row, kinds in clocks.rows().items()}
    return Passes(bare_ms=spans.samples["step_ms"], clocked_ms=clocks.samples["step_ms"], rows=rows)


def _cache(model: Any, ids: torch.Tensor) -> Any:
    """Keys and values of these tokens, computed outside of the clock."""
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
