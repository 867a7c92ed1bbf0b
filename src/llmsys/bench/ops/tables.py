"""A record of operators as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Summary = Mapping[str, float]
FIGURES = (
    ("ms", "ms"),
    ("quartiles apart", "spread_percent"),
    ("TFLOP/s", "tflops"),
    ("GB/s", "gb_per_s"),
    ("algbw GB/s", "algbw_gb_per_s"),
    ("busbw GB/s", "busbw_gb_per_s"),
    ("% of peak", "peak_percent"),
)
GROUPS = (
    (
        "Products, m x n x k: forward, of the input's gradient (nn), of the weight's (tn)",
        ("gemm", "gemm_nn", "gemm_tn"),
    ),
    ("Attention: fused (batch x heads x queries x keys x width), and eager's products", ("attention", "bmm")),
    ("Softmax and norms, rows x columns", ("softmax", "rms_norm", "layer_norm")),
    ("Copies, bytes", ("memcpy",)),
    ("Collectives, bytes of the whole tensor", ("all_reduce", "all_gather", "reduce_scatter")),
)


def operators(summary: Summary) -> dict[str, dict[str, float]]:
    """Key of an operator (`gemm/350x4096x4096/bf16`) -> its figures."""
    found: dict[str, dict[str, float]] = {}
    for key, value in summary.items():
        operator, _, figure = key.rpartition("/")
        if operator:
            found.setdefault(operator, {})[figure] = value
    return found


def markdown(
    summary: Summary, title: str, notes: Sequence[str] = (), used: Mapping[str, Sequence[str]] | None = None
) -> str:
    """A table for each group of operators that was measured. `used`: key -> the rows of a table of modules that have
    it, as a column more."""
    found = operators(summary)
    parts = [f"# Operators: {title}"]
    for name, ops in GROUPS:
        rows = {key: own for key, own in found.items() if key.split("/")[0].removesuffix("_backward") in ops}
        if rows:
            parts.append(f"## {name}\n\n{_table(rows, used or {})}")
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _table(rows: Mapping[str, Mapping[str, float]], used: Mapping[str, Sequence[str]]) -> str:
    shown = [(header, figure) for header, figure in FIGURES if any(figure in own for own in rows.values())]
    named = any(used.get(key) for key in rows)
    lines = [["", *(header for header, _ in shown)], ["---", *["---:"] * len(shown)]]
    for key, own in rows.items():
        lines.append([key, *(_number(figure, own.get(figure)) for _, figure in shown)])
    if named:
        for line, cell in zip(lines, ["of", "---", *(", ".join(used.get(key, ())) for key in rows)], strict=True):
            line.append(cell)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _number(figure: str, value: float | None) -> str:
    if value is None:
        return ""
    if figure == "spread_percent":
        return f"{value:.1f} %"
    return f"{value:.1f}" if figure == "peak_percent" else f"{value:.4g}"
