"""The task `decentral_perf`: many small cards against a few large ones (`llmsys.decentral.perf`).

Keys of the summary, with <large> a card; numbers without low and high are at an efficiency of 0.5 of both:

    <large>/ratio, _low, _high           throughput over the large cards', without lines; over all pairs of efficiencies
    <large>/peak_ratio                   large over small, by their peaks alone
    critical_mbit, _low, _high           the rate above which lines do not matter, by the plan; `closed_mbit` of equal
                                         stages, at an efficiency of 0.5
    uneven                               the longest stage over the mean
    small/latency_ms, <large>/latency_ms one micro-batch alone, over `task.mbit` and `task.delay_ms`
    small/..., <large>/...               has_gib, weights_gib, needs_gib, holds (0 or 1), fullest_gib
    <large>/parity_mbit                  the rate at which the small ones are as fast; not there where on no line
    <large>/best_parity_mbit             the same where they reach the highest efficiency and the large ones the lowest
    compression/<rate>mbit_x             by how much messages would have to shrink for lines not to matter

Samples: `curve/mbit`, and for each large card `curve/<large>_{low, high}` over it; `curve/latency_ms` over
`curve/delay_ms`.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from llmsys import schema
from llmsys.cost.hardware import DEVICES
from llmsys.decentral import asked, fleets, perf, perf_tables, pictures, plan_task
from llmsys.decentral.chain import Chain
from llmsys.decentral.perf import Cards, Comparison, Memory
from llmsys.files import write_atomic

if TYPE_CHECKING:
    from llmsys.context import Context

MIDDLE = 0.5
"""Of efficiencies: at which the plan is made; all others follow by proportion."""
LARGE_DELAY_MS = 0.01
"""Between large cards of a machine."""


def compare(config: schema.Config, context: Context) -> dict[str, Any]:
    """The record's summary and samples, `perf.md`, and where matplotlib is there `perf.png`."""
    task = config.task
    assert isinstance(task, schema.DecentralPerf)
    context.beat(phase="tracing the model")
    own = plan_task.chain(config)
    context.beat(phase="planning")
    small, large = cards(config, own)
    found = {}
    for name, few in large.items():
        context.beat(phase=f"{small.card.name} against {name}")
        found[name] = perf.compare(small, few, task.mbit, task.delay_ms, max(task.efficiency) / min(task.efficiency))
    first, reached = next(iter(found.values())), _Throughput(small)
    samples: dict[str, list[float]] = {"curve/mbit": [float(each) for each in task.rates_mbit]}
    for name, each in found.items():
        ratios = [
            [reached.per_s(rate, a) / (each.large_per_s * b / MIDDLE) for a, b in _pairs(task)]
            for rate in task.rates_mbit
        ]
        samples[f"curve/{name}_low"] = [min(own) for own in ratios]
        samples[f"curve/{name}_high"] = [max(own) for own in ratios]
    samples["curve/delay_ms"] = [float(each) for each in task.delays_ms]
    samples["curve/latency_ms"] = [_latency_ms(small.unlimited(), task.mbit, each) for each in task.delays_ms]
    summary = _summary(task, found, small, large)
    scale = max(task.efficiency) / MIDDLE  # lines keep up with faster cards at so many times the rate
    for name, each in found.items():
        for key, rate in (("parity_mbit", each.parity_mbit), ("best_parity_mbit", each.best_parity_mbit * scale)):
            if math.isfinite(rate):
                summary[f"{name}/{key}"] = rate
    for rate in task.rates_mbit:
        summary[f"compression/{rate:g}mbit_x"] = max(1.0, first.critical_mbit / rate)
    write_atomic(context.out / "perf.md", perf_tables.markdown(config, found, samples))
    files, notes = {"tables": "perf.md"}, {}
    try:
        lines = {key.removeprefix("curve/"): values for key, values in samples.items() if key.endswith(("low", "high"))}
        pictures.save(pictures.curves(samples["curve/mbit"], lines), context.out / "perf.png")
        files["picture"] = "perf.png"
    except ImportError:
        notes["picture"] = "none: matplotlib is missing (pip install 'llmsys[notebooks]')"
    return {"summary": summary, "samples": samples, "files": files, "notes": notes}


def cards(config: schema.Config, own: Chain) -> tuple[Cards, dict[str, Cards]]:
    """(the small cards, the large ones by name), all at the middle efficiency."""
    task = config.task
    assert isinstance(task, schema.DecentralPerf)
    work = plan_task.workload(config)

    def made(name: str, count: int, mbit: float, delay_ms: float) -> Cards:
        card = fleets.provider(name, name, 1.0, 1.0, precision=asked.precision(config), efficiency=MIDDLE)
        return Cards(own, work, card, count, mbit, delay_ms)

    small = made(task.small, task.small_count, task.mbit, task.delay_ms)
    rates = {name: DEVICES[name].gbps(task.large_count) * 8e3 for name in task.large}
    return small, {name: made(name, task.large_count, rates[name], LARGE_DELAY_MS) for name in task.large}


def _latency_ms(small: Cards, mbit: float, delay_ms: float) -> float:
    """Of one micro-batch alone, on lines of this rate and delay."""
    slow = small.at(mbit, delay_ms)
    there = slow.pipeline()
    assert there is not None, "`compare` has found one"
    return slow.latency_s(there.cuts) * 1e3


def _pairs(task: schema.DecentralPerf) -> list[tuple[float, float]]:
    return list(itertools.product(task.efficiency, task.efficiency))


class _Throughput:
    """Of the small cards, as if memory were no limit, by the rate of their lines and by their efficiency: half as
    efficient on half the rate they are half as fast, so each is asked at the middle efficiency."""

    def __init__(self, small: Cards) -> None:
        self.small = small.unlimited()
        self.known: dict[float, float] = {}

    def per_s(self, mbit: float, efficiency: float) -> float:
        rate = mbit * MIDDLE / efficiency
        if rate not in self.known:
            found = self.small.at(rate).pipeline()
            assert found is not None, "`compare` has found one"
            self.known[rate] = 1 / found.seconds
        return self.known[rate] * efficiency / MIDDLE


def _summary(
    task: schema.DecentralPerf, found: dict[str, Comparison], small: Cards, large: dict[str, Cards]
) -> dict[str, float]:
    first, low, high = next(iter(found.values())), min(task.efficiency), max(task.efficiency)
    values = {
        "uneven": first.uneven,
        "closed_mbit": first.closed_mbit,
        "critical_mbit_low": first.critical_mbit * low / MIDDLE,
        "critical_mbit": first.critical_mbit,
        "critical_mbit_high": first.critical_mbit * high / MIDDLE,
        "small/latency_ms": first.small_latency_s * 1e3,
        **_memory("small", first.small),
    }
    for name, each in found.items():
        peaks = large[name].card.flops * task.large_count / (small.card.flops * task.small_count)
        values |= {
            f"{name}/peak_ratio": peaks,
            f"{name}/ratio_low": each.ratio * low / high,
            f"{name}/ratio": each.ratio,
            f"{name}/ratio_high": each.ratio * high / low,
            f"{name}/latency_ms": each.large_latency_s * 1e3,
            **_memory(name, each.large),
        }
    return values


def _memory(name: str, own: Memory) -> dict[str, float]:
    values = {
        f"{name}/has_gib": own.has_gib,
        f"{name}/weights_gib": own.weights_gib,
        f"{name}/needs_gib": own.needs_gib,
        f"{name}/holds": int(own.holds),
    }
    return values if own.fullest_gib is None else {**values, f"{name}/fullest_gib": own.fullest_gib}
