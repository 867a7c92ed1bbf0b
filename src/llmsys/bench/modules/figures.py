"""What a record says of a step's modules. ms are medians over the steps with clocks of modules.

    modules/<row>/forward_ms, backward_ms, recompute_ms    recompute: forward once more, within the backward pass
    modules/<row>/ms                  all of them together; of a phase (data, agreement, communication, optimizer) all
    modules/<row>/share_percent       of the step
    modules/<row>/forward_flops, backward_flops, recompute_flops    by `llmsys.cost`, where the row has products
    modules/<row>/forward_tflops      achieved, 10**12 FLOP/s; `backward_tflops` with what is computed again, `tflops`
                                      of both passes together
    modules/<row>/peak_percent        `tflops` over `peak_tflops`
    attributed_percent                of the step: all rows but `unattributed`
    step_ms_p50                       of steps with clocks of phases, as in training; `bare_step_ms_p50` without any,
                                      `modules_step_ms_p50` with those of modules
    overhead/phases_percent           what these clocks add to a bare step: the median over rounds, and quartiles (_p25,
                                      _p75); `overhead/modules_percent` likewise, those of phases included
    peak_tflops                       of the device that ran, as in a record of training (`train.peaks`);
                                      `peak_measured` is 1 where it was measured, as the speed of a large product

Rows are `profile.taxonomy`'s.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from llmsys.cost.modules import Flops
from llmsys.profile import taxonomy
from llmsys.profile.taxonomy import KINDS, REST

BARE, PHASES, MODULES = "bare", "phases", "modules"
ARMS = (BARE, PHASES, MODULES)
"""Steps without clocks, with those of phases, and with those of modules beside them."""
Rows = Mapping[str, Mapping[str, Sequence[float]]]


def flops_by_row(products: Mapping[str, Flops], rows: Sequence[str]) -> dict[str, Flops]:
    """FLOPs of modules by name -> of the `rows` that were measured. What has no row of its own there is of the blocks,
    which then run as chains of functions, or of the head."""
    found: dict[str, Flops] = {}
    for name, flops in products.items():
        row = taxonomy.layer(name)
        if row not in rows:
            outside = row == "logits" or "." not in name  # `head`
            fitting = ("logits+loss", "logits") if outside else ("block", "convolution")
            row = next((each for each in fitting if each in rows), row)
        found[row] = found.get(row, Flops()).plus(flops)
    return found


def modules(rows: Rows, products: Mapping[str, Flops], peak: float) -> dict[str, float]:
    """`rows` of `ModuleSpans`; `peak`: FLOP/s."""
    flops = flops_by_row(products, list(rows))
    steps = [sum(kinds) for kinds in zip(*map(_all, rows.values()), strict=True)]
    found: dict[str, float] = {}
    for row, kinds in rows.items():
        mine = {f"{kind}_ms": statistics.median(kinds[kind]) for kind in KINDS if kind in kinds}
        mine["ms"] = statistics.median(_all(kinds))
        mine["share_percent"] = 100 * statistics.median(a / b for a, b in zip(_all(kinds), steps, strict=True))
        if row in flops:
            mine |= _speeds(flops[row], mine, peak)
        found |= {f"modules/{row}/{key}": value for key, value in mine.items()}
    rest = _all(rows[REST])
    shares = [1 - part / step for part, step in zip(rest, steps, strict=True)]
    return {**found, "attributed_percent": 100 * statistics.median(shares), "peak_tflops": peak / 1e12}


def _all(kinds: Mapping[str, Sequence[float]]) -> list[float]:
    """All that a row has, step by step."""
    return [sum(values) for values in zip(*kinds.values(), strict=True)]


def _speeds(flops: Flops, ms: Mapping[str, float], peak: float) -> dict[str, float]:
    found = {f"{kind}_flops": value for kind, value in zip(KINDS, flops, strict=True) if value}
    forward, backward = ms.get("forward_ms", 0.0), ms.get("backward_ms", 0.0) + ms.get("recompute_ms", 0.0)
    for key, work, time in (
        ("forward_tflops", flops.forward, forward),
        ("backward_tflops", flops.backward + flops.recompute, backward),
        ("tflops", sum(flops), forward + backward),
    ):
        if work and time:
            found[key] = work / time * 1e-9
    if "tflops" in found:
        found["peak_percent"] = 100 * found["tflops"] * 1e12 / peak
    return found


def overheads(step_ms: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of each arm's steps, round by round."""
    found = {
        "bare_step_ms_p50": statistics.median(step_ms[BARE]),
        "step_ms_p50": statistics.median(step_ms[PHASES]),
        "modules_step_ms_p50": statistics.median(step_ms[MODULES]),
    }
    for arm in (PHASES, MODULES):
        ratios = [100 * (ours / bare - 1) for ours, bare in zip(step_ms[arm], step_ms[BARE], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        found |= {f"overhead/{arm}_percent": middle}
        found |= {f"overhead/{arm}_percent_p25": low, f"overhead/{arm}_percent_p75": high}
    return found
