"""What measured machines are good for: which models they hold, how fast, and when one of them alone is faster.

Each model is planned as a job would be, one pipeline over all who are of use, and over each of them alone; a plan is
played event by event (`schedule`). Generation is a token of each of some sequences at a time; its weights' bytes are in
the rate of products of so few rows, while keys and values, and what the broker's two phases take, are not predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from llmsys import schema
from llmsys.decentral import schedule, shapes
from llmsys.decentral.chain import Chain
from llmsys.decentral.cost import Costs, Workload
from llmsys.decentral.fleet import Between, Fleet
from llmsys.decentral.plan import Planner
from llmsys.decentral.probe import Measured

MICRO_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Tokens a second of `model`, by `together` providers in one pipeline, and by `name` alone, who is the fastest; 0:
    none holds it."""

    model: str
    what: str
    tokens_per_s: float
    together: tuple[str, ...]
    alone_per_s: float
    name: str

    @property
    def verdict(self) -> str:
        if not self.tokens_per_s:
            return "does not fit"
        if len(self.together) == 1 or self.alone_per_s >= self.tokens_per_s:
            return f"{self.name} alone is faster"
        if not self.alone_per_s:
            return "together only"
        return f"together, {self.tokens_per_s / self.alone_per_s:.2f}x of {self.name} alone"


def fleet(found: Sequence[Measured], *, few: bool = False) -> Fleet:
    """What was measured. Messages go by the broker: between two providers is half of each one's way to it and back, in
    the mean over pairs."""
    delay_ms = sum(each.rtt_ms for each in found) / len(found)
    return Fleet(providers=tuple(each.provider(few=few) for each in found), other=Between(delay_ms=delay_ms))


def predictions(found: Sequence[Measured], model: schema.Model, rows: int, length: int) -> list[Prediction]:
    """Of training, `rows` x `length` tokens in each of 4 micro-batches, and for a language model of generation, 4
    streams of `rows` sequences."""
    made = [_prediction(fleet(found), model, shapes.of_model(model, rows, length), train=True)]
    if isinstance(model, schema.Transformer) and model.objective == "causal_lm":
        own = shapes.of_model(model, rows, 1, train=False)
        made.append(_prediction(fleet(found, few=True), model, own, train=False))
    return made


def _prediction(own: Fleet, model: schema.Model, chain: Chain, *, train: bool) -> Prediction:
    work = Workload(train=train, micro_batches=MICRO_BATCHES, most=1, optimizer=6.0 if model.dtype == "bf16" else 2.0)
    speed, together = _planned(chain, own, work)
    alone = {each.name: _planned(chain, Fleet(providers=(each,)), work)[0] for each in own.providers}
    name = max(alone, key=lambda each: alone[each])
    if alone[name] > speed:  # a planner's pace is the steady one, and of few micro-batches one alone may be faster
        speed, together = alone[name], (name,)
    what = "training" if train else "generation"
    return Prediction(
        model=model.name, what=what, tokens_per_s=speed, together=together, alone_per_s=alone[name], name=name
    )


def _planned(chain: Chain, own: Fleet, work: Workload) -> tuple[float, tuple[str, ...]]:
    """(tokens a second, who computes); 0 and nobody where it does not fit."""
    costs = Costs(chain, own, work)
    plan = Planner(costs, thorough=False).best()
    if plan is None:
        return 0.0, ()
    (pipeline,) = plan.pipelines
    spans = schedule.run(schedule.Timing.of(costs, pipeline), work.schedule, work.micro_batches)
    names = tuple(own.providers[p].name for p in pipeline.order)
    return work.micro_batches * chain.tokens / schedule.ends_s(spans), names


def plain(found: Sequence[Measured], predicted: Sequence[Prediction]) -> dict[str, Any]:
    """As JSON."""
    return {
        "providers": {
            each.machine.name: {
                "plane": each.machine.plane,
                "rtt_ms": each.rtt_ms,
                "up_mbit": each.up_mbit,
                "down_mbit": each.down_mbit,
                "tflops": each.tflops,
                "few_rows_tflops": each.few_tflops,
                "free_gib": each.free_gib,
                "offered_gib": each.machine.mem_gib,
            }
            for each in found
        },
        "predictions": [
            {
                "model": each.model,
                "what": each.what,
                "tokens_per_s": each.tokens_per_s,
                "providers": list(each.together),
                "alone_tokens_per_s": each.alone_per_s,
                "fastest_alone": each.name if each.alone_per_s else None,
                "verdict": each.verdict,
            }
            for each in predicted
        ],
    }


def fleet_text(found: Sequence[Measured]) -> str:
    """A file for `task.fleet` (`fleet_file`)."""
    own = fleet(found)
    rows = []
    for each in own.providers:
        numbers = {key: round(getattr(each, key), 6) for key in ("tflops", "mem_gib", "up_mbit", "down_mbit")}
        rows.append({"name": each.name, **numbers, "efficiency": 1.0, "region": each.region, "plane": each.plane,
                     "trusted": each.trusted})  # fmt: skip
    return yaml.safe_dump({"providers": rows, "other": {"delay_ms": round(own.other.delay_ms, 3)}}, sort_keys=False)


def tables(found: Sequence[Measured], predicted: Sequence[Prediction]) -> list[Any]:
    """For rich: the machines, and the models."""
    from rich.table import Table

    machines = Table(title="measured", title_justify="left")
    heads = ("provider", "plane", "round trip ms", "up Mbit/s", "down Mbit/s", "TFLOP/s", "of few rows", "memory GiB")
    for at, head in enumerate(heads):
        machines.add_column(head, justify="left" if at < 2 else "right")
    for each in found:
        own, lines = each.provider(), (each.rtt_ms, each.up_mbit, each.down_mbit, each.tflops, each.few_tflops)
        machines.add_row(own.name, own.plane, *(f"{value:.3g}" for value in lines), f"{own.mem_gib:.2f}")
    models = Table(title="predicted", title_justify="left")
    for head in ("model", "what", "tokens/s", "stages", "so"):
        models.add_column(head, justify="right" if head in ("tokens/s", "stages") else "left")
    for one in predicted:
        speed = f"{one.tokens_per_s:.3g}" if one.tokens_per_s else "-"
        models.add_row(one.model, one.what, speed, str(len(one.together) or "-"), one.verdict)
    return [machines, models]
