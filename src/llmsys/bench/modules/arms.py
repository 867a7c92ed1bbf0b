"""Single steps of one loop, in turns: without clocks, with those of phases, with those of modules.

What a clock costs is a difference of a percent between steps that vary by more, on a machine that warms up and is
shared. So the three take turns within one run, each round in the reverse order of the one before, and are compared
round by round. All of them train: the step that one takes is the next one's beginning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from llmsys.bench.modules.figures import ARMS, BARE, MODULES, PHASES
from llmsys.profile.modules import ModuleSpans
from llmsys.profile.spans import Spans
from llmsys.profile.taxonomy import REST
from llmsys.train.loop import Loop


class Bare(Spans):
    """The step alone."""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if name == "step":
            with super().__call__(name):
                yield
        else:
            yield


def tail(loop: Loop) -> str:
    """What waits behind the last module of a backward pass: DDP's last bucket, if anything."""
    return "communication" if loop.engine.world > 1 else REST


class Arms:
    """The three ways to look at the steps of `loop`, whose `spans` they replace; each leaves its first `warmup` steps
    out."""

    def __init__(self, loop: Loop, warmup: int) -> None:
        self.loop = loop
        device = loop.device
        self.modules = ModuleSpans(loop.model, device, warmup, tail(loop))
        self.spans: dict[str, Spans] = {
            BARE: Bare(device, warmup),
            PHASES: Spans(device, warmup),
            MODULES: self.modules,
        }

    def run(self, rounds: int, beat: Callable[..., None]) -> None:
        """Takes `rounds` steps of each. Raises NotANumber, naming the step."""
        step, loop = 0, self.loop
        loop.wrapped.train()
        for number in range(rounds):
            for arm in ARMS if number % 2 == 0 else reversed(ARMS):
                step += 1
                loop.spans = self.spans[arm]
                attached = self.modules.attached() if arm == MODULES else contextlib.nullcontext()
                with attached, loop.spans.step():
                    row = loop.step(step)
                loop.watch.see(step, row["loss"], row["grad_norm"])
                beat(step=step, steps=rounds * len(ARMS), loss=row["loss"])

    @property
    def step_ms(self) -> dict[str, list[float]]:
        """Arm -> each of its steps, round by round."""
        return {arm: spans.samples["step_ms"] for arm, spans in self.spans.items()}
