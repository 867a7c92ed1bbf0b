"""What a served load says beside its own figures: the share of its memory's bandwidth, and what was predicted of it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmsys import device, schema
from llmsys.bench.serve import figures, pace, slower, tables
from llmsys.bench.serve.load import Request
from llmsys.bench.serve.outcome import OK, Outcome
from llmsys.bench.serve.predict import Batching, predict
from llmsys.bench.serve.share import share
from llmsys.train import peaks

if TYPE_CHECKING:
    from llmsys.context import Context


def machine(
    config: schema.Config,
    context: Context,
    how: Batching | None,
    loads: Sequence[Sequence[Request]],
    measured: Sequence[Sequence[Outcome]],
    notes: dict[str, str],
) -> dict[str, float]:
    """Keys of the summary; `notes` gets where they are from. `how`: the server makes its batches, None: not known."""
    task, model = config.task, config.model
    assert isinstance(task, schema.Serve)
    assert isinstance(model, schema.Transformer)
    speeds = context.inputs.get("speeds")
    if speeds:
        own, record = pace.measured(Path(speeds), model, config.server)
        was, now = record.env.get("device_name"), device.resolve(config.hardware.device)[1]
        notes["peak_gbps"] = f"as {task.speeds} has found it: the same for all servers"
        notes["peak_gbps"] += f"; it was measured on {was}, and this is {now}" if was != now else ""
    else:
        memory, flops = peaks.measured_memory(config, context.device), peaks.peak_flops(config, context.device)
        own = pace.Pace(model=model, flops_per_s=flops.per_s, bytes_per_s=memory.per_s)
        notes["peak_gbps"] = memory.source
        notes["predicted"] = f"at best, each pass on its roofline: {flops.source}; {memory.source}"
    shares = [share(one, model, how) / own.bytes_per_s for one in measured]
    found = {"bandwidth_percent": 100 * statistics.fmean(shares), "peak_gbps": own.bytes_per_s / 1e9}
    if how is None:
        notes["predicted"] = "nothing: server.sequences and server.pass_tokens say how it makes its batches"
        return found
    how = dataclasses.replace(how, under_way=task.concurrency)
    if speeds:
        if all(each.status == OK for one in measured for each in one):
            factor = slower.of_loads(loads, measured, own, how)
            found |= {} if factor is None else {slower.KEY: factor}
        own, notes["predicted"] = _passes(config, context, own, how)
    said = figures.together([predict(each, own, how) for each in loads], task)
    return {**found, **{f"predicted/{key}": said[key] for key in tables.PREDICTED if key in said}}


def _passes(config: schema.Config, context: Context, measured: pace.Pace, how: Batching) -> tuple[pace.Pace, str]:
    """Those by which a load is predicted, and where they are from."""
    task = config.task
    assert isinstance(task, schema.Serve)
    said = f"by the passes of {task.speeds}, and nothing between them"
    if served := context.inputs.get("served"):
        known = slower.of_record(Path(served), config)
        measured = dataclasses.replace(measured, slower=known.factor)
        said = (f"by the passes of {task.speeds}, {known.factor:.3g} times as long, as {task.served} has found of this "
                f"server with {known.under_way} requests under way")  # fmt: skip
    most = min(how.sequences, task.concurrency or how.sequences)
    if measured.sequences is not None and most > measured.sequences:
        said += (f"; no more than {measured.sequences} sequences at a time were measured there, and what more of them "
                 "take goes by their rooflines")  # fmt: skip
    return measured, said
