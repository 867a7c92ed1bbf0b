"""The time of an optimizer step of one rank, by phase: operators, collectives, the update, what goes to the host.

    forward, backward   every micro-batch's operators (`cost.walk`); what is computed again belongs to the backward pass
    comm                what of the collectives no computation hides
    optimizer           clipping and AdamW, on the device or, offloaded, on the host's cores, which all ranks share
    offload             copies between device and host that nothing hides
    data                bringing the batch

What hides behind what, on devices that talk while they compute (`Machine.overlaps`; on a CPU nothing does):

    ddp, deepspeed 0    the all-reduce behind the last micro-batch's backward pass, but for its last bucket
    deepspeed 1, 2      nothing: DeepSpeed exchanges gradients in the stream that computes, unless `overlap_comm` is set
    deepspeed 3, fsdp2  gathering behind either pass, but for the first block's, and the reduce-scatter behind backward
    tp                  nothing
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from llmsys import schema
from llmsys.bench.predict.machine import Machine
from llmsys.bench.predict.speeds import Passed
from llmsys.cost import engines, shapes, traffic
from llmsys.cost.case import Case, Facts
from llmsys.cost.engines import Holding
from llmsys.cost.tape import Tape
from llmsys.cost.work import AGAIN, BACKWARD, FORWARD, Op

PHASES = ("data", "forward", "backward", "comm", "optimizer", "offload")
MIB = 2**20
HOOKS = {"zero3": {FORWARD: 21, BACKWARD: 16}, "fsdp2": {FORWARD: 12, BACKWARD: 18}}
"""What an engine's Python around a pass takes for each weight that it gathers, in starts of an operator: measured, 24
blocks of width 64 against 4 of them, less what DDP takes, on two ranks of a CPU (DeepSpeed 0.19, torch 2.13)."""


class Step(NamedTuple):
    """Seconds by phase, and by what they are spent on: `compute`, `bandwidth`, `network`, `host`."""

    phases: dict[str, float]
    spent: dict[str, float]


def step(case: Case, known: Facts, tape: Tape, held: Holding, machine: Machine) -> Step:
    """Of a rank of `case`, which must train something; `known`: its facts once more."""
    micro = schema.accumulation(case.train, case.engine)
    sizes = Sizes.of(case)
    passes, around = _passes(case, tape, machine), _around(case, sizes, micro, machine)
    one = {name: _scaled(machine, name, passed) for name, passed in passes.items()}
    forward, backward = (
        _sum(passed.scaled(micro, micro), _scaled(machine, name, around[name])) for name, passed in one.items()
    )
    update, host_s = _update(case, held, sizes, machine)
    talk = _Talk(case, known, sizes, machine)
    copies = _copies(case, held, micro, sizes, machine)
    if micro > 1 and held.trained:  # gradients of later micro-batches are added
        adding = Op(BACKWARD, "stream", 0.0, 3.0 * held.trained * (micro - 1), micro - 1)
        extra = machine.speeds.passed([adding])
        update = _sum(update, extra)
    exposed, offload = talk.exposed(forward.total, backward.total, one[BACKWARD].total, copies)
    phases = {
        "data": machine.data_s,
        "forward": forward.total,
        "backward": backward.total,
        "comm": exposed,
        "optimizer": update.total + host_s,
        "offload": offload,
    }
    all_three = (forward, backward, update)
    starts = sum(each.start for each in all_three) if not machine.speeds.behind else 0.0
    spent = {
        "compute": sum(each.compute for each in all_three) + starts,
        "bandwidth": sum(each.memory for each in all_three),
        "network": exposed,
        "host": host_s + offload + sum(each.idle for each in all_three) + machine.data_s,
    }
    return Step(phases, spent)


def alone(case: Case, tape: Tape, machine: Machine) -> dict[str, Passed]:
    """A micro-batch's passes and the device's update, as their operators add up: no factor of whole steps in them."""
    bare = dataclasses.replace(machine, scales={})
    return {**_passes(case, tape, bare), "optimizer": _update(case, engines.hold(case), Sizes.of(case), bare)[0]}


def _passes(case: Case, tape: Tape, machine: Machine) -> dict[str, Passed]:
    """A micro-batch's passes."""
    found: dict[str, Counter[Op]] = {FORWARD: Counter(), BACKWARD: Counter()}
    policies = dict(zip(tape.blocks, case.policies, strict=False))
    for part, ops in tape.ops.items():
        whole = policies.get(part) == "block"
        for i, op in enumerate(ops):
            found[FORWARD if op.passed == FORWARD else BACKWARD][op] += 1
            if whole and op.passed == FORWARD and i < tape.last_op[part]:
                found[BACKWARD][op._replace(passed=AGAIN)] += 1
    return {name: _added(machine, ops) for name, ops in found.items()}


