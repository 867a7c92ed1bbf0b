"""The task `compress_simulate`: predicts iterations of the paper's models by every method on clusters.

Everything that the tables show is in the record's summary, under keys of parts joined by `/`:

    <model>/<network>/<world>/<method>/iteration_ms    mean of an iteration; device_ms of it computing, compress_ms of
                                                       that compressing and decompressing; wire_ms: the link, hidden
                                                       or not
    break_even/<model>/<world>/<method>_gbit           up to which link rate the method is faster than S-SGD, at the
                                                       latency of the last network: 0 nowhere, 1000 everywhere tried
    average/<none or powersgd>_over_acpsgd_x           the paper's two averages, over all its models on its main
                                                       cluster, with its GPU and settings
    sensitivity/<setting>=<value>/<the same>           with another value of what is no specification

Its samples are curves, at the latency of the last network: `curve/<model>/<world>/<method>_ms` over `curve/gbit`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from llmsys import schema
from llmsys.compress.kernels_cost import Rates
from llmsys.compress.paper_models import MODELS, PaperModel
from llmsys.compress.simulate import predict, tables
from llmsys.compress.simulate.clusters import INNER_LATENCY_US, NETWORKS, Cluster
from llmsys.cost import hardware
from llmsys.cost.hardware import Device
from llmsys.cost.links import Line
from llmsys.files import write_atomic

if TYPE_CHECKING:
    from llmsys.context import Context


CURVE_GBIT = tuple(round(10 ** (i / 6 - 1), 4) for i in range(19))
"""Rates of links between machines: 0.1 to 100 Gbit/s."""
ASSUMED: dict[str, tuple[float, ...]] = {
    "efficiency": (0.3, 0.4, 0.6, 0.7),
    "memory_efficiency": (0.5, 1.0),
    "launch_us": (2.0, 10.0),
}
"""What is no specification, and other values of it."""


def simulate(config: schema.Config, context: Context) -> dict[str, Any]:
    """The record's summary, and `simulate.md` with its tables."""
    task, device = config.task, hardware.named(config.hardware)
    assert isinstance(task, schema.Simulate)
    assert device is not None, "`schema.coherence` has said so"
    if task.precision not in device.tflops:
        known = ", ".join(device.tflops)
        raise ValueError(f"task.precision={task.precision}: {device.title} has none; there are {known}")
    lines = _lines(task)
    summary: dict[str, float] = {}
    samples: dict[str, list[float]] = {"curve/gbit": list(CURVE_GBIT)}
    for name in task.models:
        context.beat()
        model = MODELS[name]
        machine = _machine(task, device, name, model)
        for world in task.worlds:
            plans = _plans(task, model, machine, world)
            for network, line in lines.items():
                cluster = _cluster(task, device, line, world)
                for method, plan in plans.items():
                    summary |= _cell(f"{name}/{network}/{world}/{method}", plan, cluster)
            cluster = _cluster(task, device, list(lines.values())[-1], world)
            for method, plan in plans.items():
                if method != "none" and world > task.per_machine:
                    rate = predict.break_even_gbit(plan, plans["none"], cluster)
                    summary[f"break_even/{name}/{world}/{method}_gbit"] = rate
                times = (plan.iteration(cluster.at_rate(gbit)).total_s * 1e3 for gbit in CURVE_GBIT)
                samples[f"curve/{name}/{world}/{method}_ms"] = [round(ms, 3) for ms in times]
    if _as_in_the_paper(config) and (averages := tables.averages(summary)):
        summary |= {f"average/{key}": value for key, value in averages.items()}
        context.beat()
        summary |= _sensitivity(task, device)
    write_atomic(context.out / "simulate.md", tables.markdown(summary, notes(config)))
    return {"summary": summary, "samples": samples, "files": {"tables": "simulate.md"}}


def _as_in_the_paper(config: schema.Config) -> bool:
    """Whether its numbers may stand beside: its GPU and its settings, whatever is assumed of them."""
    task, plain = config.task, schema.Simulate()
    assert isinstance(task, schema.Simulate)
    keys = ("per_machine", "precision", "bucket_mib", "overlap", "min_rate", "beta_bytes_per_s")
    return config.hardware.name == tables.GPU and all(getattr(task, key) == getattr(plain, key) for key in keys)


