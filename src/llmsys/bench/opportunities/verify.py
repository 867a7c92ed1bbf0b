"""What a change really saves: steps with it and without it, in turns, in one process.

Both are the trainer's own loops, on the same examples, each with a model and an optimizer of its own; of a round each
takes one step, the second round in the other order. What is quoted is the median of the differences round by round.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from llmsys import schema
from llmsys.bench.modules.arms import Bare
from llmsys.bench.opportunities.changes import Change
from llmsys.train.task import trainer

if TYPE_CHECKING:
    from llmsys.context import Context

WITHOUT, WITH = "without", "with"


def step_ms(
    config: schema.Config, context: Context, change: Change, *, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """`without` and `with` -> ms of each round, the first `warmup` left out. Raises what training does."""
    train = dataclasses.replace(config.train, steps=rounds + warmup, schedule="constant", save_final=False)
    before = dataclasses.replace(config, train=train)
    after = change.configured(before)
    engine = type(context.engine)(after, context.place, context.device)  # type: ignore[call-arg]
    other = dataclasses.replace(context, engine=engine)
    with trainer(before, context) as one, trainer(after, other) as two:
        loops = {WITHOUT: one.loop, WITH: two.loop}
        if change.patch:
            change.patch(two.loop.model)
        for loop in loops.values():
            loop.spans = Bare(context.device, warmup)
            loop.wrapped.train()
        for number in range(1, rounds + warmup + 1):
            for name in (WITHOUT, WITH) if number % 2 else (WITH, WITHOUT):
                loop = loops[name]
                with loop.spans.step():
                    row = loop.step(number)
                loop.watch.see(number, row["loss"], row["grad_norm"])
                context.beat(step=number, steps=rounds + warmup, loss=row["loss"], phase=f"{name} {change.name}")
    return {name: loop.spans.samples["step_ms"] for name, loop in loops.items()}
