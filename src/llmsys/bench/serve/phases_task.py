"""The task `bench_serve_modules`: prefill and decoding by module, against their rooflines, and predicted. Keys, for
each `<phase>/<batch>x<context>`:

    ms, tokens_per_s                 a pass without clocks; new tokens
    least_ms, roofline_percent       on its roofline (`work`); that over what it took
    predicted_ms                     by `fit`: of cells that are not among those it is made of
    overhead_percent                 what clocks of modules add
    <row>/ms, share_percent, compute_percent, bandwidth_percent      of passes with clocks: of the pass; of the peaks

    <phase>_error_percent            mean over the cells that were predicted; `_worst` the largest
    <phase>_slow                     the fit
    peak_tflops, peak_gbps           of the device; `notes` says where they are from
    mem_gib                          of the device; of a host what was free
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from llmsys import schema
from llmsys.bench.predict import calibrate
from llmsys.bench.serve import fit, served, work
from llmsys.bench.serve.pace import DECODE, PREFILL, Pace
from llmsys.bench.serve.phases import Cell, Passes, measure
from llmsys.table import piped
from llmsys.train import peaks
from llmsys.train.reproducible import reproducible

if TYPE_CHECKING:
    from llmsys.context import Context


KEPT = (
    "rope has, beside rotary embedding, what attention does around its kernel: it keeps the new keys and values, for "
    "which transformers' plain cache copies all that it has."
)


def modules(config: schema.Config, context: Context) -> dict[str, Any]:
    """The record; what can be said before a run begins, `asked.check` has said."""
    task, model = config.task, config.model
    assert isinstance(task, schema.ServeModules)
    assert isinstance(model, schema.Transformer)
    cells = [Cell(phase, b, c) for phase in (PREFILL, DECODE) for b in task.batches for c in task.contexts]
    with reproducible(config.train.seed, context.threads, config.train.deterministic):
        made = served.load(config, context)
        arithmetic, memory = peaks.peak_flops(config, context.device), peaks.measured_memory(config, context.device)
        found: dict[Cell, Passes] = {}
        for cell in cells:
            how = (model.vocab_size, context.device, task.rounds, task.warmup, context.beat)
            found[cell] = measure(made, cell, *how)
            context.log.info("%s: %.3f ms", cell.key, found[cell].ms)
    summary, samples = _figures(model, found, arithmetic.per_s, memory.per_s)
    summary["mem_gib"] = calibrate.memory(context.device)["mem_gib"]
    (context.out / "serve_modules.md").write_text(_markdown(model.name, found, summary), encoding="utf-8")
    return {"summary": summary, "samples": samples, "files": {"tables": "serve_modules.md"},
            "notes": {"peak_tflops": arithmetic.source, "peak_gbps": memory.source}}  # fmt: skip


def _figures(
    model: schema.Transformer, found: dict[Cell, Passes], flops_per_s: float, bytes_per_s: float
) -> tuple[dict[str, float], dict[str, list[float]]]:
    summary: dict[str, float] = {"peak_tflops": flops_per_s / 1e12, "peak_gbps": bytes_per_s / 1e9}
    samples: dict[str, list[float]] = {}
    pace, least = Pace(model=model, flops_per_s=flops_per_s, bytes_per_s=bytes_per_s), dict[Cell, float]()
    for cell, own in found.items():
        new, before = (1, cell.context) if cell.phase == DECODE else (cell.context, 0)
        rows = work.by_row(model, cell.batch, new, before)
        least[cell] = pace.least_s(cell.batch, new, before)
        summary |= {
            f"{cell.key}/ms": own.ms,
            f"{cell.key}/tokens_per_s": cell.batch * new / own.ms * 1e3,
            f"{cell.key}/least_ms": least[cell] * 1e3,
            f"{cell.key}/roofline_percent": 100 * least[cell] * 1e3 / own.ms,
            f"{cell.key}/overhead_percent": own.overhead_percent,
        }
        samples[f"{cell.key}/ms"] = own.bare_ms
        for row, ms in own.rows.items():
            middle, name = statistics.median(ms), f"{cell.key}/{row}"
            summary[f"{name}/ms"] = middle
            summary[f"{name}/share_percent"] = 100 * middle / statistics.median(own.clocked_ms)
            if row in rows and middle > 0:
                summary[f"{name}/compute_percent"] = 100 * rows[row].flops / flops_per_s / middle * 1e3
                summary[f"{name}/bandwidth_percent"] = 100 * rows[row].nbytes / bytes_per_s / middle * 1e3
    for phase in (PREFILL, DECODE):
        cells = [cell for cell in found if cell.phase == phase]
        known = [cell for cell in cells if cell.context == cells[0].context or cell == cells[-1]]
        points = [fit.Point(cell.batch, least[cell], found[cell].ms / 1e3) for cell in known]
        own_fit = fit.fit(points)
        errors = []
        for cell in (each for each in cells if each not in known):
            predicted = own_fit.seconds(cell.batch, least[cell]) * 1e3
            summary[f"{cell.key}/predicted_ms"] = predicted
            errors.append(100 * abs(predicted / found[cell].ms - 1))
        summary[f"{phase}_slow"] = own_fit.slow
        summary |= {f"{phase}_error_percent": statistics.fmean(errors), f"{phase}_error_percent_worst": max(errors)}
    return summary, samples


def _markdown(name: str, found: dict[Cell, Passes], summary: dict[str, float]) -> str:
    parts = [f"# Prefill and decoding by module: {name}"]
    for phase in (PREFILL, DECODE):
        cells = [cell for cell in found if cell.phase == phase]
        rows = list(dict.fromkeys(row for cell in cells for row in found[cell].rows))
        head = ("batch x context", "ms", "tokens/s", "% of roofline", "predicted, ms", "clocks add, %")
        lines = []
        for cell in cells:
            own = {key: summary.get(f"{cell.key}/{key}") for key in ("ms", "tokens_per_s", "roofline_percent")}
            predicted = summary.get(f"{cell.key}/predicted_ms")
            lines.append([f"{cell.batch}x{cell.context}", *map(_shown, own.values()), _shown(predicted),
                          f"{summary[f'{cell.key}/overhead_percent']:.1f}"])  # fmt: skip
        off = f"predictions of cells that were not fitted are off by {summary[f'{phase}_error_percent']:.1f} % (mean)"
        parts.append(f"## {phase}: {off}\n\n" + "\n".join(piped(head, lines)))
        table = []
        for row in rows:
            values = [row]
            for cell in cells:
                key = f"{cell.key}/{row}"
                share = f"{summary[f'{key}/share_percent']:.0f}" if f"{key}/ms" in summary else ""
                if f"{key}/bandwidth_percent" in summary:
                    share += f" ({summary[f'{key}/compute_percent']:.0f}, {summary[f'{key}/bandwidth_percent']:.0f})"
                values.append(share)
            table.append(values)
        shares = "\n".join(piped(("", *(f"{cell.batch}x{cell.context}" for cell in cells)), table))
        parts.append(f"% of the pass (% of the peak of arithmetic, of memory)\n\n{shares}")
    return "\n\n".join([*parts, KEPT]) + "\n"


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