def _added(machine: Machine, ops: Counter[Op]) -> Passed:
    """Equal operators once: a model has the same block many times."""
    total = Passed(behind=machine.speeds.behind)
    for op, times in ops.items():
        each = machine.speeds.passed([op])
        total = _sum(total, each.scaled(times, times))
    return total


def _sum(one: Passed, other: Passed) -> Passed:
    return Passed(
        compute=one.compute + other.compute,
        memory=one.memory + other.memory,
        start=one.start + other.start,
        behind=one.behind,
    )


def _scaled(machine: Machine, name: str, passed: Passed) -> Passed:
    return passed.scaled(*machine.scales.get(name, (1.0, 1.0)))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a model's parameters: how many `weights`, `numel` and `nbytes` of all, the same of those that are trained, and
    how many `tensors` these are; `share`: elements that a rank updates under ZeRO."""

    weights: int
    numel: int
    nbytes: int
    trained_numel: int
    trained_nbytes: int
    tensors: int
    share: int

    @classmethod
    def of(cls, case: Case) -> Sizes:
        parameters = shapes.held(case)
        trained = [p for p in parameters if p.trained]
        return cls(
            weights=len(parameters),
            numel=sum(p.numel for p in parameters),
            nbytes=sum(p.nbytes for p in parameters),
            trained_numel=(numel := sum(p.numel for p in trained)),
            trained_nbytes=sum(p.nbytes for p in trained),
            tensors=len(trained),
            share=numel // case.train.world,
        )


def _update(case: Case, held: Holding, sizes: Sizes, machine: Machine) -> tuple[Passed, float]:
    """(what the device does of clipping and AdamW, seconds of the host's).

    AdamW reads and writes its moments and the weights, and reads the gradients. Under ZeRO (DeepSpeed 0.19, stages 1
    to 3), an element of w bytes: the gradients are laid flat 2 w, read into fp32 w + 4, their norm is taken of a copy
    in doubles w + 16, they are scaled 8, and the weights written back from fp32, 4 + w. What is offloaded is scaled,
    updated and cast on the host, all ranks at once; norm and fp32 gradients are made on the device.
    """
    scales = case.train.clip > 0
    if case.zero:
        n, w = float(sizes.share), case.width
        adam, scaled = 2.0 * held.optimizer + 12.0 * n, 8.0 * n * (scales or case.zero == 3)
        norm, flat, back = (w + 16) * n, (2 * w + (w + 4) * (w < 4)) * n, (4 + w) * n
    else:
        adam, scaled = 2.0 * held.optimizer + 3.0 * held.gradients, 2.0 * held.gradients * scales
        norm, flat, back = float(held.gradients), 0.0, 0.0
    launches = 8 if machine.speeds.behind else 2 if case.zero else sizes.tensors
    if isinstance(case.engine, schema.DeepSpeed) and case.engine.offload != "none" and machine.device != "cpu":
        ranks = min(case.train.world, machine.devices)
        ops = [Op(FORWARD, "stream", 0.0, norm, 2 * launches)]
        return machine.speeds.passed(ops), (adam + scaled + back) * ranks / machine.host_bytes_per_s
    around = Op(FORWARD, "stream", 0.0, norm + flat + scaled + back, 3 * launches)
    ops = [Op(FORWARD, adam_kind(case.train), 0.0, adam, launches), around]
    return _scaled(machine, "optimizer", machine.speeds.passed(ops)), 0.0


def adam_kind(train: schema.Train) -> str:
    """The kind of operator that an update is: with moments in 8 bits it is another kernel."""
    return "adam8" if train.optimizer == "adamw_8bit" else "adam"


def _around(case: Case, sizes: Sizes, micro: int, machine: Machine) -> dict[str, Passed]:
    """What engines do around a step's passes: their hooks, and laying weights and gradients flat for messages.

    Of an element of w bytes: DeepSpeed (0.19) copies a gradient into a bucket, that into a message, divides it, 2 w
    each, and takes this rank's part out, 2 w / N; FSDP2 (torch 2.13) copies it into a message, 2 w. What is gathered is
    copied out, 2 w. Stages 2 and 3 and FSDP2 do so with every micro-batch, stage 1 with the last. A bucket has four
    operators for each tensor; what gathers weights starts as much as `HOOKS` has.
    """
    engine, world, n, w = case.engine, case.train.world, sizes.trained_numel, float(case.width)
    nothing = {name: Passed(behind=machine.speeds.behind) for name in (FORWARD, BACKWARD)}
    sharded = isinstance(engine, schema.FSDP2)
    if world == 1 or not (sharded or case.zero):
        return nothing
    gradients = 2 * w * n if sharded else (6 + 2 / world) * w * n
    hooks = HOOKS.get("fsdp2" if sharded else f"zero{case.zero}", {})
    gathered = 2.0 * sizes.nbytes if hooks else 0.0
    again = _gathers_twice(case, sizes)
    times = 1 if case.zero == 1 else micro
    nbytes = {FORWARD: gathered, BACKWARD: gradients + gathered * again}
    found = {}
    for name, moved in nbytes.items():
        if not moved:
            continue
        launches = max(1, len(case.policies)) if hooks else 4 * sizes.tensors
        laid = machine.speeds.passed([Op(name, "stream", 0.0, times * moved, times * launches)])
        starts = times * (hooks[name] * sizes.weights if hooks else launches)
        found[name] = dataclasses.replace(laid, start=starts * machine.speeds.start_s[name])
    return nothing | found


def _gathers_twice(case: Case, sizes: Sizes) -> bool:
    """Whether weights are gathered for the backward pass too."""
    if isinstance(case.engine, schema.FSDP2):
        return case.engine.reshard
    return sizes.numel > traffic.REUSE


@dataclass(frozen=True)
class _Copies:
    """Seconds between device and host: within the passes, and around the update."""

    forward: float = 0.0
    backward: float = 0.0
    update: float = 0.0


def _copies(case: Case, held: Holding, micro: int, sizes: Sizes, machine: Machine) -> _Copies:
    engine = case.engine
    if not isinstance(engine, schema.DeepSpeed) or engine.offload == "none" or machine.device == "cpu":
        return _Copies()
    own, rate = case.width * sizes.share, machine.copy_bytes_per_s
    there = 4.0 * sizes.share  # gradients go there in fp32, when all are there
    if engine.zero < 3:  # what is accumulated waits on the host, and is fetched to be added to; updated weights back
        return _Copies(update=(there + (2 * micro - 1) * own * (micro > 1) + own) / rate)
    gradients = 2.0 * micro * own + there  # each micro-batch's go there and back
    if engine.offload == "optimizer":
        return _Copies(backward=gradients / rate, update=own / rate)
    return _Copies(forward=micro * held.weights / rate, backward=(micro * held.weights + gradients) / rate)


class _Talk:
    """A step's collectives."""

    def __init__(self, case: Case, known: Facts, sizes: Sizes, machine: Machine) -> None:
        self.case, self.machine, self.sizes = case, machine, sizes
        payload = traffic.step_payload(case.model, case.train, case.method, case.engine, **known)
        self.seconds = {kind: self._seconds(kind, nbytes) for kind, nbytes in payload.items()}

    def _seconds(self, kind: str, nbytes: int) -> float:
        """In messages of a bucket each."""
        line, world = self.machine.line(kind), self.case.train.world
        messages = max(1, round(nbytes / self._bucket()))
        return messages * line.seconds(kind, nbytes / messages, world)

    def _bucket(self) -> float:
        engine = self.case.engine
        if isinstance(engine, schema.DDP):
            return engine.bucket_mib * MIB
        if isinstance(engine, schema.DeepSpeed):
            return float(engines.BUCKET * self.case.width)
        if isinstance(self.case.model, schema.Transformer):
            blocks = max(1, len(self.case.policies))
            if engine.kind == "fsdp2":
                return self.sizes.nbytes / blocks
            width = self.case.product_width
            return float(self.case.train.micro_batch * self.case.train.length * self.case.model.hidden_size * width)
        return 25.0 * MIB

    def exposed(self, forward: float, backward: float, last: float, copies: _Copies) -> tuple[float, float]:
        """(seconds of collectives, seconds of copies) that nothing hides, for passes of `forward` and `backward`
        seconds, of which the last micro-batch's backward pass takes `last`."""
        said, engine = self.seconds, self.case.engine
        total, copied = sum(said.values()), copies.forward + copies.backward
        around = copies.update
        if not self.machine.overlaps:
            return total, copied + around
        if isinstance(engine, schema.FSDP2) or self.case.zero == 3:
            gather = said.get("all_gather", 0.0)
            early = gather / 2 if _gathers_twice(self.case, self.sizes) else gather
            late = gather - early + said.get("reduce_scatter", 0.0)
            blocks = max(1, len(self.case.policies))
            shown = [
                _behind(talk, copy, hiding, blocks)
                for talk, copy, hiding in ((early, copies.forward, forward), (late, copies.backward, backward))
            ]
            return sum(talk for talk, _ in shown), sum(copy for _, copy in shown) + around
        if engine.kind == "ddp" or (isinstance(engine, schema.DeepSpeed) and engine.zero == 0):
            messages = max(1.0, self.sizes.trained_nbytes / self._bucket())
            return max(total / messages, total - last * (1 - 1 / messages)) if total else 0.0, copied + around
        return total, copied + around


def _behind(talk: float, copy: float, hiding: float, blocks: int) -> tuple[float, float]:
    """(what shows of collectives, what of copies), one after the other, behind a pass of `blocks` blocks: at least the
    first block's."""
    both = talk + copy
    if not both:
        return 0.0, 0.0
    shown = max(both / blocks, both - hiding)
    return shown * talk / both, shown * copy / both
