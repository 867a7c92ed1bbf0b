"""What compressed gradients have to reach on real links, and what the records of the measurements say.

    python benchmarks/compress_targets.py [FOLDER]      of all records below FOLDER, or below `records/`

The measurements are experiments, whose variants take turns within one run, and a count of bytes:

    python -m llmsys -m +exp=compress_iteration network=eth100m,eth1g,eth10g [train.world=2 train.global_batch=2]
    python -m llmsys -m +exp=compress_replay network=eth100m,eth1g
    python benchmarks/compress_memory.py

A cell is one method with its settings on one link. Where a method was measured with several sizes of buckets, what
stands here is its best. Ratios are between medians within one round of a run, and the median over its rounds is quoted
with a 95 % bootstrap interval. The bound of a cell is the larger of what is computed without any exchange and of what
is sent at the link's nominal rate; the cost model is held against cells that the link bounds.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import compress_memory
import side_by_side
from llmsys import results
from llmsys.compress.measure import figures, tables
from llmsys.compress.measure.variants import WHOLE_MIB, Variant
from llmsys.job import Record
from llmsys.schema.measured import NOOP

TASKS = ("compress_iteration", "compress_replay")
OURS = ("none", "acpsgd")
STACK = {"subject": "stack", "layers": 8, "width": 768}
"""The 18.9 MB of gradients of which ratios were asked."""
R, BATCH = 4, 32
ASKED = {("none", "eth100m", 4): 30.0, ("none", "eth1g", 4): 4.0, ("powersgd", "eth1g", 4): 1.4}
"""(method, link, ranks) -> how many times longer than ACP-SGD it has to take."""


@dataclass(frozen=True)
class Cell:
    """`run`: one run and model, within which cells may be compared. `rounds_ms`: medians of each round."""

    run: str
    record: Record
    model: str
    variant: Variant
    row: Mapping[str, float]
    rounds_ms: Sequence[float]
    noop_ms: float

    @property
    def network(self) -> str:
        return str(self.record.config["network"]["name"])

    @property
    def where(self) -> str:
        said = [self.record.name, self.model, self.network, f"{self.record.world} ranks"]
        return " ".join(word for word in said if word)

    @property
    def link_bound(self) -> bool:
        return self.row.get("wire_ms", 0.0) > self.noop_ms

    def __str__(self) -> str:
        v = self.variant
        size = "one bucket" if v.bucket_mib >= WHOLE_MIB else f"{v.bucket_mib:g} MiB"
        said = [v.method, *([f"r={v.r}"] if v.low_rank else []), size]
        return f"{self.where}, {' '.join(said)}"


@dataclass(frozen=True)
class Line:
    """One figure: what was asked for, and what came out of it. `met` is None where nothing was asked."""

    what: str
    asked: str
    found: str
    met: bool | None = None


def cells(records: Sequence[Record]) -> list[Cell]:
    """Of the measured iterations among `records`; those whose links could not be shaped are left out."""
    found = []
    for record in records:
        if record.task not in TASKS or record.status != "ok" or not record.env.get("network", {}).get("shaped", True):
            continue
        each_round = record.config["task"]["steps"] // 2
        for model, rows in tables.cells(record.summary).items():
            medians = {Variant.parse(name): row["iteration_ms"] for name, row in rows.items()}
            for name, row in rows.items():
                variant = Variant.parse(name)
                pairs = record.samples[f"{model}/{name}/pair_ms" if model else f"{name}/pair_ms"]
                rounds = [statistics.median(pairs[i : i + each_round]) for i in range(0, len(pairs), each_round)]
                noop = figures.noop_s(medians, variant)
                found.append(Cell(f"{record.run_id}/{model}", record, model, variant, row, rounds, noop))
    return found


def lines(records: Sequence[Record]) -> list[Line]:
    """The table, figure by figure; those that no record has are left out."""
    every = cells(records)
    stack = [cell for cell in every if _stack(cell)]
    ours = [cell for cell in every if "error_percent" in cell.row]
    return [
        *_collectives(every),
        *_bounds(every),
        *_ratios(stack),
        *_recovered(stack),
        *_errors("paced replay against the simulator", [c for c in ours if c.record.task == "compress_replay"]),
        *_errors("cost model against iterations", [c for c in ours if c.record.task == "compress_iteration"]),
        *_memory(records),
    ]


def _stack(cell: Cell) -> bool:
    """Not of the ablation, which has other sizes of buckets than each method's best."""
    task, variant = cell.record.config["task"], cell.variant
    alike = cell.record.name == "compress_iteration" and all(task[key] == value for key, value in STACK.items())
    right = variant.overlap and variant.batch == BATCH and (variant.r == R or not variant.low_rank)
    return alike and right and variant.method != NOOP


