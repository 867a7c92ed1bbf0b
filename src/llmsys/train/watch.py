"""What long runs meet: losses and gradients that are not finite, and losses that jump.

A spike is noted, not acted on: whether one is harmless is seen only later, by whether the loss comes back.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from llmsys import schema
from llmsys.errors import NotANumber

WINDOW = 64
"""Losses behind the running median."""
LEAST = 16
"""Fewer say nothing about what is usual."""


class Watch:
    """Told every step's loss and norm; the same on all ranks, since they are told the same."""

    def __init__(self, config: schema.Train) -> None:
        self._policy, self._most, self._factor = config.on_nan, config.max_skips, config.spike_factor
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._in_a_row = 0
        self.skipped = 0
        """Steps whose update was left out."""
        self.spikes = 0

    def see(self, step: int, loss: float, norm: float) -> str:
        """`""`, `skipped` or `spike`. NotANumber, naming the step, where the policy is to stop, or has been patient."""
        for what, value in (("loss", loss), ("norm of the gradient", norm)):
            if math.isfinite(value):
                continue
            if self._policy == "stop":
                raise NotANumber(f"step {step}: the {what} is {value}")
            self.skipped += 1
            self._in_a_row += 1
            if self._in_a_row > self._most:
                raise NotANumber(f"step {step}: the {what} is {value}, after {self._most} skipped steps in a row")
            return "skipped"
        self._in_a_row = 0
        spike = len(self._losses) >= LEAST and loss > self._factor * statistics.median(self._losses)
        self._losses.append(loss)
        self.spikes += spike
        return "spike" if spike else ""

    @property
    def summary(self) -> dict[str, float]:
        return {"skipped_steps": self.skipped, "loss_spikes": self.spikes}

    def state(self) -> dict[str, Any]:
        """JSON for a checkpoint."""
        return {
            "losses": list(self._losses),
            "in_a_row": self._in_a_row,
            "skipped": self.skipped,
            "spikes": self.spikes,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._losses.extend(state["losses"])
        self._in_a_row, self.skipped, self.spikes = state["in_a_row"], state["skipped"], state["spikes"]
