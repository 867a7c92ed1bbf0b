"""Many small cards against a few large ones, as Markdown: the verdict first, then what it stands on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from llmsys import schema
from llmsys.cost.hardware import DEVICES
from llmsys.decentral.perf import Comparison, Memory
from llmsys.decentral.tables import seconds
from llmsys.table import piped


def markdown(config: schema.Config, found: Mapping[str, Comparison], samples: Mapping[str, Sequence[float]]) -> str:
    """`found` by large card; `samples` as the record has them."""
    task = config.task
    assert isinstance(task, schema.DecentralPerf)
    first = next(iter(found.values()))
    small = f"{task.small_count} {DEVICES[task.small].title}"
    what = "training" if task.train else "the forward pass"
    low, high = min(task.efficiency), max(task.efficiency)
    lines = [f"**{config.model.name}, {what}, {config.train.micro_batch} x {config.train.length} tokens**", ""]
    lines += [f"- {_verdict(small, task, name, each)}" for name, each in found.items()]
    lines += [
        f"- lines matter below {_rate(first.critical_mbit)}; equal stages would say {_rate(first.closed_mbit)}; the "
        f"longest stage is {first.uneven:.3g} times the mean",
        f"- {small}: {_held(first.small)}",
        *(f"- {task.large_count} {DEVICES[name].title}: {_held(each.large)}" for name, each in found.items()),
        "",
        f"Where a model does not fit, speeds are as if it did. Both sides reach {low:g} to {high:g} of their peaks; "
        "the numbers above are at 0.5, the table has the range.",
        "",
    ]
    rows = []
    for at, rate in enumerate(samples["curve/mbit"]):
        shares = [
            f"{samples[f'curve/{name}_low'][at]:.3g} to {samples[f'curve/{name}_high'][at]:.3g}" for name in found
        ]
        shrink = first.critical_mbit / rate
        rows.append([_rate(rate), *shares, f"{shrink:.3g} x" if shrink > 1 else "none"])
    heads = [f"of {task.large_count} {DEVICES[name].title}" for name in found]
    lines += piped(("each line", *heads, "compression for lines not to matter"), rows)
    lines += ["", *(f"- {_parity(task, name, each)}" for name, each in found.items()), ""]
    late = zip(samples["curve/delay_ms"], samples["curve/latency_ms"], strict=True)
    lines += piped(
        ("delay of each line", f"one micro-batch alone, {_rate(task.mbit)}"),
        [[f"{delay:g} ms", seconds(took / 1e3)] for delay, took in late],
    )
    return "\n".join(lines) + "\n"


def _parity(task: schema.DecentralPerf, name: str, each: Comparison) -> str:
    large, best = f"as fast as {task.large_count} {DEVICES[name].title}", max(task.efficiency)

    def at(rate: float) -> str:
        if math.isinf(rate):
            return "on no line, however much is compressed"
        return f"on lines of {_rate(rate)}, or {max(1.0, rate / task.mbit):.3g} x compression on {_rate(task.mbit)}"

    fastest = each.best_parity_mbit * best / 0.5
    return (
        f"{large}: {at(each.parity_mbit)}; at {best:g} of their peaks against {min(task.efficiency):g}: {at(fastest)}"
    )


def _verdict(small: str, task: schema.DecentralPerf, name: str, each: Comparison) -> str:
    large = f"{task.large_count} {DEVICES[name].title}"
    above = f"on lines of {_rate(each.critical_mbit)} and more" if each.critical_mbit else "on any line"
    late = f"{seconds(each.small_latency_s)} against {seconds(each.large_latency_s)}"
    line = f"{_rate(task.mbit)} and {task.delay_ms:g} ms"
    return (
        f"{small} are {each.ratio:.3f} times as fast as {large}, {above}; one micro-batch alone takes {late} (lines of "
        f"{line} between the small ones)"
    )


def _held(own: Memory) -> str:
    need = f"need {own.needs_gib:,.1f} GiB, {own.weights_gib:,.1f} of it weights, of {own.has_gib:,.1f}"
    if own.holds:
        return f"{need}; the fullest has {own.fullest_gib:,.2f} GiB: it fits"
    short = own.needs_gib - own.has_gib
    return f"{need}: **it does not fit**" + (f", {short:,.1f} GiB are missing" if short > 0 else " with any cuts")


def _rate(mbit: float) -> str:
    return f"{mbit / 1e3:.3g} Gbit/s" if mbit >= 1000 else f"{mbit:.3g} Mbit/s"
