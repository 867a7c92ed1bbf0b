"""Charts of served loads: distributions of latencies, and throughput with what was predicted of it.

Each function reads nothing but its argument and returns a figure that no window or global state knows of. ValueError
where there is nothing to draw.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmsys.bench.serve import tables
from llmsys.job import Record
from llmsys.spread import spread

PANELS = {"ttft_ms": "first token", "tpot_ms": "per token behind it", "e2e_ms": "whole request"}


def same_load(records: Sequence[Record]) -> list[Record]:
    """Of the load that most servers were put under, the newest record of each: the same model, requests and arrivals.
    ValueError where there is none."""
    loads: dict[str, dict[str, Record]] = {}
    own = [record for record in records if record.task == "bench_serve" and record.status == "ok"]
    for record in sorted(own, key=lambda each: each.started):
        if record.config["server"]["kind"] != "stub":
            load = {key: each for key, each in record.config["task"].items() if key not in ("repeats", "speeds")}
            where = [record.env.get(key) for key in ("host", "device_name")]
            key = json.dumps([load, record.config["model"], where], sort_keys=True)
            loads.setdefault(key, {})[_name(record)] = record
    if not loads:
        raise ValueError("no record of bench_serve: python -m llmsys +exp=bench_serve_compare")
    return [*max(loads.values(), key=len).values()]


def latencies(records: Sequence[Record]) -> Any:
    """The share of requests whose latency is no more than that, of each server."""
    from matplotlib.ticker import NullFormatter

    figure, panels = _figure(10.5, 3.8, len(PANELS))
    for axes, (key, title) in zip(panels, PANELS.items(), strict=True):
        for record in records:
            values = np.sort(record.samples.get(key, []))  # of one token a request there is no time between two
            axes.step(values, 100 * np.arange(1, len(values) + 1) / len(values), where="post", label=_name(record))
        axes.set_xlabel(f"{title} (ms)")
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())  # over less than a decade they would lie one on the other
        axes.set_ylabel("share of requests (%)")
        axes.set_ylim(0, 100)
        axes.grid(alpha=0.3)
    panels[-1].legend(fontsize=8)
    figure.suptitle(_title(records[0]), fontsize=9)
    return figure


def throughput(records: Sequence[Record]) -> Any:
    """Tokens out a second: the mean of repeats with its 95 % interval, each repeat as a point, the prediction as a
    line; and the share of the memory's bandwidth that this is."""
    figure, (speeds, shares) = _figure(10.5, 3.8, 2)
    for at, record in enumerate(records):
        values = record.samples["output_tokens_per_s"]
        over = spread(values)
        speeds.bar(at, over.mean, yerr=over.half, capsize=4, width=0.6, color=f"C{at}", alpha=0.7)
        speeds.plot([at] * len(values), values, ".", color="black", markersize=4)
        if (predicted := record.summary.get("predicted/output_tokens_per_s")) is not None:
            speeds.plot([at - 0.4, at + 0.4], [predicted] * 2, "--", color="black", label="" if at else "predicted")
        if (reached := record.summary.get("bandwidth_percent")) is not None:  # not of a server that runs elsewhere
            shares.bar(at, reached, width=0.6, color=f"C{at}", alpha=0.7)
    for axes, label in ((speeds, "tokens/s out"), (shares, "share of the memory's bandwidth (%)")):
        axes.set_xticks(range(len(records)), [_name(each) for each in records], fontsize=8)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3, axis="y")
    if speeds.get_legend_handles_labels()[1]:
        speeds.legend(fontsize=8)
    figure.suptitle(_title(records[0]), fontsize=9)
    return figure


def _name(record: Record) -> str:
    return tables.server(record.config["server"]).replace("_", " ")


def _title(record: Record) -> str:
    task, model = record.config["task"], record.config["model"]
    how = f"{task['concurrency']} at a time" if task["arrivals"] == "concurrency" else task["arrivals"]
    return (f"{model['name']}, {task['requests']} requests ({how}) of {task['prompt_tokens']} tokens in and "
            f"{task['output_tokens']} out")  # fmt: skip


def _figure(width: float, height: float, count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, count)
