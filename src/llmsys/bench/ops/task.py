"""The task `bench_ops`: every operator until its time is known.

The summary's keys are `<operator>/<shape or bytes>[/<dtype>]/<figure>`, the same for every model and machine:

    gemm/<m>x<n>x<k>/<dtype>/ms, spread_percent, tflops, peak_percent        also gemm_nn, gemm_tn: see `shapes`
    bmm/<batch>x<m>x<n>x<k>/<dtype>/...                                      eager attention's two products
    attention/<batch>x<heads>x<queries>x<keys>x<width>/<dtype>/...           and attention_backward
    softmax, rms_norm, layer_norm/<rows>x<columns>/<dtype>/ms, gb_per_s, ... and <operator>_backward
    memcpy/<direction>/<bytes>/ms, gb_per_s, ...                             see `transfers`
    all_reduce, all_gather, reduce_scatter/<bytes>/ms, algbw_gb_per_s, busbw_gb_per_s, ...

ms are medians of `samples`, and `spread_percent` is the distance of their quartiles over the median. `peak_percent` is
there where a peak of the device that ran is known (`train.peaks`): of products its datasheet's, `hardware.tflops`, else
the speed of a large product here (`peak_measured` is 1); of memory, PCIe and links between ranks its datasheet's, or
`hardware.mem_gbps`, `host_gbps` and `gbps`, of links first `network`. `notes` says which. As in a run of training, only
deterministic kernels are used where `train.deterministic` says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from llmsys import schema
from llmsys.bench.ops import shapes, tables, transfers
from llmsys.bench.ops.clock import COLD_BYTES, Clock, Timed
from llmsys.bench.ops.operators import Operators
from llmsys.errors import Refused
from llmsys.train import checks, peaks
from llmsys.train.peaks import Peak
from llmsys.train.reproducible import reproducible

if TYPE_CHECKING:
    from llmsys.context import Context


def ops(config: schema.Config, context: Context) -> dict[str, Any]:
    """Every rank measures, all at the same time; the first one's numbers are the record's, and of a collective the
    slowest one's. Refused where memory is short."""
    task = config.task
    assert isinstance(task, schema.Ops)
    sharing = context.place.world if context.device.type == "cpu" else 1
    need, (have, where) = largest(config, task) * sharing, checks.available_memory(config, context.device)
    if need > have and not config.force:
        raise Refused(
            f"the largest operator of {config.model.name} needs about {checks.readable(need)}; {where} has "
            f"{checks.readable(have)}: a smaller train.micro_batch, train.length or task.sizes_mib",
            reason="memory",
        )
    peak, most = peaks.peak_flops(config, context.device), _most(config, context)
    found: list[Timed] = []
    with reproducible(config.train.seed, context.threads, config.train.deterministic):
        for timed in _measured(config, context, task, peak.per_s, most):
            context.log.info("%s: %.4g ms", timed.key, timed.median_s * 1e3)
            context.beat(step=len(found), ms=timed.median_s * 1e3)
            found.append(timed)
            if dist.is_initialized():
                dist.barrier()
    summary = {key: value for timed in found for key, value in timed.summary().items()}
    summary["peak_tflops"], summary["peak_measured"] = peak.per_s / 1e12, int(peak.measured)
    sources = {"peak_tflops": peak.source, **{name: each.source for name, each in most.items()}}
    notes = [f"{name.replace('_', ' ')}: {source}" for name, source in sources.items()]
    if context.place.world == 1 and "collectives" in task.operators:
        notes.append("collectives need two ranks: engine=ddp train.world=2")
    if context.device.type != "cuda" and "memcpy" in task.operators:
        notes.append("memcpy/host: from memory to memory of this host, there being no device; each byte counts once")
    if context.place.rank == 0:
        used = {timed.key: timed.rows for timed in found}
        text = tables.markdown(summary, f"{config.model.name} on {context.device}", notes, used)
        (context.out / "ops.md").write_text(text, encoding="utf-8")
    samples = {key: values for timed in found for key, values in timed.samples.items()}
    return {"summary": summary, "samples": samples, "notes": sources, "files": {"tables": "ops.md"}}


def _most(config: schema.Config, context: Context) -> dict[str, Peak]:
    """Peaks in bytes/s, those that are known."""
    device = context.device
    found = {
        "peak_of_memory": peaks.memory(config, device),
        "peak_of_host_link": peaks.host_link(config, device),
        "peak_of_links": peaks.link(config, device) if context.place.world > 1 else None,
    }
    return {name: peak for name, peak in found.items() if peak}


def _measured(
    config: schema.Config, context: Context, task: schema.Ops, flops: float, most: dict[str, Peak]
) -> Iterator[Timed]:
    model, device = config.model, context.device
    assert isinstance(model, schema.Transformer)
    rate = {name: peak.per_s for name, peak in most.items()}
    memory, clock = rate.get("peak_of_memory"), Clock.of(task, device)
    yield from Operators(model, config.train, clock, flops, memory).run(task.operators)
    sizes = [int(mib * 2**20) for mib in task.sizes_mib]
    if "memcpy" in task.operators:
        yield from transfers.memcpy(sizes, clock, rate.get("peak_of_host_link"), memory)
    if "collectives" in task.operators and context.place.world > 1:
        yield from transfers.exchange(sizes, Clock.of(task, device, together=True), rate.get("peak_of_links"))


def largest(config: schema.Config, task: schema.Ops) -> int:
    """Bytes of the operator that needs the most, with its copies and, for a backward pass, as much again."""
    model, train = config.model, config.train
    assert isinstance(model, schema.Transformer)
    numels = [g.m * g.n + g.m * g.k + g.n * g.k for g in shapes.gemms(model, train)]
    numels += [3 * rows * columns for rows, columns, _ in shapes.softmaxes(model, train)]
    sizes = [4 * numel for numel in numels] + [3 * int(mib * 2**20) for mib in task.sizes_mib]
    return 2 * (max(sizes) + COLD_BYTES)
