"""What a config needs of a machine: memory by phase, time by phase, and which of the two, or what else, is the limit.

Pure functions of a config and a machine; no torch, and milliseconds for a model of 70 B parameters. Memory is
`cost.memory`'s; whether it fits, is asked of the device's memory less its context and the allocator's slack
(`cost.room`), and of the host's where that is known. Time is `steps`' sum of operators, collectives and copies.

`mfu` is as in a run's record (`train.measure`): FLOPs that the method needs over the step and the peak of the device in
`train.precision`. `tokens_per_s` counts padding, for there are no data here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from llmsys import schema
from llmsys.bench.predict import machine as machines
from llmsys.bench.predict import steps
from llmsys.bench.predict.machine import Machine
from llmsys.cost import case as cases
from llmsys.cost import engines, flops, memory, phases, policy, walk
from llmsys.cost.case import Case
from llmsys.cost.phases import Phase
from llmsys.cost.room import GIB
from llmsys.cost.tape import Tape


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of one config on one machine.

    `phases`: memory of a rank, and `peak_bytes` its most on the device; `host_bytes` of all ranks of a machine
    together, and `host_capacity_bytes` None where it is not known. `step_ms` is the sum of `by_phase_ms`: data,
    forward, backward, comm (what shows of it), optimizer, offload. `tokens_per_s` of all devices; 0 of images. `binds`:
    what takes the most of a step (`spent_ms`: `host` is its AdamW, its copies and its starting of operators); or
    `memory`, where it does not fit. `notes`: how all this was come by, and what was assumed.
    """

    phases: tuple[Phase, ...]
    peak_bytes: int
    host_bytes: int
    capacity_bytes: int
    host_capacity_bytes: int | None
    fits: bool
    step_ms: float
    by_phase_ms: dict[str, float]
    tokens_per_s: float
    samples_per_s: float
    mfu: float
    binds: str
    spent_ms: dict[str, float]
    usd_per_million_tokens: float | None
    notes: tuple[str, ...]

    @property
    def note(self) -> str:
        return "; ".join(self.notes)

    @property
    def fullest(self) -> Phase:
        """The phase in which the device is fullest."""
        return max(self.phases, key=lambda phase: phase.device_bytes)


def predict(config: schema.Config, machine: Machine | None = None) -> Prediction:
    """What `config` would do on `machine` (None: the one that it describes, see `machine.of`).

    ValueError, which names the keys, for what is not known here, for a method without gradients, and for
    `train.recompute=auto`, which is chosen by the memory there is: `resolved` says what it comes to.
    """
    machine = machine or machines.of(config)
    if config.train.recompute == "auto":
        config = resolved(config, machine)
    known = cases.facts(config, machine.device)
    parts = (config.model, config.train, config.method, config.engine)
    case = Case(*parts, **known)
    if not case.trains:
        raise ValueError(
            f"method.kind={config.method.kind}: trains nothing by gradient, so there is no step to predict"
        )
    tape, held = walk.run(case), engines.hold(case)
    found = tuple(phases.of(case, memory.ledger(case, tape), held))
    here = min(config.train.world, machine.devices)
    peak, capacity = max(phase.device_bytes for phase in found), int(machine.capacity_bytes(config.train.world))
    host = here * max(phase.host_bytes for phase in found)
    room = None if machine.host_gib is None else int(machine.host_gib * GIB)
    fits = peak <= capacity and (room is None or machine.device == "cpu" or host <= room)
    step = steps.step(case, known, tape, held, machine)
    seconds = sum(step.phases.values())
    tokens = config.train.global_batch * tokens_each(config) / seconds
    limit = max(step.spent, key=lambda what: step.spent[what])
    rent = machine.usd_per_hour * config.train.world / 3600 if machine.usd_per_hour else None
    return Prediction(
        phases=found,
        peak_bytes=peak,
        host_bytes=host,
        capacity_bytes=capacity,
        host_capacity_bytes=room,
        fits=fits,
        step_ms=seconds * 1e3,
        by_phase_ms={name: value * 1e3 for name, value in step.phases.items()},
        tokens_per_s=tokens,
        samples_per_s=config.train.global_batch / seconds,
        mfu=flops.model_flops(*parts, **known) / seconds / machine.peak[config.train.precision],
        binds=limit if fits else "memory",
        spent_ms={what: value * 1e3 for what, value in step.spent.items()},
        usd_per_million_tokens=1e6 * rent / tokens if rent and tokens else None,
        notes=(*machine.notes, *_instead(tape, machine, steps.adam_kind(config.train))),
    )


def _instead(tape: Tape, machine: Machine, adam: str) -> list[str]:
    """A line for each kind of operator that goes at another one's speed; `adam`: the update's kind."""
    kinds = {(op.kind, op.width) for ops in tape.ops.values() for op in ops} | {(adam, 4)}
    return sorted(filter(None, {machine.speeds.instead(kind, width) for kind, width in kinds}))


def tokens_each(config: schema.Config) -> int:
    """Tokens of an example, as a run counts them: source and target; none of an image."""
    if config.model.objective == "images":
        return 0
    return config.train.length + config.train.target_length * (config.model.objective == "seq2seq")


def resolved(config: schema.Config, machine: Machine) -> schema.Config:
    """`config` with what `train.recompute=auto` comes to on `machine`: the least that has to be computed again."""
    if not isinstance(config.model, schema.Transformer):
        raise ValueError(f"train.recompute=auto: is for transformers, not for model {config.model.name}")
    room = machine.capacity_bytes(config.train.world)
    known = cases.facts(config, machine.device)
    chosen = policy.cheapest(
        lambda peak: peak <= room, config.model, config.train, config.method, config.engine, **known
    )
    return dataclasses.replace(config, train=dataclasses.replace(config.train, recompute=chosen.text))
