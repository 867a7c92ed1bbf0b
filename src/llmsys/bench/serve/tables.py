"""A record of serving as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmsys.bench.serve.figures import PERCENTILES, UNSTEADY
from llmsys.bench.serve.outcome import OK, STATUSES
from llmsys.table import piped

Figures = Mapping[str, float]
LATENCIES = (
    ("first token", "ttft_ms"),
    ("per token", "tpot_ms"),
    ("between tokens", "itl_ms"),
    ("whole request", "e2e_ms"),
    ("sent late by", "lag_ms"),
    ("added by client and line", "added_ms"),
)

PREDICTED = {
    "output_tokens_per_s": "tokens out/s",
    "ttft_ms_p50": "first token p50, ms",
    "ttft_ms_p99": "first token p99, ms",
    "tpot_ms_p50": "per token p50, ms",
    "e2e_ms_p50": "whole request p50, ms",
    "e2e_ms_p99": "whole request p99, ms",
}


def server(own: Mapping[str, Any]) -> str:
    """The name of `server=`, with its adapter."""
    adapter = f" with {own['adapter']}{', merged' if own.get('merge') else ''}" if own.get("adapter") else ""
    return f"{own['name']}{adapter}"


def line(one: Figures) -> str:
    """Of one load, for the log."""
    parts = [f"{one['ok']:g} of {one['requests']:g} requests", f"{one.get('output_tokens_per_s', 0):.1f} tokens/s"]
    parts += [f"{name} {one[f'{key}_p50']:.1f} ms" for name, key in LATENCIES[:2] if f"{key}_p50" in one]
    return ", ".join(parts)


def markdown(
    summary: Figures, repeats: Sequence[Figures], probes: Sequence[tuple[float, Figures]], title: str,
    notes: Mapping[str, str],
) -> str:  # fmt: skip
    """Throughput, latencies, how requests ended; the search for a rate, where there was one."""
    parts = [
        f"# Serving: {title}",
        _throughput(summary, repeats),
        _latencies(summary),
        _ended(summary),
        _predicted(summary),
    ]
    if probes:
        how = "" if summary["max_rate_confirmed"] else ", **and that is not certain**"
        head = ("requests/s", "kept", "first token p99, ms", "per token p99, ms", "sent late by p99, ms")
        keys = ("ttft_ms", "tpot_ms", "lag_ms")
        rows = [[f"{at:.3g}", f"{one['good_share']:.1%}", *(_ms(one, f"{key}_p99") for key in keys)]
                for at, one in sorted(probes, key=lambda probe: probe[0])]  # fmt: skip
        parts.append(
            f"## Highest rate: {summary['max_rate_per_s']:.3g} requests/s{how}\n\n" + "\n".join(piped(head, rows))
        )
    if notes:
        parts.append("\n".join(f"- {key}: {note}" for key, note in notes.items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def _throughput(summary: Figures, repeats: Sequence[Figures]) -> str:
    head = ("", "requests/s", "tokens in/s", "tokens out/s", "good/s", "most waiting")
    keys = ("requests_per_s", "input_tokens_per_s", "output_tokens_per_s", "goodput_per_s")
    rows = [[f"repeat {at + 1}", *(f"{one.get(key, 0):.2f}" for key in keys), f"{one['waiting_max']:g}"]
            for at, one in enumerate(repeats)]  # fmt: skip
    rows.append(["mean", *(f"{summary.get(key, 0):.2f}" for key in keys), f"{summary.get('waiting_max', 0):g}"])
    text = "\n".join(piped(head, rows))
    if "output_tokens_per_s_half_percent" in summary:
        half, cv = summary["output_tokens_per_s_half_percent"], summary["output_tokens_per_s_cv_percent"]
        text += f"\n\nTokens out: ± {half:.1f} % (95 % interval of the mean, within one start of the server), "
        text += f"repeats deviate by {cv:.1f} %"
        text += (
            f": **more than {UNSTEADY:.0%}: the machine was not quiet, or random loads differed**."
            if summary["unsteady"]
            else "."
        )
    return text


def _latencies(summary: Figures) -> str:
    head = ("ms", *(f"p{at}" for at in PERCENTILES), "most")
    rows = [[name, *(_ms(summary, f"{key}_p{at}") for at in PERCENTILES), _ms(summary, f"{key}_max")]
            for name, key in LATENCIES if f"{key}_p50" in summary]  # fmt: skip
    text = "\n".join(piped(head, rows)) if rows else ""
    if "client/added_ms_p50" in summary:
        text += f"\n\nOur client adds {_ms(summary, 'client/added_ms_p50')} ms to a first token (p50; p99 "
        text += f"{_ms(summary, 'client/added_ms_p99')}), measured over HTTP against a stub under the same arrivals"
        text += (
            f", and sends {_ms(summary, 'client/lag_ms_p99')} ms late (p99)." if "client/lag_ms_p99" in summary else "."
        )
    return text


def _ended(summary: Figures) -> str:
    rows = [[status, f"{summary.get(status, 0):g}", what] for status, what in STATUSES.items()
            if summary.get(status) or status == OK]  # fmt: skip
    return "\n".join(piped(("ended", "requests", "which means"), rows))


def _predicted(summary: Figures) -> str:
    rows = [[name, f"{summary[f'predicted/{key}']:.4g}", f"{summary[key]:.4g}",
             f"{summary[key] / summary[f'predicted/{key}']:.3g}"]
            for key, name in PREDICTED.items() if summary.get(key) and f"predicted/{key}" in summary]  # fmt: skip
    return "\n".join(piped(("", "predicted", "measured", "measured / predicted"), rows)) if rows else ""


def _ms(figures: Figures, key: str) -> str:
    return f"{figures[key]:.2f}" if key in figures else ""
