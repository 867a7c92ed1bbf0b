"""Plans against how others lay a model out, how long planning takes, and how far from a lower bound ten thousand are.

    python benchmarks/decentral_plans.py [--fleets 200] [--out DIR] [--no-large]

Training of LLaMA-2 7B in bf16 on fleets drawn by a seed (`llmsys.decentral.fleets`), in turn of data centres, clouds of
several regions and homes, of 6 to 20 providers each; micro-batches a second, with all that a step of 64 waits for: the
filling of pipelines, the sum of gradients. `ratio` is the plan's over the best of the baselines
(`llmsys.decentral.baselines`) that can hold the model; where none can, the fleet counts for `only_ours` and for no
median. Both are of 1F1B, eager or not, whichever does more, at the price of a step (`decentral.pace`), of plans chosen
by that. `played`: plans as they are chosen, their steps event by event, against the baselines that are pipelines.
Times are of this process, medians of several.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmsys import compose, schema
from llmsys.decentral import baselines, bound, fleets, shapes
from llmsys.decentral.chain import Chain
from llmsys.decentral.cost import Costs, Workload
from llmsys.decentral.plan import OF_1F1B, Planner, scheduled
from llmsys.decentral.repair import after_quit
from llmsys.job import Record
from llmsys.table import piped
from script_record import RECORDS, Script

MODEL, LENGTH = "llama2_7b", 2048
SIZES = (6, 8, 12, 16, 20)
WORK = Workload(micro_batches=64, schedule="eager_1f1b", optimizer=6.0, recompute=True)
"""bf16, with AdamW's state and weights in fp32."""
REPEATS = 5
LARGE, OPERATORS = 10_000, 40_000


def model(layers: int | None = None) -> Chain:
    """LLaMA-2 7B in bf16, one row; `layers`: as many of these."""
    config = schema.build(compose.compose(["+exp=decentral_plan", f"model={MODEL}"])).model
    assert isinstance(config, schema.Transformer)
    if layers:
        config = dataclasses.replace(config, num_layers=layers)
    return shapes.of_model(config, 1, LENGTH)


def others(planner: Planner) -> tuple[dict[str, float], float]:
    """(baseline -> micro-batches a second, of those that can hold the model, as they are priced; the shortest step of
    those that are pipelines, as it is played)."""
    costs, found, played = planner.costs, dict[str, float](), math.inf
    for name, make in baselines.PIPELINES.items():
        if (one := make(costs)) is not None:
            own = planner.made([one])
            found[name], played = own.per_s, min(played, planner.played(own).score.step_s)
    for name, spread in baselines.SWARMS.items():
        if rate := baselines.routed(costs, spread(costs)):
            found[name] = rate
    return found, played


