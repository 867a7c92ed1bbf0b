"""What a record says of measured iterations, under keys of parts joined by `/`; ms and bytes are of one step.

    <variant>/iteration_ms, _p25, _p75   median over all steps, of the slowest rank, and quartiles
    <variant>/compress_ms, decompress_ms medians; 0 where nothing is, not there where nobody knows
    <variant>/exposed_ms                 what is left of the iteration without these and without `noop`'s: waiting
    <variant>/wire_bytes                 what each rank sends; `wire_ms` at the link's nominal rate
    <variant>/collectives                counted, and `buckets`
    <variant>/bound_ms                   the larger of `noop`'s iteration and wire_ms
    <variant>/over_bound_percent         of the iteration
    <variant>/recovered_percent          of what S-SGD of the same buckets takes longer than `noop`
    <variant>/predicted_ms               by `predicted`, and `error_percent` of it
    fit/<collective>/alpha_us, mbit      and fit/<method>/gamma_gb_per_s, launch_us: of the method, with its r

A variant is `<method>/bucket=...,overlap,r=...,batch=...`; before it stands the model, where there are several.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from llmsys.compress.kernels_cost import Rates
from llmsys.compress.measure.turns import COUNTED, Samples
from llmsys.compress.measure.variants import Variant
from llmsys.cost import links
from llmsys.cost.links import Line
from llmsys.schema.measured import NOOP


def measured(samples: Mapping[Variant, Samples], world: int, mbit: float | None) -> dict[str, float]:
    """Of the variants of one model. `noop` is among them for each batch."""
    compute = {v.batch: statistics.median(s.step_s) for v, s in samples.items() if v.method == NOOP}
    found: dict[str, float] = {}
    for variant, s in samples.items():
        own = _one(s, compute[variant.batch], world, mbit)
        plain = Variant("none", variant.bucket_mib, variant.overlap, _first_r(samples), variant.batch)
        if plain in samples and variant.method not in (NOOP, "none"):
            lost = statistics.median(samples[plain].step_s) - compute[variant.batch]
            own["recovered_percent"] = 100 * (1 - (own["iteration_ms"] / 1e3 - compute[variant.batch]) / lost)
        found |= {f"{variant.name}/{key}": value for key, value in own.items()}
    return found


def _first_r(samples: Mapping[Variant, Samples]) -> int:
    return next(variant.r for variant in samples if variant.method == NOOP)


def _one(s: Samples, compute_s: float, world: int, mbit: float | None) -> dict[str, float]:
    p25, p50, p75 = statistics.quantiles(s.step_s, n=4, method="inclusive")
    own = {"iteration_ms": p50 * 1e3, "iteration_ms_p25": p25 * 1e3, "iteration_ms_p75": p75 * 1e3}
    working = 0.0
    if s.compress_s:
        parts = {"compress_ms": statistics.median(s.compress_s), "decompress_ms": statistics.median(s.decompress_s)}
        working = sum(parts.values())
        own |= {key: value * 1e3 for key, value in parts.items()}
    own["exposed_ms"] = max(0.0, p50 - compute_s - working) * 1e3
    if s.buckets:
        own["buckets"] = len(s.buckets)
    if s.calls is not None:
        own["collectives"] = sum(s.calls.values()) / COUNTED
        own["wire_bytes"] = sum(links.bus_factor(kind, world) * n for kind, n in s.bytes.items()) / COUNTED
    if s.calls is not None and mbit is not None:
        own["wire_ms"] = own["wire_bytes"] * 8e-3 / mbit
        own["bound_ms"] = max(own["wire_ms"], compute_s * 1e3)
        own["over_bound_percent"] = 100 * (own["iteration_ms"] / own["bound_ms"] - 1)
    return own


def predictions(predicted_s: Mapping[Variant, float], summary: Mapping[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for variant, seconds in predicted_s.items():
        found[f"{variant.name}/predicted_ms"] = seconds * 1e3
        found[f"{variant.name}/error_percent"] = 100 * (seconds * 1e3 / summary[f"{variant.name}/iteration_ms"] - 1)
    return found


def fitted(lines: Mapping[str, Line], rates: Mapping[str, Rates]) -> dict[str, float]:
    found: dict[str, float] = {}
    for kind, line in lines.items():
        found |= {f"fit/{kind}/alpha_us": line.alpha_s * 1e6, f"fit/{kind}/mbit": 8e-6 / line.beta_s}
    for method, rate in rates.items():
        found |= {
            f"fit/{method}/gamma_gb_per_s": rate.bytes_per_s / 1e9,
            f"fit/{method}/launch_us": rate.launch_s * 1e6,
        }
    return found


def samples_ms(samples: Mapping[Variant, Samples]) -> dict[str, list[float]]:
    """The raw repeats behind every median."""
    found: dict[str, list[float]] = {}
    for variant, s in samples.items():
        for key, seconds in (("step", s.step_s), ("compress", s.compress_s), ("decompress", s.decompress_s)):
            if seconds:
                found[f"{variant.name}/{key}_ms"] = [round(x * 1e3, 4) for x in seconds]
    return found
