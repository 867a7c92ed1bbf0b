"""Pictures of tables: one labelled point per row, drawn without a display."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_UNITS = {
    "bytes": ("MiB", 1 / 2**20),
    "gib": ("GiB", 1.0),
    "ms": ("ms", 1.0),
    "accuracy": ("%", 100.0),
    "f1": ("%", 100.0),
}


def _axis(key: str) -> tuple[str, float]:
    """(label with unit, factor from the stored unit) of a summary key, whose last words name its unit."""
    words = key.split("_")
    for word in (words[-1], words[-2] if len(words) > 1 else ""):
        if word in _UNITS:
            unit, factor = _UNITS[word]
            name = " ".join(w for w in words if w not in ("bytes", "gib", "ms"))
            return f"{name} ({unit})", factor
    return " ".join(words), 1.0


def scatter(rows: Sequence[dict[str, Any]], x: str, y: str, path: Path, note: str = "") -> None:
    """Writes a PNG of `y` over `x` to `path`; error bars where a row has `<y>_sd` or `<y>_se`; `note` below it, small.

    ValueError where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--plot: matplotlib is missing: pip install 'llmsys[notebooks]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    (x_label, x_factor), (y_label, y_factor) = _axis(x), _axis(y)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for method in sorted({row["method"] for row in rows}):
        points = [row for row in rows if row["method"] == method]
        bars = [row.get(f"{y}_sd", row.get(f"{y}_se", 0.0)) * y_factor for row in points]
        axes.errorbar(
            [row[x] * x_factor for row in points],
            [row[y] * y_factor for row in points],
            yerr=bars if any(bars) else None,
            fmt="o",
            capsize=3,
            label=method,
        )
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(", ".join(sorted({row["experiment"] for row in rows})))
    machines = "; ".join(sorted({str(row["device"]) for row in rows if row.get("device")}))
    below = [f"Measured on {machines}"] if machines else []
    below += textwrap.wrap(note, 110) if note else []
    figure.supxlabel("\n".join(below), fontsize=7, color="0.35", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
