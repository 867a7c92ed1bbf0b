"""What a task may use beside its config: its folder, its device, the parts chosen for it, and who listens."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsys.comm.place import Place
from llmsys.track.jsonl import JsonLines

if TYPE_CHECKING:
    import torch

    from llmsys.track import Mirror
    from llmsys.train.protocols import Engine, GradSync, Method


@dataclass(kw_only=True)
class LightContext:
    """What the runner hands to every task; to a light one (`tasks.LIGHT`) nothing more, and torch is not loaded.

    `beat` is to be called at every step: it feeds the progress bar and proves that the run is not stuck.
    """

    out: Path
    place: Place = field(default_factory=Place)
    threads: int
    code_hash: str
    log: logging.Logger
    metrics: JsonLines
    inputs: dict[str, str] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    """What the run is on, as the record has it."""
    kept: str = ""
    """What of this attempt serves the next one if it is stopped now; for the record."""
    mirrors: list[Mirror] = field(default_factory=list)
    listener: Callable[[dict[str, Any]], None] | None = None
    last_beat: float | None = None
    """When the last step was done; None before the first: loading and downloading have no steps to be late with."""
    stoppable: bool = False
    """Set by a task that looks at `stop_asked` between its steps and then raises `Interrupted`."""
    stop_asked: bool = False

    def beat(self, **progress: float | str) -> None:
        """Proof of progress, with what a progress bar shows: step, steps, loss, tokens_per_s, phase."""
        self.last_beat = time.monotonic()
        if self.listener and progress:
            self.listener(dict(progress))

    def track(self, row: dict[str, Any]) -> None:
        """One row of metrics to the local file and to every mirror; rank 0's word is the run's."""
        if self.place.rank:
            return
        self.metrics.row(row)
        for mirror in self.mirrors:
            mirror.row(row)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A small table for every mirror, outside of the steps that are timed; the record has what a task returns.
        Rank 0's word is the run's."""
        for mirror in self.mirrors:
            mirror.table(name, columns, rows)

    def trim_metrics(self, step: int) -> None:
        """Cuts `metrics.jsonl` back to the rows of steps up to `step`, when a run resumes from there."""
        if self.place.rank:
            return
        self.metrics.trim(step)

    def run_folder(self, exp: str) -> Path:
        """The folder of the finished run of experiment `exp` that this run builds on."""
        return Path(self.inputs[f"run:{exp}"])


@dataclass(kw_only=True)
class Context(LightContext):
    """With the device and the parts that the config has chosen."""

    device: torch.device
    method: Method
    engine: Engine
    grad_sync: GradSync
