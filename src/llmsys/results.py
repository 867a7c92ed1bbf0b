"""The only reader of records: tables, pictures and data frames of everything under a folder.

    python -m llmsys.results [FOLDER] [--over-seeds [--best accuracy]] [--markdown | --csv] [--plot x:y]

Runs that failed or ran out of memory keep their row. Records of one data set whose content differs are marked.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsys.job import Record

if TYPE_CHECKING:
    import pandas

SHARED_KEYS = (
    *("accuracy", "macro_f1", "loss", "tokens_per_s", "samples_per_s", "step_ms_p50", "peak_gib", "reserved_gib"),
    *("host_peak_gib", "saved_bytes", "accounted_bytes", "trainable_params", "total_params"),
    *("predicted_peak_gib", "predicted_step_ms"),
)
"""Summary keys that tasks share, spelled once."""

Row = dict[str, Any]
"""One line of a table: what identifies a run, and its summary under the summary's own keys."""

IDENTITY = ("experiment", "model", "data", "data_hash", "method", "r", "lr", "seed", "status", "reason")


def read(root: str | Path) -> list[Record]:
    """All records under `root`, in the order of their paths. ValueError if there is no such folder or no record."""
    folder = Path(root)
    if not folder.is_dir():
        raise ValueError(f"{root}: no such folder")
    records = [Record.read(path.parent) for path in sorted(folder.rglob("record.json"))]
    if not records:
        raise ValueError(f"{root}: no record.json below it; runs write them to results/<experiment>/<run id>/")
    return [record for record in records if record is not None]


def load(root: str | Path = "results") -> pandas.DataFrame:
    """All records under `root` as a data frame: identity, summary, and the whole config as `config.<key>` columns."""
    import pandas

    return pandas.DataFrame([{**row(r), "run_id": r.run_id, **_flat(r.config, "config.")} for r in read(root)])


def row(record: Record) -> Row:
    """One record as a line of a table. `lr` is the rate that this run's method was trained at."""
    config, method = record.config, record.config["method"]
    rate = config["train"]["lr_by_method"].get(method["kind"])
    return {
        "experiment": record.name,
        "model": config["model"]["name"],
        "data": config["data"]["kind"],
        "data_hash": record.data_hash,
        "method": method["kind"],
        "r": method.get("r"),
        "lr": rate * config["train"]["lr_scale"] if rate is not None and method["kind"] in _TRAINED else None,
        "seed": config["train"]["seed"],
        "status": record.status,
        "reason": record.reason,
        **record.summary,
    }


_TRAINED = ("full", "lora_peft", "lorafa_peft")
"""Methods that have a learning rate."""


def _flat(values: dict[str, Any], prefix: str) -> Row:
    out: Row = {}
    for key, value in values.items():
        out.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return out


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """Runs that differ in the seed only, as one row: means, deviations under `<key>_sd`, their number as `seeds`."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for each in rows:
        groups.setdefault(tuple(each[key] for key in IDENTITY if key != "seed"), []).append(each)
    merged = []
    for members in groups.values():
        mean: Row = {key: members[0][key] for key in IDENTITY} | {"seed": None, "seeds": len(members)}
        for key in set.intersection(*(set(member) for member in members)) - set(IDENTITY):
            values = [member[key] for member in members]
            mean[key] = statistics.fmean(values)
            mean[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0
        merged.append(mean)
    return merged


def best(rows: Sequence[Row], key: str) -> list[Row]:
    """For each experiment and method the row with the best `key`: the largest, for losses and times the smallest."""
    sign = -1 if any(word in key for word in ("loss", "_ms", "bytes", "gib", "perplexity")) else 1
    chosen: dict[tuple[Any, ...], Row] = {}
    for each in rows:
        place = (each["experiment"], each["model"], each["data"], each["method"])
        if key in each and (place not in chosen or sign * each[key] > sign * chosen[place][key]):
            chosen[place] = each
    if not chosen:
        raise ValueError(f"--best {key}: no record has it; there are {', '.join(_numbers(rows))}")
    return list(chosen.values())


def _numbers(rows: Iterable[Row]) -> list[str]:
    return sorted({key for each in rows for key in each if key not in IDENTITY})


@dataclass(frozen=True)
class Column:
    """A column of the table: shown if any row has its value."""

    header: str
    text: Callable[[Row], str | None]


def _number(header: str, key: str, form: str, scale: float = 1.0) -> Column:
    return Column(header, lambda row: form.format(row[key] * scale) if row.get(key) is not None else None)


def _accuracy(row: Row) -> str | None:
    if "accuracy" not in row:
        return None
    if "seeds" in row:
        return f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_sd']:.1f} ({row['seeds']} seeds)"
    return f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_se']:.1f}"


def _columns(rows: Sequence[Row]) -> list[Column]:
    """What tells the rows apart first, then what they cost and reach."""
    identity = [key for key in ("experiment", "model", "data", "seed") if len({each[key] for each in rows}) > 1]
    hashes = {(each["data"], each["data_hash"]) for each in rows if each["data_hash"]}
    if len(hashes) > len({data for data, _ in hashes}):
        identity.append("data_hash")
    rates: dict[str, set[Any]] = {}
    for each in rows:
        rates.setdefault(each["method"], set()).add(each["lr"])
    mib = 1 / 2**20
    columns = [Column(key, lambda row, key=key: None if row[key] is None else str(row[key])) for key in identity]  # type: ignore[misc]
    columns += [Column("method", lambda row: row["method"] + (f" r={row['r']}" if row["r"] else ""))]
    columns += [_number("lr", "lr", "{:.1e}")] if any(len(values) > 1 for values in rates.values()) else []
    columns += [
        Column("status", lambda row: None if row["status"] == "ok" else f"{row['status']} ({row['reason']})"),
        _number("trainable parameters", "trainable_params", "{:,.0f}"),
        _number("saved tensors MiB", "saved_bytes", "{:,.1f}", mib),
        _number("accounted memory MiB", "accounted_bytes", "{:,.1f}", mib),
        _number("peak GiB", "peak_gib", "{:.2f}"),
        _number("peak RSS MiB", "host_peak_gib", "{:,.0f}", 1024),
        _number("step ms", "step_ms_p50", "{:,.1f}"),
        _number("samples/s", "samples_per_s", "{:,.1f}"),
        _number("tokens/s", "tokens_per_s", "{:,.0f}"),
    ]
    if any("accuracy" in each for each in rows):
        columns = [column for column in columns if column.header != "tokens/s"]
        spread = "sd" if any("seeds" in each for each in rows) else "SE"
        columns += [Column(f"accuracy % ± {spread}", _accuracy), _number("macro-F1 %", "macro_f1", "{:.1f}", 100)]
    if any("perplexity" in each for each in rows):
        columns += [_number("val loss", "val_loss", "{:.4f}"), _number("perplexity", "perplexity", "{:.2f}")]
    return columns


def _order(each: Row) -> tuple[Any, ...]:
    quality = (-each.get("accuracy", 0.0), each.get("val_loss", 0.0))
    return (each["status"] != "ok", *quality, each["method"], each["seed"] or 0)


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers with units, and cells: best accuracy (else lowest validation loss) first, runs that failed last."""
    ordered = sorted(rows, key=_order)
    filled = [(column.header, [column.text(each) for each in ordered]) for column in _columns(ordered)]
    filled = [(header, cells) for header, cells in filled if any(cells)]
    lines = [[cells[index] or "–" for _, cells in filled] for index in range(len(ordered))]
    return [header for header, _ in filled], lines


def markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    headers, lines = table(rows)
    rule = ["---" if index == 0 else "---:" for index in range(len(headers))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headers, rule, *lines])


def to_csv(rows: Sequence[Row]) -> str:
    """Every value under its own key, unrounded."""
    keys = [*IDENTITY, *_numbers(rows)]
    out = io.StringIO()
    writer = csv.DictWriter(out, keys, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def show(records: Sequence[Record]) -> None:
    """Prints the table of `records` to standard output."""
    if records:
        _print([row(record) for record in records])


def _print(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    headers, lines = table(rows)
    pretty = Table()
    for index, header in enumerate(headers):
        pretty.add_column(header, justify="left" if index == 0 else "right")
    for line in lines:
        pretty.add_row(*line)
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.measure(pretty).maximum, 200))
    console.print(pretty)


def plot(rows: Sequence[Row], x: str, y: str, path: Path) -> None:
    """A picture of summary key `y` over `x`, one labelled point a row, with standard errors or deviations as bars."""
    from llmsys.plot import scatter

    there = [each for each in rows if x in each and y in each]
    if not there:
        raise ValueError(f"--plot {x}:{y}: no record has both; there are {', '.join(_numbers(rows))}")
    scatter(there, x, y, path)


def main() -> None:
    """`python -m llmsys.results`."""
    parser = argparse.ArgumentParser(prog="python -m llmsys.results", description="Tables and pictures of records.")
    parser.add_argument("root", nargs="?", default="results", help="a folder with runs below it (default: results)")
    parser.add_argument("--over-seeds", action="store_true", help="one row per group of seeds: mean ± sd")
    parser.add_argument("--best", metavar="KEY", help="of each method only the row with the best KEY, e.g. accuracy")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="the table as Markdown")
    form.add_argument("--csv", action="store_true", help="every value, unrounded, as CSV")
    parser.add_argument("--plot", metavar="X:Y", help="a picture of Y over X, e.g. accounted_bytes:accuracy")
    parser.add_argument("--out", type=Path, help="where the picture goes (default: <root>/<X>-<Y>.png)")
    arguments = parser.parse_args()
    try:
        rows = [row(record) for record in read(arguments.root)]
        rows = over_seeds(rows) if arguments.over_seeds else rows
        rows = best(rows, arguments.best) if arguments.best else rows
        if arguments.plot:
            x, colon, y = arguments.plot.partition(":")
            if not colon:
                raise ValueError(f"--plot {arguments.plot}: must be X:Y, e.g. accounted_bytes:accuracy")
            path = arguments.out or Path(arguments.root) / f"{x}-{y}.png"
            plot(rows, x, y, path)
            print(path)
        elif arguments.markdown or arguments.csv:
            print(markdown(rows) if arguments.markdown else to_csv(rows), end="\n" if arguments.markdown else "")
        else:
            _print(rows)
    except (ValueError, json.JSONDecodeError) as error:
        sys.exit(f"llmsys.results: {error}")


if __name__ == "__main__":
    main()