def _collectives(every: Sequence[Cell]) -> Iterator[Line]:
    found = [c.row["collectives"] / c.row["buckets"] for c in every if c.variant.method == "acpsgd"]
    if found:
        text = f"{min(found):g} to {max(found):g}" if min(found) < max(found) else f"{found[0]:g}"
        yield Line("collectives a bucket and step, ACP-SGD", "1", f"{text} ({len(found)} cells)", set(found) == {1.0})


def _bounds(every: Sequence[Cell]) -> Iterator[Line]:
    """Each cell of the two methods at 4 ranks, with its best buckets."""
    groups: dict[tuple[str, str, int, int], list[Cell]] = {}
    for cell in every:
        v = cell.variant
        if v.method in OURS and v.overlap and cell.network in ("eth100m", "eth1g") and cell.record.world == 4:
            groups.setdefault((cell.run, v.method, v.r * v.low_rank, v.batch), []).append(cell)
    for group in groups.values():
        best = min(group, key=lambda c: c.row["over_bound_percent"])
        over, by = best.row["over_bound_percent"], "link" if best.link_bound else "computation"
        yield Line(f"(T - bound) / bound: {best}", "15 % or less", f"{over:.1f} %, bound by {by}", over <= 15)


def _ratios(stack: Sequence[Cell]) -> Iterator[Line]:
    for run in dict.fromkeys(cell.run for cell in stack):
        here = [cell for cell in stack if cell.run == run]
        acp = _best(here, "acpsgd")
        for method in ("none", "fp16", "torch_powersgd", "powersgd"):
            theirs = _best(here, method)
            if theirs is None or acp is None:
                continue
            each = [a / b for a, b in zip(theirs.rounds_ms, acp.rounds_ms, strict=True)]
            low, middle, high = side_by_side.median_interval(each)
            asked = ASKED.get((method, acp.network, acp.record.world))
            yield Line(
                f"{theirs} / ACP-SGD {acp.variant.bucket_mib:g} MiB",
                f"{asked:g}x or better" if asked else "",
                f"{middle:.2f}x ({low:.2f} to {high:.2f})",
                middle >= asked if asked else None,
            )


def _best(found: Sequence[Cell], method: str) -> Cell | None:
    return min((c for c in found if c.variant.method == method), key=lambda c: c.row["iteration_ms"], default=None)


def _recovered(stack: Sequence[Cell]) -> Iterator[Line]:
    for run in dict.fromkeys(cell.run for cell in stack):
        acp = _best([cell for cell in stack if cell.run == run], "acpsgd")
        if acp is None or "recovered_percent" not in acp.row:
            continue
        share, asked = acp.row["recovered_percent"], acp.network == "eth1g" and acp.record.world == 4
        what = f"recovered by ACP-SGD of what S-SGD loses: {acp.where}"
        yield Line(what, "85 % or more" if asked else "", f"{share:.1f} %", share >= 85 if asked else None)


def _errors(what: str, found: Sequence[Cell]) -> Iterator[Line]:
    """Errors of the predictions of cells that the link bounds, and of the others, of which nothing was asked."""
    for kind, asked in (("link", "within 10 %"), ("computation", "")):
        group = [cell for cell in found if cell.link_bound == (kind == "link")]
        if group:
            size = {id(cell): abs(cell.row["error_percent"]) for cell in group}
            worst = max(group, key=lambda cell: size[id(cell)])
            inside = sum(value <= 10 for value in size.values())
            text = f"{inside} of {len(group)} cells; mean {statistics.fmean(size.values()):.1f} %, "
            text += f"worst {worst.row['error_percent']:+.1f} % ({worst})"
            yield Line(f"{what}, bound by the {kind}", asked, text, inside == len(group) if asked else None)


def _memory(records: Sequence[Record]) -> Iterator[Line]:
    for record in records:
        if record.name == compress_memory.NAME and record.status == "ok":
            for subject, copies in compress_memory.by_subject(record).items():
                what = f"extra memory over DDP, {record.world} ranks: {subject}"
                most = compress_memory.MOST
                yield Line(what, f"{most:g} copies of the gradients or less", f"{copies:.2f} copies", copies <= most)


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
