"""What can be known before anything large is loaded: the learning rate, and whether memory and time suffice.

A refusal is one message that says what is needed, what was found, and the commands that would run instead.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math

import torch

from llmsys import schema
from llmsys.comm import collectives
from llmsys.cost import case, engines, flops, hardware, links, memory, policy, room, traffic
from llmsys.cost.case import Case, Facts
from llmsys.device import host_available
from llmsys.errors import Contradiction, MissingPackage, Refused
from llmsys.models import float8
from llmsys.train import peaks
from llmsys.train.alternatives import alternatives

log = logging.getLogger(__name__)
GIB = 2**30
MAX_CPU_S = 3600.0
"""A run predicted to take longer than this on a CPU was most likely meant for a GPU."""


def libraries(config: schema.Config) -> None:
    """LookupError names the extra that brings a library which this run would need only after loading weights."""
    needed = {
        f"train.optimizer={config.train.optimizer}": (
            "train",
            ["bitsandbytes"] if config.train.optimizer == "adamw_8bit" else [],
        ),
        f"model.quant={config.model.quant}": ("train", ["bitsandbytes"] if config.model.quant != "none" else []),
        f"engine={config.engine.kind}": ("deepspeed", ["deepspeed"] if config.engine.kind == "deepspeed" else []),
        "BLEU and ROUGE": ("train", ["sacrebleu", "rouge_score"] if config.model.objective == "seq2seq" else []),
    }
    for what, (extra, modules) in needed.items():
        for module in modules:
            if importlib.util.find_spec(module) is None:
                raise MissingPackage(f"{what}: needs {module}: pip install 'llmsys[{extra}]'")


def formats(config: schema.Config, device: torch.device) -> None:
    """Contradiction where the device has no 8-bit floats and `train.fp8` asks for them."""
    if not config.train.fp8:
        return
    least = ".".join(map(str, float8.LEAST))
    found = "this run is on a CPU"
    if device.type == "cuda":
        have = torch.cuda.get_device_capability(device)
        if have >= float8.LEAST:
            return
        found = f"this {torch.cuda.get_device_name(device)} has {have[0]}.{have[1]}"
    raise Contradiction(
        f"train.fp8=true (techniques: Q8): needs a GPU of compute capability {least} or later (Ada, Hopper); {found}"
    )


def learning_rate(config: schema.Config) -> float:
    """The run's peak learning rate. ValueError names the missing entry: one method's rate must not serve another."""
    rates = config.train.lr_by_method
    if config.method.kind not in rates:
        raise ValueError(
            f"train.lr_by_method.{config.method.kind}: missing; the learning rate belongs to the method, "
            f"add e.g. train.lr_by_method.{config.method.kind}=1e-3 (there are {', '.join(rates) or 'none'})"
        )
    return rates[config.method.kind] * config.train.lr_scale


def facts(config: schema.Config, device: torch.device) -> Facts:
    """What data and device add to the config."""
    return case.facts(config, "cuda" if hardware.named(config.hardware) else device.type)


def resolved(config: schema.Config, device: torch.device) -> schema.Config:
    """`config` with what `train.recompute=auto` comes to here, which the log says. All ranks come to the same, by the
    least memory that one of them finds."""
    if config.train.recompute != "auto":
        return config
    have, where = available_memory(config, device)
    have = int(collectives.all_gather(torch.tensor(int(have), device=device)).min())
    chosen = _chosen(config, device, have)
    log.info(
        "train.recompute=auto: %s, which needs %s and computes %.3g FLOP again for each micro-batch; %s has %s",
        chosen.text, readable(chosen.peak), chosen.again, where, readable(have),
    )  # fmt: skip
    return _with(config, chosen.text)


def _chosen(config: schema.Config, device: torch.device, have: float) -> policy.Choice:
    """The cheapest policies that fit into a rank's `cost.room`, else those that need the least."""
    assert isinstance(config.model, schema.Transformer), "of others `schema.coherence` lets only none pass"
    mine = room.room(have, cuda=not _is_host(config, device), ranks=config.train.world)
    parts = (config.model, config.train, config.method, config.engine)
    return policy.cheapest(lambda peak: peak <= mine, *parts, **facts(config, device))


def _with(config: schema.Config, text: str) -> schema.Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, recompute=text))


def readable(size: float) -> str:
    """Bytes in the largest unit of which there is one whole, to two decimals: `23.69 GiB`, `0 B`."""
    units = {"GiB": GIB, "MiB": 2**20, "KiB": 2**10}
    name = next((name for name, unit in units.items() if size >= unit), None)
    return f"{size:.0f} B" if name is None else f"{size / units[name]:.2f} {name}"


def kinds_and_peak(config: schema.Config, device: torch.device) -> tuple[dict[str, int], int]:
    """(bytes by kind, the most that is alive at once on the device) of a training step of one rank."""
    parts, known = (config.model, config.train, config.method, config.engine), facts(config, device)
    return memory.estimate(*parts, **known), memory.peak_bytes(*parts, **known)