def compared(chain: Chain, count: int) -> dict[str, list[dict[str, Any]]]:
    """Kind of fleet -> a row for each."""
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in fleets.FLEETS}
    for seed in range(count):
        kind = list(fleets.FLEETS)[seed % len(fleets.FLEETS)]
        fleet = fleets.FLEETS[kind](SIZES[seed // 3 % len(SIZES)], seed)
        named, shortest, priced, found = dict[str, float](), math.inf, 0.0, list[tuple[float, float]]()
        begin = time.perf_counter()
        planners = [Planner(Costs(chain, fleet, dataclasses.replace(WORK, schedule=name))) for name in OF_1F1B]
        for planner in planners:
            if plans := planner.ranked():
                priced = max(priced, plans[0].per_s)
                own = planner.best()
                assert own is not None
                found.append((own.score.step_s, own.per_s))
        seconds = time.perf_counter() - begin
        for planner in planners:
            theirs, played = others(planner)
            named = {key: max(theirs.get(key, 0.0), named.get(key, 0.0)) for key in {*theirs, *named}}
            shortest = min(shortest, played)
        best = max(named, key=named.__getitem__, default="")
        bounded = WORK.micro_batches / min(bound.step_s(planner.costs) for planner in planners)
        row = {
            "seed": seed,
            "providers": len(fleet),
            "per_s": priced,
            "best": best,
            "of_bound": priced / bounded if bounded else 0.0,
            "played_ratio": shortest / min(found)[0] if found and shortest < math.inf else 0.0,
        }
        rows[kind].append(row | {"baseline_per_s": named.get(best, 0.0), "plan_s": seconds})
    return rows


def timed(chain: Chain) -> dict[str, list[float]]:
    """Milliseconds to plan 50 providers, and to mend the plan after one has gone, by kind of fleet."""
    found: dict[str, list[float]] = {}
    for kind, make in fleets.FLEETS.items():
        for repeat in range(REPEATS):
            costs = Costs(chain, make(50, repeat), WORK)
            begin = time.perf_counter()
            planner = Planner(costs)
            plan = planner.best()
            found.setdefault(f"{kind}/plan_ms", []).append((time.perf_counter() - begin) * 1e3)
            if plan is None:
                continue
            gone = plan.pipelines[0].order[len(plan.pipelines[0].order) // 2]
            begin = time.perf_counter()
            after_quit(planner, plan, gone)
            found.setdefault(f"{kind}/repair_ms", []).append((time.perf_counter() - begin) * 1e3)
    return found


def large() -> dict[str, float]:
    """Ten thousand providers of each kind, and a model of forty thousand operators; 410 million tokens a step."""
    chain, found = model(OPERATORS // 55), {}
    found |= {"large/providers": LARGE, "large/operators": chain.count}
    for kind, make in fleets.FLEETS.items():
        fleet, work = make(LARGE, 0), dataclasses.replace(WORK, micro_batches=200_000)
        begin = time.perf_counter()
        planner, plan = scheduled(chain, fleet, work)
        seconds = time.perf_counter() - begin
        lazy = Costs(chain, fleet, dataclasses.replace(work, schedule="1f1b"))  # which keeps less, and so bounds both
        least = min(bound.step_s(each) for each in (planner.costs, lazy))
        found |= {
            f"large/{kind}/plan_s": seconds,
            f"large/{kind}/replicas": len(plan.pipelines),
            f"large/{kind}/used": sum(len(each.order) for each in plan.pipelines),
            f"large/{kind}/step_s": plan.score.step_s,
            f"large/{kind}/sync_s": plan.score.sync_s,
            f"large/{kind}/bound_s": least,
            f"large/{kind}/over_bound_percent": 100 * (plan.score.step_s / least - 1),
        }
    return found


def summary(rows: dict[str, list[dict[str, Any]]], times: dict[str, list[float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for kind, own in rows.items():
        ratios = [row["per_s"] / row["baseline_per_s"] for row in own if row["baseline_per_s"]]
        played = [row["played_ratio"] for row in own if row["played_ratio"]]
        held = [row for row in own if row["per_s"]]
        found |= {
            f"{kind}/fleets": len(own),
            f"{kind}/compared": len(ratios),
            f"{kind}/only_ours": sum(not row["baseline_per_s"] for row in held),
            f"{kind}/held_by_none": len(own) - len(held),
            f"{kind}/worse": sum(ratio < 1 - 1e-9 for ratio in ratios),
            f"{kind}/of_bound_median": statistics.median(row["of_bound"] for row in held) if held else 0.0,
        }
        if ratios:
            found |= {f"{kind}/ratio_median": statistics.median(ratios), f"{kind}/ratio_least": min(ratios)}
        if played:
            found |= {f"{kind}/played_median": statistics.median(played), f"{kind}/played_least": min(played)}
    return found | {key: statistics.median(values) for key, values in times.items()}


def show(record: Record) -> str:
    """One record as Markdown."""
    s = record.summary
    rows = []
    for kind in fleets.FLEETS:
        ratios = [
            f"{s[f'{kind}/{which}']:.2f}" if f"{kind}/{which}" in s else "–"
            for which in ("ratio_median", "ratio_least", "played_median", "played_least")
        ]
        counts = [f"{s[f'{kind}/{key}']:.0f}" for key in ("fleets", "compared", "only_ours", "held_by_none", "worse")]
        rows.append([kind, *counts, *ratios, f"{s[f'{kind}/of_bound_median']:.2f}"])
    heads = (
        "",
        "fleets",
        "compared",
        "only ours",
        "held by none",
        "worse",
        "over the best, median",
        "least",
        "as played, median",
        "least",
        "of the bound",
    )
    lines = piped(heads, rows)
    rows = [
        [kind, f"{s[f'{kind}/plan_ms']:.1f}", f"{s.get(f'{kind}/repair_ms', math.nan):.1f}"] for kind in fleets.FLEETS
    ]
    lines += ["", *piped(("of 50 providers", "plan ms", "repair ms"), rows)]
    if "large/providers" in s:
        heads = (f"{s['large/providers']:,.0f} providers, {s['large/operators']:,.0f} operators", "plan s", "replicas",
                 "providers used", "step s", "of which gradients", "bound s", "over it %")  # fmt: skip
        keys = ("plan_s", "replicas", "used", "step_s", "sync_s", "bound_s", "over_bound_percent")
        formats = (".1f", ",.0f", ",.0f", ",.0f", ",.0f", ",.0f", ".1f")
        rows = [
            [kind, *(format(s[f"large/{kind}/{key}"], how) for key, how in zip(keys, formats, strict=True))]
            for kind in fleets.FLEETS
        ]
        lines += ["", *piped(heads, rows)]
    return "\n".join(lines)


def main(given: Sequence[str]) -> Record:
    """Plans, compares, writes the record, prints its table, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleets", type=int, default=200)
    parser.add_argument("--layers", type=int, help="of the model; else all")
    parser.add_argument("--no-large", action="store_true")
    parser.add_argument("--out", type=Path, default=RECORDS)
    asked = parser.parse_args(given)
    script = Script("decentral_plans")
    chain = model(asked.layers)
    rows, times = compared(chain, asked.fleets), timed(chain)
    numbers = summary(rows, times) | ({} if asked.no_large else large())
    columns = {
        f"{kind}/{key}": [row[key] for row in own]
        for kind, own in rows.items()
        for key in ("per_s", "baseline_per_s", "played_ratio", "of_bound", "plan_s")
    }
    record = script.left(
        asked.out,
        f"{asked.fleets}x{chain.count}",
        config={"model": MODEL, "layers": asked.layers, "length": LENGTH, "sizes": list(SIZES), "fleets": asked.fleets,
                "best": {kind: [row["best"] for row in own] for kind, own in rows.items()}},
        summary=numbers,
        samples=columns | times,
    )  # fmt: skip
    print(show(record))
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
