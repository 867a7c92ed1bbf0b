"""A prediction as text: the answer first, memory by phase and kind, time by phase, and how the numbers were made."""

from __future__ import annotations

from llmsys import schema
from llmsys.bench.predict.machine import Machine
from llmsys.bench.predict.prediction import Prediction, tokens_each
from llmsys.cost import room
from llmsys.cost.room import GIB
from llmsys.table import piped

KINDS = ("weights", "gradients", "optimizer", "master", "compress", "activations", "logits", "workspace")
WORDS = {
    "memory": "memory",
    "compute": "arithmetic",
    "bandwidth": "the device's memory bandwidth",
    "network": "the links between ranks",
    "host": "the host: its AdamW, copies from and to it, and how fast it starts operators",
}


def markdown(config: schema.Config, machine: Machine, found: Prediction) -> str:
    """The whole of `prediction.md`."""
    parts = [
        f"# {config.model.name} on {machine.title}",
        answer(config, machine, found),
        "## Memory of a rank, GiB",
        _memory(found),
        "## Time of a step, ms",
        _time(found),
        "## How this was made",
        "\n".join(f"- {line}" for line in made(config, machine, found)),
    ]
    return "\n\n".join(parts) + "\n"


def answer(config: schema.Config, machine: Machine, found: Prediction) -> str:
    """A few sentences: what is run, whether it fits, how fast it is, and what is the limit."""
    train, full = config.train, found.fullest
    what = (
        f"{config.techniques or 'These settings'}: {train.world} rank{'s' * (train.world > 1)}, micro-batch "
        f"{train.micro_batch} x {train.length}, {train.global_batch} examples a step, {train.precision}."
    )
    memory = (
        f"{'Fits' if found.fits else 'Does not fit'}: {_gib(found.peak_bytes)} GiB of "
        f"{_gib(found.capacity_bytes)} that can be used, in phase {full.name}"
    )
    if found.host_bytes:
        room = "" if found.host_capacity_bytes is None else f" of {_gib(found.host_capacity_bytes)}"
        memory += f"; {_gib(found.host_bytes)} GiB{room} of host memory"
        memory += " (not known how much there is)" * (found.host_capacity_bytes is None)
    speed = f"A step takes {_ms(found.step_ms)} ms"
    rate = f"{found.tokens_per_s:,.0f} tokens/s" if tokens_each(config) else f"{found.samples_per_s:,.1f} images/s"
    speed += f": {rate}"
    speed += f", {100 * found.mfu:.1f} % MFU"
    if found.usd_per_million_tokens is not None:
        speed += f", {found.usd_per_million_tokens:.3g} USD per million tokens"
    binds = f"What binds: {WORDS[found.binds]}" + (", by time: " if found.binds == "memory" else ", ") + _shares(found)
    return "\n".join((what, memory + ".", speed + ".", binds + "."))


def _shares(found: Prediction) -> str:
    total = sum(found.spent_ms.values())
    ordered = sorted(found.spent_ms.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{what} {100 * ms / total:.0f} %" for what, ms in ordered if ms >= 0.005 * total)


def _memory(found: Prediction) -> str:
    most = found.peak_bytes / 1e4  # less does not show
    kinds = [kind for kind in KINDS if any(phase.device.get(kind, 0) > most for phase in found.phases)]
    rows = [["phase", *kinds, "device", "host"]]
    for phase in found.phases:
        sizes = [phase.device.get(kind, 0) for kind in kinds]
        rows.append([phase.name, *(_gib(n) if n else "" for n in (*sizes, phase.device_bytes, phase.host_bytes))])
    return "\n".join(piped(rows[0], rows[1:]))


def _time(found: Prediction) -> str:
    shown = {name: ms for name, ms in found.by_phase_ms.items() if ms}
    rows = [[name, _ms(ms), f"{100 * ms / found.step_ms:.1f} %"] for name, ms in shown.items()]
    return "\n".join(piped(["phase", "ms", "share"], [*rows, ["step", _ms(found.step_ms), ""]]))


def made(config: schema.Config, machine: Machine, found: Prediction) -> list[str]:
    """Where each number is from, a line each."""
    said = ["memory: what autograd keeps, ranks hold and engines work with, by phase of a step (llmsys.cost.phases)"]
    if machine.device == "cuda":
        before = room.taken(config.train.world)
        said.append(
            f"what can be used: the device's memory less {before:g} GiB that are used before there is a tensor, and "
            f"{100 * room.SLACK:.0f} % of the rest (llmsys.cost.room)"
        )
    said.append("time: operators by size, collectives, copies and the update (llmsys.bench.predict.steps)")
    said += found.notes
    if config.compress.kind != "none":
        said.append(f"compress={config.compress.kind}: what is sent counts, what compressing it takes does not")
    if not machine.calibrated:
        said.append("not calibrated: on the machine itself, +exp=bench_calibrate and task.speeds=<its folder>")
    return said


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.2f}" if nbytes >= GIB / 10 else f"{nbytes / GIB:.4f}"


def _ms(ms: float) -> str:
    return f"{ms:,.1f}" if ms >= 10 else f"{ms:.3f}"
