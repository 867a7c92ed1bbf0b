"""What a change is predicted to save, and what it does, in turns, in one process.

Steps are those of the trainer's own loop. In each round a step is taken whose modules have clocks, and then what would
come in their place runs alone: `predicted`. `made` also makes the change: in each round a step with it and one without
come first, the second round in the other order, each with a model and an optimizer of its own, on the same examples. So
whatever the machine does in that minute, it does to the prediction and to what it is held against, and both predict by
the same two numbers, with the same kernels (`train.deterministic`). What is quoted is the median over rounds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llmsys import schema
from llmsys.bench.modules.arms import Bare, tail
from llmsys.bench.opportunities.changes import Change
from llmsys.bench.ops.clock import Clock
from llmsys.profile.modules import ModuleSpans
from llmsys.profile.spans import Spans
from llmsys.train.task import trainer

if TYPE_CHECKING:
    from llmsys.context import Context
    from llmsys.train.loop import Loop

WITHOUT, WITH, GONE, COMES = "without_step", "with_step", "gone", "comes"
Took = dict[str, list[float]]
"""ms of each round, warm-up left out."""


class Side:
    """A loop that takes single steps."""

    def __init__(self, loop: Loop, context: Context, phase: str) -> None:
        self.loop, self._context, self._phase, self._taken = loop, context, phase, 0
        loop.wrapped.train()

    def step(self, spans: Spans) -> None:
        """One step, timed by `spans`. Raises NotANumber."""
        self._taken += 1
        self.loop.spans = spans
        with spans.step():
            row = self.loop.step(self._taken)
        self.loop.watch.see(self._taken, row["loss"], row["grad_norm"])
        self._context.beat(step=self._taken, steps=self.loop.config.train.steps, loss=row["loss"], phase=self._phase)


def predicted(
    config: schema.Config, context: Context, changes: Sequence[Change], clock: Clock, *, rounds: int, warmup: int
) -> dict[str, Took]:
    """Name of a change -> the modules that would be `gone` with it, and what `comes`. Raises what training does."""
    gc.collect()  # another model may have been trained here before
    with trainer(_steps(config, rounds + warmup), context) as one:
        before = Side(one.loop, context, "a step with clocks of modules")
        modules = ModuleSpans(one.loop.model, context.device, warmup, tail(one.loop))
        alone = {change.name: change.replacement(config, clock) for change in changes}
        comes: Took = {name: [] for name in alone}
        for _ in range(rounds + warmup):
            with modules.attached():
                before.step(modules)
            for name, each in alone.items():
                comes[name].append(each.once_ms(clock))
        return {
            change.name: {GONE: _gone(change, modules, rounds), COMES: comes[change.name][warmup:]}
            for change in changes
        }


def made(config: schema.Config, context: Context, change: Change, clock: Clock, *, rounds: int, warmup: int) -> Took:
    """As `predicted` of one change, and the step `without_step` and `with_step` it. Raises what training does."""
    with _both(config, context, change, rounds + warmup) as sides:
        alone, comes = change.replacement(config, clock), list[float]()
        spans: dict[str, Spans] = {name: Bare(context.device, warmup) for name in sides}
        before = sides[WITHOUT]
        modules = ModuleSpans(before.loop.model, context.device, warmup, tail(before.loop))
        for number in range(1, rounds + warmup + 1):
            for name in (WITHOUT, WITH) if number % 2 else (WITH, WITHOUT):
                sides[name].step(spans[name])
            with modules.attached():
                before.step(modules)
            comes.append(alone.once_ms(clock))
        return {
            **{name: each.samples["step_ms"] for name, each in spans.items()},
            GONE: _gone(change, modules, rounds),
            COMES: comes[warmup:],
        }


@contextlib.contextmanager
def _both(config: schema.Config, context: Context, change: Change, rounds: int) -> Iterator[dict[str, Side]]:
    """Loops without `change` and with it."""
    gc.collect()
    before = _steps(config, 2 * rounds)
    after = change.configured(before)
    engine = type(context.engine)(after, context.place, context.device)  # type: ignore[call-arg]
    other = dataclasses.replace(context, engine=engine)
    with trainer(before, context) as one, trainer(after, other) as two:
        if change.patch:
            change.patch(two.loop.model)
        yield {WITHOUT: Side(one.loop, context, f"without {change.name}"),
               WITH: Side(two.loop, context, f"with {change.name}")}  # fmt: skip


def _steps(config: schema.Config, steps: int) -> schema.Config:
    train = dataclasses.replace(config.train, steps=steps, schedule="constant", save_final=False)
    return dataclasses.replace(config, train=train)


def _gone(change: Change, modules: ModuleSpans, rounds: int) -> list[float]:
    """ms of all rows that `change` replaces; 0 where the step has none of them."""
    rows = modules.rows()
    gone = [kind for row in change.rows for kind in rows.get(row, {}).values()]
    return [sum(ms) for ms in zip(*gone, strict=True)] if gone else [0.0] * rounds
