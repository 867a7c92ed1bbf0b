"""What a change is predicted to save, and what it does: steps with it and without it, in turns, in one process.

Both are the trainer's own loops, on the same examples, each with a model and an optimizer of its own. In each round
each takes one step, the second round in the other order; then the one without takes another, with clocks of its
modules, and what would come in their place runs alone. So whatever the machine does in that minute, it does to the
prediction and to what it is held against. What is quoted is the median over rounds.
"""

from __future__ import annotations

import dataclasses
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

WITHOUT, WITH, GONE, COMES = "without_step", "with_step", "gone", "comes"


def in_turns(
    config: schema.Config, context: Context, change: Change, clock: Clock, *, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """ms of each round, the first `warmup` left out: of the step `without_step` and `with_step` the change, of the
    modules that are `gone` with it, and of what `comes`. Raises what training does."""
    train = dataclasses.replace(config.train, steps=2 * (rounds + warmup), schedule="constant", save_final=False)
    before = dataclasses.replace(config, train=train)
    after = change.configured(before)
    engine = type(context.engine)(after, context.place, context.device)  # type: ignore[call-arg]
    other = dataclasses.replace(context, engine=engine)
    alone, comes = change.replacement(config, clock), []
    with trainer(before, context) as one, trainer(after, other) as two:
        loops = {WITHOUT: one.loop, WITH: two.loop}
        if change.patch:
            change.patch(two.loop.model)
        spans: dict[str, Spans] = {name: Bare(context.device, warmup) for name in loops}
        modules = ModuleSpans(one.loop.model, context.device, warmup, tail(one.loop))
        taken = dict.fromkeys(loops, 0)

        def step(name: str, spans: Spans) -> None:
            loop = loops[name]
            loop.spans = spans
            taken[name] += 1
            with spans.step():
                row = loop.step(taken[name])
            loop.watch.see(taken[name], row["loss"], row["grad_norm"])
            context.beat(step=number, steps=rounds + warmup, loss=row["loss"], phase=f"{name} {change.name}")

        for loop in loops.values():
            loop.wrapped.train()
        for number in range(1, rounds + warmup + 1):
            for name in (WITHOUT, WITH) if number % 2 else (WITH, WITHOUT):
                step(name, spans[name])
            with modules.attached():
                step(WITHOUT, modules)
            comes.append(alone.once_ms(clock))
        rows = modules.rows()
    gone = [kind for row in change.rows for kind in rows.get(row, {}).values()]
    return {
        **{name: each.samples["step_ms"] for name, each in spans.items()},
        GONE: [sum(ms) for ms in zip(*gone, strict=True)] if gone else [0.0] * rounds,
        COMES: comes[warmup:],
    }