def _sensitivity(task: schema.Simulate, device: Device) -> dict[str, float]:
    """The averages with one assumption changed at a time."""
    network, world = tables.MAIN
    found = {}
    for key, values in ASSUMED.items():
        for value in values:
            changed: dict[str, Any] = {"methods": list(tables.ORDER), key: value}
            other = dataclasses.replace(task, **changed)
            cells: dict[str, float] = {}
            for name in tables.RECALLED:
                model = MODELS[name]
                plans = _plans(other, model, _machine(other, device, name, model), world)
                cluster = _cluster(other, device, NETWORKS[network].line, world)
                for method in tables.ORDER:
                    cells |= _cell(f"{name}/{network}/{world}/{method}", plans[method], cluster)
            for which, average in tables.averages(cells).items():
                found[f"sensitivity/{key}={value:g}/{which}"] = average
    return found


def _plans(task: schema.Simulate, model: PaperModel, machine: predict.Machine, world: int) -> dict[str, predict.Plan]:
    """S-SGD's is among them: all others are compared with it."""
    found = {}
    for method in dict.fromkeys(["none", *task.methods]):
        config = predict.settings(method, model, min_rate=task.min_rate, density=task.density)
        found[method] = predict.plan(
            model, method, config, machine, world, bucket_mib=task.bucket_mib, overlap=task.overlap
        )
    return found


def _cell(where: str, plan: predict.Plan, cluster: Cluster) -> dict[str, float]:
    found = plan.iteration(cluster)
    return {
        f"{where}/iteration_ms": found.total_s * 1e3,
        f"{where}/device_ms": found.device_s * 1e3,
        f"{where}/compress_ms": (found.compress_s + found.decompress_s) * 1e3,
        f"{where}/wire_ms": found.wire_s * 1e3,
    }


def _machine(task: schema.Simulate, device: Device, name: str, model: PaperModel) -> predict.Machine:
    achieved = device.peak(task.precision) * task.efficiency
    compute = achieved
    if name in task.compute_ms:
        compute = 3 * model.batch * sum(p.flops for p in model.parameters) / (task.compute_ms[name] * 1e-3)
    memory = task.gamma_bytes_per_s or device.gb_per_s * 1e9 * task.memory_efficiency
    rates = Rates(flops_per_s=achieved, bytes_per_s=memory, launch_s=task.launch_us * 1e-6)
    return predict.Machine(compute_flops_per_s=compute, compress=rates)


def _lines(task: schema.Simulate) -> dict[str, Line]:
    """By name; a rate that is given is one network, `given`, instead of those named."""
    if task.beta_bytes_per_s is not None:
        assert task.alpha_s is not None
        return {"given": Line(task.alpha_s, 1 / task.beta_bytes_per_s)}
    return {name: NETWORKS[name].line for name in task.networks}


def _cluster(task: schema.Simulate, device: Device, outer: Line, world: int) -> Cluster:
    inner = Line.of_rate(device.gbps(task.per_machine), INNER_LATENCY_US * 1e-6)
    return Cluster(inner=inner, outer=outer, world=world, per_machine=task.per_machine)


def notes(config: schema.Config) -> list[str]:
    """What the numbers stand on."""
    task, device = config.task, hardware.named(config.hardware)
    assert isinstance(task, schema.Simulate)
    assert device is not None
    given = ", ".join(f"{name} {ms:g} ms" for name, ms in task.compute_ms.items())
    memory = (
        f"{task.gamma_bytes_per_s / 1e9:g} GB/s as given"
        if task.gamma_bytes_per_s
        else f"{task.memory_efficiency:g} of {device.gb_per_s:g} GB/s"
    )
    found = [
        f"{device.title}: {task.efficiency:g} of {device.peak(task.precision) / 1e12:g} TFLOP/s ({task.precision}), "
        f"{memory} of memory, {task.launch_us:g} us a kernel at least ({device.source})",
        f"{task.per_machine} GPUs share a machine's link; buckets of {task.bucket_mib:g} MiB"
        + ("" if task.overlap else "; nothing overlaps"),
    ]
    if given:
        found.append(f"forward and backward pass as given: {given}")
    if task.beta_bytes_per_s is None:
        found += [
            f"{net.title}: {net.gbit:g} Gbit/s, {net.latency_us:g} us a message ({net.source})"
            for net in (NETWORKS[name] for name in task.networks)
        ]
    return found