def check_memory(config: schema.Config, device: torch.device) -> int:
    """The predicted peak of a rank in bytes, if there is room for it (or `force`); else Refused.

    On a CPU all ranks share the host. On a GPU each has one, and together they need what the engine offloads to the
    host; that is not asked of a machine by name, whose host is not known. An estimate of the device's memory refuses
    nothing where running out of it is `to_be_seen`; the log says so.
    """
    parts, need = kinds_and_peak(config, device)
    have, where = available_memory(config, device)
    sharing = _sharing(config, device)
    kinds = ", ".join(f"{kind} {readable(size)}" for kind, size in parts.items())
    what = f"{config.model.name} with method={config.method.kind}"
    if config.train.recompute != "none":
        what += f" and train.recompute={config.train.recompute}"

    def fits(other: schema.Config) -> bool:
        if other.train.recompute == "auto":
            other = _with(other, _chosen(other, device, have).text)
        return kinds_and_peak(other, device)[1] * sharing <= have

    if need * sharing > have and to_be_seen(config, device):
        log.warning(
            "%s needs about %s; %s has %s: run all the same, to see", what, readable(need), where, readable(have)
        )
    elif need * sharing > have and not config.force:
        each = f"about {readable(need)} ({kinds})"
        each += f" on each of {sharing} ranks, which share a host" if sharing > 1 else ""
        raise Refused(
            f"{what} needs {each}; {where} has {readable(have)}.\n"
            + alternatives(
                config,
                fits=fits,
                recompute=True,
                there=f"On a machine that has the memory, hardware.mem_gib={math.ceil(need * sharing / GIB)} says so.",
            ),
            reason="memory",
        )
    offloaded = engines.hold(
        Case(config.model, config.train, config.method, config.engine, **facts(config, device))
    ).host
    if offloaded and device.type == "cuda" and config.hardware.name == "auto" and not config.force:
        asked, free = sum(offloaded.values()) * config.train.world, host_available()
        if asked > free:
            raise Refused(
                f"{what} offloads {readable(asked)} to the host on {config.train.world} ranks; "
                f"this host (free now) has {readable(free)}.\n"
                + alternatives(config, fits=lambda smaller: False, there="Without engine.offload it is on the device."),
                reason="memory",
            )
    return need


def to_be_seen(config: schema.Config, device: torch.device) -> bool:
    """Whether a run that may run out of memory is part of a sweep that goes by what is seen to, and harms nobody: on a
    GPU; on a CPU where each rank has a limit, and the host that much for all of them."""
    if not config.sweep.observes or device.type == "cuda":
        return config.sweep.observes
    limit = config.dispatch.memory_gib
    return limit is not None and limit * GIB * config.train.world <= host_available()


def check_time(config: schema.Config, device: torch.device) -> float:
    """Predicted ms per step, a lower bound: all arithmetic at the peak of the machine that is named, or of the one at
    hand, and behind it all that ranks say, where their links' rates are known.

    Refused where that makes more than an hour on a CPU, unless `force`.
    """
    speed, whose = arithmetic(config, device)
    line = link(config)

    def seconds(wanted: schema.Config) -> float:
        parts, known = (wanted.model, wanted.train, wanted.method, wanted.engine), facts(wanted, device)
        talk = traffic.step_seconds(line, *parts, **known) if line else 0.0
        return max(flops.step_flops(*parts, **known) / speed, talk)

    total = seconds(config) * config.train.steps
    if device.type == "cpu" and total > MAX_CPU_S and not config.force:
        fitting = max(1, int(MAX_CPU_S / seconds(config)))
        raise Refused(
            f"{config.name}: {config.train.steps} steps of {config.model.name} need at least {total / 3600:.1f} hours "
            f"at {whose}; more than one hour is not begun unasked.\n"
            + alternatives(
                config,
                fits=lambda smaller: seconds(smaller) * config.train.steps <= MAX_CPU_S,
                there=f"train.steps={fitting} fits into an hour.",
            ),
            reason="time",
        )
    return seconds(config) * 1e3


def arithmetic(config: schema.Config, device: torch.device) -> tuple[float, str]:
    """(FLOP/s, in words) that a run is checked by: the peak of the machine that is named, else of the one at hand
    (`peaks`).

    ValueError for a precision that the machine has not.
    """
    machine = hardware.named(config.hardware)
    if machine:
        speed = machine.peak(config.train.precision)
        return speed, f"the {speed / 1e12:.3f} TFLOP/s of {machine.title} in {config.train.precision}"
    speed, source = peaks.peak_flops(config, device)
    if config.hardware.tflops is not None:
        return speed, source
    kind = "CPU" if device.type == "cpu" else "GPU"
    return speed, f"the {speed / 1e12:.3f} TFLOP/s of this {kind} in {config.train.precision}"


def link(config: schema.Config) -> links.Line | None:
    """The link between ranks: the network's where it has rates, else the machine's by name or `hardware.gbps`."""
    if config.network.up_mbit is not None:
        return links.Line.of_network(config.network)
    machine = hardware.named(config.hardware)
    if machine:
        return links.Line.of_rate(machine.gbps(config.train.world))
    return links.Line.of_rate(config.hardware.gbps) if config.hardware.gbps else None


def available_memory(config: schema.Config, device: torch.device) -> tuple[float, str]:
    """(bytes, whose) that a run may use. `hardware.mem_gib` wins, then a machine by name; a limit on the process alone
    (RLIMIT_DATA) does not count, since it is set to see what running out of memory looks like."""
    machine, given = hardware.named(config.hardware), config.hardware.mem_gib
    if given is not None:
        return given * GIB, f"hardware.mem_gib={given:g}: the device"
    if machine:
        return machine.mem_gib * GIB, f"hardware.name={config.hardware.name}: {machine.title}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.total_memory, f"this {properties.name}"
    return host_available(), "this host (free now)"


def _sharing(config: schema.Config, device: torch.device) -> int:
    """How many ranks the memory is for."""
    return config.train.world if _is_host(config, device) else 1


def _is_host(config: schema.Config, device: torch.device) -> bool:
    """Whether the device is a host's memory, of which there is one for all ranks."""
    return device.type == "cpu" and config.hardware.name == "auto"
