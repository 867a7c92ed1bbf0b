"""Lines as a table: which columns, in what order and unit; for the terminal, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llmsys.revisions import mixed
from llmsys.rows import IDENTITY, Row, numbers, settings


@dataclass(frozen=True)
class Column:
    """A column of the table: shown if any row has its value."""

    header: str
    text: Callable[[Row], str | None]


def _number(header: str, key: str, form: str, scale: float = 1.0) -> Column:
    return Column(
        header,
        lambda row: form.format(row[key] * scale if scale != 1 else row[key]) if row.get(key) is not None else None,
    )


def _plain(key: str) -> Column:
    return Column(key, lambda row: None if row[key] is None else str(row[key]))


def _setting(key: str) -> Column:
    return Column(key, lambda row: str(row["config"][key]) if key in row["config"] else None)


def _accuracy(row: Row) -> str | None:
    if "accuracy" not in row:
        return None
    if "seeds" in row:
        return f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_sd']:.1f} ({row['seeds']} seeds)"
    return f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_se']:.1f}"


def _method(each: Row) -> str:
    """With the width of adapters; and marked where every linear layer is frozen, and nothing else said so."""
    base = each["method"] == "full" and each.get("linear_weights_trained", 1) == 0
    return f"{each['method']}" + (f" r={each['r']}" if each["r"] else "") + (" (base frozen)" if base else "")


def _status(each: Row) -> str:
    if each["status"] != "ok":
        return f"{each['status']} ({each['reason']})"
    return "ok" if each["resumed"] is None else f"ok, timed from step {each['resumed']}"


def _identity(rows: Sequence[Row]) -> list[Column]:
    """What tells the rows apart: columns that differ, and settings that differ among rows alike in these."""
    distinct = ("experiment", "model", "data", "device", "engine", "network", "compress", "techniques", "recompute")
    names = [key for key in (*distinct, "seed", "repeat") if len({each[key] for each in rows}) > 1]
    hashes = {(each["data"], each["data_hash"]) for each in rows if each["data_hash"]}
    if len(hashes) > len({data for data, _ in hashes}):
        names.append("data_hash")
    if any("repeats" in each for each in rows) and len({each.get("code_hash", "") for each in rows}) > 1:
        names.append("code_hash")  # then a cell can have a row for each code
    columns = [_plain(key) for key in names]
    alike: dict[tuple[Any, ...], list[dict[str, str]]] = {}
    for each in rows:
        shown = (
            "experiment",
            "model",
            "data",
            "engine",
            "network",
            "compress",
            "techniques",
            "recompute",
            "method",
            "r",
        )
        place = tuple(each[key] for key in shown)
        alike.setdefault(place, []).append(settings(each, seed=False))
    varying = {
        key for group in alike.values() for one in group for key in one if any(one[key] != o.get(key) for o in group)
    }
    return columns + [_setting(key) for key in sorted(varying)]


def _columns(rows: Sequence[Row]) -> list[Column]:
    """What tells the rows apart first, then what they cost and reach."""
    columns = _identity(rows)
    rates: dict[str, set[Any]] = {}
    for each in rows:
        rates.setdefault(each["method"], set()).add(each["lr"])
    mib = 1 / 2**20
    columns += [Column("method", _method)]
    columns += [_number("lr", "lr", "{:.1e}")] if any(len(values) > 1 for values in rates.values()) else []
    columns += [
        *([Column("status", _status)] if any(_status(row) != "ok" for row in rows) else []),
        _number("trainable parameters", "trainable_params", "{:,.0f}"),
        _number("saved tensors MiB", "saved_bytes", "{:,.1f}", mib),
        _number("accounted memory MiB", "accounted_bytes", "{:,.1f}", mib),
        _number("peak GiB", "peak_gib", "{:.2f}"),
        _number("peak RSS MiB", "host_peak_gib", "{:,.0f}", 1024),
        _number("exchanged MiB/step", "comm_bytes", "{:,.1f}", mib),
        _number("step ms", "step_ms_p50", "{:,.1f}"),
        _number("samples/s", "samples_per_s", "{:,.1f}"),
        _number("tokens/s", "tokens_per_s", "{:,.0f}"),
        _number("requests/s", "requests_per_s", "{:,.2f}"),
        _number("tokens out/s", "output_tokens_per_s", "{:,.1f}"),
        _number("± %", "output_tokens_per_s_half_percent", "{:,.1f}"),
        _number("first token p50 ms", "ttft_ms_p50", "{:,.1f}"),
        _number("p99 ms", "ttft_ms_p99", "{:,.1f}"),
        _number("per token p50 ms", "tpot_ms_p50", "{:,.2f}"),
        _number("% of memory's bandwidth", "bandwidth_percent", "{:.1f}"),
        *_spread(rows),
    ]
    if any("accuracy" in each for each in rows):
        columns = [column for column in columns if column.header != "tokens/s"]
        spread = "sd" if any("seeds" in each for each in rows) else "SE"
        columns += [Column(f"accuracy % ± {spread}", _accuracy), _number("macro-F1 %", "macro_f1", "{:.1f}", 100)]
    if any("perplexity" in each for each in rows):
        columns += [_number("val loss", "val_loss", "{:.4f}"), _number("perplexity", "perplexity", "{:.2f}")]
    columns += [_number("BLEU", "bleu", "{:.1f}"), _number("ROUGE-L", "rougeL", "{:.3f}")]
    return columns


def _spread(rows: Sequence[Row]) -> list[Column]:
    """Of rows over repeats: half the 95 % interval of the mean; how much a step's time varies, `!` where too much."""
    if not any("repeats" in each for each in rows):
        return []

    def variation(row: Row) -> str | None:
        cv = row.get("step_ms_p50_cv")
        return None if cv is None else f"{100 * cv:.1f}" + (" !" if row["noisy"] else "")

    return [
        _number("± tokens/s (95 %)", "tokens_per_s_ci95", "{:,.0f}"),
        Column("step's CV %", variation),
        _number("repeats", "repeats", "{:d}"),
    ]


def _order(each: Row) -> tuple[Any, ...]:
    quality = (-each.get("accuracy", 0.0), each.get("val_loss", 0.0))
    return (each["status"] != "ok", *quality, str(each["method"]), each["seed"] or 0)


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers with units, and cells: best accuracy (else lowest validation loss) first, runs that failed last."""
    ordered = sorted(rows, key=_order)
    filled = [(column.header, [column.text(each) for each in ordered]) for column in _columns(ordered)]
    filled = [(header, cells) for header, cells in filled if any(cells)]
    lines = [[cells[index] or "–" for _, cells in filled] for index in range(len(ordered))]
    return [header for header, _ in filled], lines


def markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown, and a line below where its rows are of several revisions, or of trees with changes."""
    said = mixed(rows)
    return "\n".join([*piped(*table(rows)), *(["", said] if said else [])])


def piped(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Any table in Markdown, line by line: the first column is words, the others are numbers."""
    rule = ["---", *["---:"] * (len(headers) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in [headers, rule, *rows]]


def to_csv(rows: Sequence[Row]) -> str:
    """Every value under its own key, unrounded, and the whole config as `config.<key>`."""
    config = sorted({key for each in rows for key in each["config"]})
    keys = ["run_id", *IDENTITY, "code_hash", *numbers(rows), *(f"config.{key}" for key in config)]
    out = io.StringIO()
    writer = csv.DictWriter(out, keys, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**each, **{f"config.{key}": value for key, value in each["config"].items()}} for each in rows)
    return out.getvalue()
