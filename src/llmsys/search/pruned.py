"""A trial's run as its pruner sees it: while it goes on, and given up where it does badly."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna

from llmsys import schema
from llmsys.dispatch.stop import Stop
from llmsys.job import Record
from llmsys.track import jsonl

PRUNED = "pruned"
"""The reason in the record of a run that was given up, which is `skipped`."""
LOOK_S = 0.5
"""Between two looks at a run's rows."""


class PrunedRun:
    """Looks at the rows of metrics of a trial's run as they come, and asks it to stop where the pruner says so; a
    `dispatch.Watch`."""

    def __init__(
        self, trial: optuna.Trial, settings: schema.Search, out: Path, stop: Stop, note: Callable[[str], None]
    ) -> None:
        self.trial, self.settings, self.rows, self._note = trial, settings, out / "metrics.jsonl", note
        self.stop = stop.child()
        self.gave_up = False
        self._step, self._why, self._out = -1, "", out
        self._next, self._blind = 0.0, settings.pruner == "none"

    def progress(self, values: dict[str, Any]) -> None:
        if self._blind or self.gave_up or time.monotonic() < self._next or not self.rows.exists():
            return
        self._next = time.monotonic() + LOOK_S
        try:
            self._look()
        except (ValueError, TypeError, OSError, optuna.exceptions.OptunaError) as error:
            self._blind = True  # a run is not to suffer from who looks at it
            self._note(f"search.watch={self.settings.watch}: not looked at any more: {error}")

    def _look(self) -> None:
        sign = 1 if self.settings.watch_direction == self.settings.direction else -1
        for row in jsonl.read(self.rows):
            value, step = row.get(self.settings.watch), int(row.get("step", -1))
            if value is None or step <= self._step or not math.isfinite(value):
                continue
            self._step = step
            self.trial.report(sign * value, step)
            if step >= self.settings.watch_from and self.trial.should_prune():
                pruner = f"search.pruner={self.settings.pruner}"
                self._why = f"{self.settings.watch} {value:.4g} at step {step}: given up by {pruner}"
                self.gave_up = True
                self.stop.ask()
                return

    def judge(self, record: Record) -> Record:
        """A run that was given up is not one that somebody stopped; one that had just ended is what it is."""
        if not self.gave_up or record.status != "interrupted":
            return record
        record = dataclasses.replace(record, status="skipped", reason=PRUNED, error=self._why)
        record.write(self._out)
        return record
