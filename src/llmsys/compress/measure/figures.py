"""What a record says of measured iterations, under keys of parts joined by `/`; ms and bytes are of one step.

    <variant>/iteration_ms, _p25, _p75   median over pairs of steps, of the slowest rank, and quartiles
    <variant>/compress_ms                before the collectives, in the pass's own thread; median, mean of the ranks
    <variant>/decompress_ms              after them; `decompress_exposed_ms` of that behind the backward pass
    <variant>/exposed_ms                 the rest: the iteration without `noop`'s, compress_ms and
                                         decompress_exposed_ms. Waiting for the link, and whatever else there is (a
                                         link's protocol takes the cores as well). Negative where the clocks, that run
                                         on while a rank waits for a core, have counted something twice
    <variant>/wire_bytes                 what each rank sends; `wire_ms` at the link's nominal rate
    <variant>/collectives                counted, and `buckets`
    <variant>/bound_ms                   the larger of `noop`'s iteration and wire_ms
    <variant>/over_bound_percent         of the iteration
    <variant>/recovered_percent          of what S-SGD, with its best buckets, takes longer than `noop`
    <variant>/predicted_ms               by `predicted`, and `error_percent` of it
    measured_in_attempts                 how many attempts the rounds and the fit come from
    fit/<collective>/alpha_us, mbit      and fit/<method>/gamma_gb_per_s, launch_us: of the method, with its r

A variant is `<method>/bucket=...,overlap,r=...,batch=...`; before it stands the model, where there are several. `noop`
is that of the same buckets and batch. Compression is not known of torch's hook, and of S-SGD there is none.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from llmsys.compress.kernels_cost import Rates
from llmsys.compress.measure.turns import COUNTED, Samples
from llmsys.compress.measure.variants import Variant
from llmsys.cost import links
from llmsys.cost.links import Line
from llmsys.schema.measured import NOOP, TORCH

WORTH = 0.05
"""How much longer than `noop`, at least, S-SGD takes where there is something to recover."""


def measured(samples: Mapping[Variant, Samples], world: int, mbit: float | None) -> dict[str, float]:
    """Of the variants of one model."""
    medians = {variant: statistics.median(own.pairs_s) for variant, own in samples.items()}
    found: dict[str, float] = {}
    for variant, s in samples.items():
        compute = noop_s(medians, variant)
        own = _one(variant, s, compute, world, mbit)
        plain = [t for v, t in medians.items() if v.method == "none" and v.overlap and v.batch == variant.batch]
        if plain and min(plain) > (1 + WORTH) * compute and variant.method not in (NOOP, "none"):
            own["recovered_percent"] = 100 * (min(plain) - medians[variant]) / (min(plain) - compute)
        found |= {f"{variant.name}/{key}": value for key, value in own.items()}
    return found


def noop_s(medians: Mapping[Variant, float], variant: Variant) -> float:
    """Seconds of the iteration that exchanges nothing, with the buckets and the batch of `variant`."""
    found = [t for v, t in medians.items() if v.method == NOOP and v.batch == variant.batch]
    same = [
        t for v, t in medians.items() if (v.method, v.batch, v.bucket_mib) == (NOOP, variant.batch, variant.bucket_mib)
    ]
    return (same or found)[0]


def _one(variant: Variant, s: Samples, compute_s: float, world: int, mbit: float | None) -> dict[str, float]:
    pairs = s.pairs_s
    p25, p50, p75 = statistics.quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else pairs * 3
    own = {"iteration_ms": p50 * 1e3, "iteration_ms_p25": p25 * 1e3, "iteration_ms_p75": p75 * 1e3}
    working = 0.0
    if s.compress_s:
        parts = {
            "compress_ms": statistics.median(s.compress_s),
            "decompress_ms": statistics.median(s.decompress_s),
            "decompress_exposed_ms": statistics.median(s.exposed_s),
        }
        working = parts["compress_ms"] + parts["decompress_exposed_ms"]
        own |= {key: value * 1e3 for key, value in parts.items()}
    if variant.method not in (NOOP, TORCH):
        own["exposed_ms"] = (p50 - compute_s - working) * 1e3
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
    """The raw repeats behind every median: means of pairs of steps, `task.steps` / 2 of each turn, turn by turn."""
    found: dict[str, list[float]] = {}
    for variant, s in samples.items():
        kinds = {"pair": s.pairs_s, "compress": s.compress_s, "decompress": s.decompress_s, "exposed": s.exposed_s}
        for key, seconds in kinds.items():
            if seconds:
                found[f"{variant.name}/{key}_ms"] = [round(x * 1e3, 4) for x in seconds]
    return found
