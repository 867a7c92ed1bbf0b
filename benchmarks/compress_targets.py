"""What compressed gradients have to reach on real links, and what the records of the measurements say.

    python benchmarks/compress_targets.py [FOLDER]      of all records below FOLDER, or below `records/`

The measurements are experiments, whose variants take turns within one run:

    python -m llmsys -m +exp=compress_iteration network=eth100m,eth1g,eth10g [train.world=2 train.global_batch=2]
    python -m llmsys -m +exp=compress_replay network=eth100m,eth1g

A cell is one method with its settings on one link. It is bound by the link where what it sends takes longer at the
link's nominal rate than everything that is computed without any exchange. Where a method was measured with several
sizes of buckets, ratios are between each method's best.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import side_by_side
from llmsys import results
from llmsys.compress.measure import tables
from llmsys.compress.measure.variants import Variant
from llmsys.job import Record

TASKS = ("compress_iteration", "compress_replay")
OURS = ("none", "acpsgd")
R = 4


@dataclass(frozen=True)
class Cell:
    """`where`: experiment, model, link and number of ranks."""

    where: str
    network: str
    world: int
    variant: Variant
    row: Mapping[str, float]
    steps_ms: Sequence[float]
    noop_ms: float

    @property
    def link_bound(self) -> bool:
        return self.row.get("wire_ms", 0.0) > self.noop_ms

    def __str__(self) -> str:
        v = self.variant
        said = [v.method, *([f"r={v.r}"] if v.low_rank else []), f"{v.bucket_mib:g} MiB"]
        return f"{self.where}, {' '.join(said)}"


@dataclass(frozen=True)
class Line:
    """One figure: what was asked for, and what came out of it. `met` is None where nothing was asked."""

    what: str
    asked: str
    found: str
    met: bool | None


def cells(records: Sequence[Record]) -> list[Cell]:
    """Of the measured iterations among `records`."""
    found = []
    for record in records:
        if record.task not in TASKS or record.status != "ok":
            continue
        network = record.config["network"]["name"]
        for model, rows in tables.cells(record.summary).items():
            noop = {Variant.parse(n).batch: row["iteration_ms"] for n, row in rows.items() if n.startswith("noop/")}
            for name, row in rows.items():
                variant = Variant.parse(name)
                key = f"{model}/{name}" if model else name
                where = f"{record.name} {model} {network} {record.world} ranks".replace("  ", " ")
                samples = record.samples[f"{key}/step_ms"]
                found.append(Cell(where, network, record.world, variant, row, samples, noop[variant.batch]))
    return found


def lines(records: Sequence[Record]) -> list[Line]:
    """The table, figure by figure; those that no record has are left out."""
    every = cells(records)
    stack = [cell for cell in every if cell.where.startswith("compress_iteration") and cell.variant.r == R]
    return [
        *_collectives(every),
        *_bounds(every),
        *_ratios(stack),
        *_recovered(stack),
        *_errors("paced replay against the simulator", [c for c in every if "replay" in c.where and _ours(c)]),
        *_errors("cost model against iterations", [c for c in every if "iteration" in c.where and _ours(c)]),
    ]


def _ours(cell: Cell) -> bool:
    return cell.link_bound and "error_percent" in cell.row


def _collectives(every: Sequence[Cell]) -> Iterator[Line]:
    found = [c.row["collectives"] / c.row["buckets"] for c in every if c.variant.method == "acpsgd"]
    if found:
        text = f"{min(found):g} to {max(found):g}" if min(found) < max(found) else f"{found[0]:g}"
        yield Line("collectives a bucket and step, ACP-SGD", "1", f"{text} ({len(found)} cells)", set(found) == {1.0})


def _bounds(every: Sequence[Cell]) -> Iterator[Line]:
    """Each link-bound cell of the two methods, at its best size of buckets."""
    bound = [c for c in every if c.link_bound and c.variant.method in OURS and c.network in ("eth100m", "eth1g")]
    groups: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in bound:
        groups.setdefault((cell.where, cell.variant.method, cell.variant.r * cell.variant.low_rank), []).append(cell)
    for group in groups.values():
        best = min(group, key=lambda c: c.row["over_bound_percent"])
        over = best.row["over_bound_percent"]
        yield Line(f"(T - bound) / bound: {best}", "15 % or less", f"{over:.1f} %", over <= 15)


def _ratios(stack: Sequence[Cell]) -> Iterator[Line]:
    asked = {("none", "eth100m", 4): 30.0, ("none", "eth1g", 4): 4.0, ("powersgd", "eth1g", 4): 1.4}
    for where in dict.fromkeys((c.where, c.network, c.world) for c in stack):
        here = [c for c in stack if c.where == where[0] and c.variant.overlap]
        for method in ("none", "fp16", "torch_powersgd", "powersgd"):
            theirs, acp = (_best(here, name) for name in (method, "acpsgd"))
            if theirs is None or acp is None:
                continue
            low, middle, high = ratio(theirs.steps_ms, acp.steps_ms)
            bound = asked.get((method, *where[1:]))
            text = f"{middle:.2f}x ({low:.2f} to {high:.2f})"
            yield Line(
                f"{theirs} / ACP-SGD {acp.variant.bucket_mib:g} MiB",
                f"{bound:g}x or better" if bound else "",
                text,
                None if bound is None else middle >= bound,
            )


def _best(found: Sequence[Cell], method: str) -> Cell | None:
    return min((c for c in found if c.variant.method == method), key=lambda c: c.row["iteration_ms"], default=None)


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """The ratio of the medians, between the ends of its 95 % bootstrap interval, by resampling both."""
    import random

    draw = random.Random(0)

    def median(values: Sequence[float]) -> float:
        return statistics.median(draw.choices(values, k=len(values)))

    drawn = sorted(median(theirs) / median(ours) for _ in range(side_by_side.RESAMPLES))
    cut = side_by_side.RESAMPLES * 25 // 1000
    return drawn[cut], statistics.median(theirs) / statistics.median(ours), drawn[-1 - cut]


def _recovered(stack: Sequence[Cell]) -> Iterator[Line]:
    for where in dict.fromkeys(c.where for c in stack):
        here = [c for c in stack if c.where == where and c.variant.overlap]
        plain, acp = _best(here, "none"), _best(here, "acpsgd")
        if plain is None or acp is None:
            continue
        lost = plain.row["iteration_ms"] - acp.noop_ms
        share = 100 * (plain.row["iteration_ms"] - acp.row["iteration_ms"]) / lost
        asked = acp.network == "eth1g" and acp.world == 4
        yield Line(
            f"recovered of what S-SGD loses: {where}",
            "85 % or more" if asked else "",
            f"{share:.1f} %",
            share >= 85 if asked else None,
        )


def _errors(what: str, found: Sequence[Cell]) -> Iterator[Line]:
    """Worst and mean error of the predictions of link-bound cells."""
    if not found:
        return
    size: Callable[[Cell], float] = lambda c: abs(c.row["error_percent"])  # noqa: E731
    worst = max(found, key=size)
    mean = statistics.fmean(map(size, found))
    inside = sum(size(c) <= 10 for c in found)
    text = f"{inside} of {len(found)} cells; mean {mean:.1f} %, worst {worst.row['error_percent']:+.1f} % ({worst})"
    yield Line(f"{what}, link-bound", "within 10 %", text, inside == len(found))


def show(found: Sequence[Line]) -> str:
    """As Markdown."""
    verdict = {True: "met", False: "**not met**", None: ""}
    rows = [["figure", "asked", "measured", ""], ["---"] * 4]
    rows += [[line.what, line.asked, line.found, verdict[line.met]] for line in found]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(arguments: Sequence[str]) -> list[Line]:
    found = lines(results.read(Path(arguments[0]) if arguments else side_by_side.RECORDS))
    print(show(found))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
