"""A measurement's record as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmsys.compress.measure.variants import WHOLE_MIB, Variant

Summary = Mapping[str, float]
COLUMNS = (
    ("iteration ms (quartiles)", "iteration_ms"),
    ("compress", "compress_ms"),
    ("decompress", "decompress_ms"),
    ("of it exposed", "decompress_exposed_ms"),
    ("exposed else", "exposed_ms"),
    ("collectives", "collectives"),
    ("sent MB", "wire_bytes"),
    ("at the link's rate, ms", "wire_ms"),
    ("over the bound", "over_bound_percent"),
    ("S-SGD takes", "speedup"),
    ("recovered", "recovered_percent"),
    ("predicted ms", "predicted_ms"),
    ("off by", "error_percent"),
)


def cells(summary: Summary) -> dict[str, dict[str, dict[str, float]]]:
    """Model (empty where there is one) -> variant's name -> key -> number."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for key, value in summary.items():
        parts = key.split("/")
        if parts[0] == "fit" or len(parts) == 1:
            continue
        model, rest = (parts[0], parts[1:]) if len(parts) == 4 else ("", parts)
        method, setting, what = rest
        found.setdefault(model, {}).setdefault(f"{method}/{setting}", {})[what] = value
    return found


def markdown(summary: Summary, world: int) -> str:
    """All tables that `summary` has numbers for."""
    parts = []
    for model, rows in cells(summary).items():
        title = f"## {model or 'Iterations'}, {world} ranks"
        parts.append(f"{title}\n\n{_table(rows)}")
    if fit := _fit(summary):
        parts.append(fit)
    if (attempts := summary.get("measured_in_attempts", 1)) > 1:
        parts.append(f"Of {attempts:g} attempts: rounds that one had finished were not measured again by the next.")
    return "\n\n".join(parts) + "\n"


def _table(rows: Mapping[str, Mapping[str, float]]) -> str:
    plain = {Variant.parse(name): row["iteration_ms"] for name, row in rows.items() if name.startswith("none/")}
    shown = []
    for name, row in rows.items():
        variant = Variant.parse(name)
        like = [ms for v, ms in plain.items() if v.batch == variant.batch and v.overlap]
        speedup = {"speedup": min(like) / row["iteration_ms"]} if like else {}
        shown.append((variant, {**row, **speedup}))
    columns = [(title, key) for title, key in COLUMNS if any(key in row for _, row in shown)]
    lines = [["method", "buckets MiB", "r", "batch", *(title for title, _ in columns)]]
    for variant, row in shown:
        bucket = "one" if variant.bucket_mib >= WHOLE_MIB else f"{variant.bucket_mib:g}"
        r = str(variant.r) if variant.low_rank else ""
        method = variant.method if variant.overlap else f"{variant.method}, no overlap"
        lines.append([method, bucket, r, str(variant.batch), *(_cell(row, key) for _, key in columns)])
    return _lined(lines)


def _cell(row: Mapping[str, float], key: str) -> str:
    value = row.get(key)
    if value is None:
        return "–"
    if key == "iteration_ms":
        return f"{value:.1f} ({row['iteration_ms_p25']:.1f} to {row['iteration_ms_p75']:.1f})"
    if key == "wire_bytes":
        return f"{value / 1e6:.3f}"
    if key == "collectives":
        return f"{value:g}"
    if key == "speedup":
        return f"{value:.2f}x"
    return f"{value:+.1f} %" if key == "error_percent" else f"{value:.1f}" + (" %" if key.endswith("percent") else "")


def _fit(summary: Summary) -> str:
    fit = {key: value for key, value in summary.items() if key.startswith("fit/")}
    if not fit:
        return ""
    kinds = [key.split("/")[1] for key in fit if key.endswith("/mbit")]
    lines = [["collective", "alpha us", "Mbit/s"]]
    lines += [[k, f"{fit[f'fit/{k}/alpha_us']:.0f}", f"{fit[f'fit/{k}/mbit']:.1f}"] for k in kinds]
    methods = [key.split("/")[1] for key in fit if key.endswith("gamma_gb_per_s")]
    gamma = [["method", "gamma GB/s", "least us of a kernel"]]
    gamma += [[m, f"{fit[f'fit/{m}/gamma_gb_per_s']:.2f}", f"{fit[f'fit/{m}/launch_us']:.1f}"] for m in methods]
    text = f"## Fitted before\n\n{_lined(lines)}\n\n" if kinds else "## Fitted before\n\n"
    return f"{text}{_lined(gamma)}{_simulated(fit)}"


def _simulated(fit: Summary) -> str:
    """The command that simulates larger clusters with what was fitted."""
    gamma = [value for key, value in fit.items() if key.startswith("fit/acpsgd") and key.endswith("gamma_gb_per_s")]
    if "fit/all_reduce/mbit" not in fit or not gamma:
        return ""
    alpha, beta = fit["fit/all_reduce/alpha_us"] * 1e-6, fit["fit/all_reduce/mbit"] * 1e6 / 8
    return (
        "\n\nClusters of such links and memory: `python -m llmsys +exp=compress_simulate "
        f"task.alpha_s={alpha:.3g} task.beta_bytes_per_s={beta:.4g} task.gamma_bytes_per_s={gamma[0] * 1e9:.3g}`"
    )


def _lined(lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in lines[0][1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [lines[0], rule, *lines[1:]])
