"""Two programs measured in turns within one run, so that whatever else the machine does falls on both alike.

One is this package's, the other a peer that computes the same thing without it. They take turns step by step in the
order ours, peer, peer, ours, so neither always comes second. A step of ours and the peer's step of the same number are
a pair; what is quoted is the median over all pairs of the ratio of their times, with a bootstrap interval: the pairs
are drawn again, with replacement, and the middle 95 % of the medians that result are between its ends.

Two clocks run: the wall's, which is what a user waits for, and the process's CPU time, all threads together. Where a
machine has other work the first one's interval is wide; the second still tells what our side computes in addition, but
nothing of waiting.

    python benchmarks/side_by_side.py [FOLDER]      the tables of all such records below FOLDER
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmsys.job import Record

RECORDS = Path(__file__).parent / "records"
RESAMPLES = 2000


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def read_clocks() -> list[float]:
    """Seconds on each of `CLOCKS`."""
    return [clock() for clock in CLOCKS.values()]


class Turns:
    """Hears the end of each of our steps, and lets the peer take its turn before the next one begins.

    Call it with the progress that the loop tells its listener. From one call's return to the next call is one step of
    ours with all that surrounds it: tracking, progress, timing. `told` is called on our side of the clock.
    """

    def __init__(self, peer: Callable[[], None], told: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
        self._peer, self._told = peer, told
        self._resumed: list[float] | None = None
        self.ours_ms: list[list[float]] = []
        """For each step one time on each of `CLOCKS`. The first step is missing: it has loading before it."""
        self.peer_ms: list[list[float]] = []

    def __call__(self, progress: dict[str, Any]) -> None:
        self._told(progress)
        now = read_clocks()
        if "loss" not in progress:  # evaluation, after the last step
            return
        if self._resumed is not None:
            self.ours_ms.append(_between(self._resumed, now))
        for _ in range(2 if progress["step"] % 2 else 0):
            before = read_clocks()
            self._peer()
            self.peer_ms.append(_between(before, read_clocks()))
        self._resumed = read_clocks()

    def pairs(self, warmup: int, clock: str = "wall") -> tuple[list[float], list[float]]:
        """(ours, the peer's) times in ms, step by step, after the first `warmup` steps (at least one)."""
        ours, peer = self.ours_ms, self.peer_ms[1:]
        assert len(ours) == len(peer), "an odd number of steps leaves the last pair incomplete"
        first, column = max(warmup, 1) - 1, list(CLOCKS).index(clock)
        return [times[column] for times in ours[first:]], [times[column] for times in peer[first:]]


def _between(before: list[float], after: list[float]) -> list[float]:
    return [(b - a) * 1e3 for a, b in zip(before, after, strict=True)]


def check_steps(steps: int, warmup: int) -> None:
    """ValueError where so many steps do not make pairs."""
    if steps % 2 or steps < max(warmup, 1) + 2:
        raise ValueError(f"--steps {steps}: must be even, and at least {max(warmup, 1) + 2} with --warmup {warmup}")


def overhead(ours: Sequence[float], peer: Sequence[float], seed: int = 0) -> dict[str, float]:
    """`overhead_percent` of ours over the peer, the ends of its 95 % interval, the median difference in ms, and medians
    and quartiles of both."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    low, middle, high = median_interval(ratios, seed)
    summary = {
        "pairs": len(ratios),
        "overhead_ms": statistics.median(a - b for a, b in zip(ours, peer, strict=True)),
        "overhead_percent": 100 * (middle - 1),
        "overhead_low_percent": 100 * (low - 1),
        "overhead_high_percent": 100 * (high - 1),
    }
    for name, values in (("ours", ours), ("peer", peer)):
        first, _, third = statistics.quantiles(values, n=4, method="inclusive")
        summary[f"{name}_step_ms_p50"] = statistics.median(values)
        summary[f"{name}_step_ms_p25"] = first
        summary[f"{name}_step_ms_p75"] = third
    return summary


def median_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """The median, between the ends of its 95 % bootstrap interval."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[RESAMPLES * 25 // 1000], statistics.median(values), medians[-1 - RESAMPLES * 25 // 1000]


def finish(record: Record, name: str, turns: Turns, warmup: int, out: Path) -> Record:
    """The benchmark's record, made of our run's: settings, environment and samples of both. Written below `out`.

    RuntimeError where our run did not end well.
    """
    if record.status != "ok":
        raise RuntimeError(f"our run ended as {record.status}: {record.error}")
    summary: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    for clock in CLOCKS:
        prefix = "" if clock == "wall" else f"{clock}_"
        ours, peer = turns.pairs(warmup, clock)
        summary |= {prefix + key: round(value, 4) for key, value in overhead(ours, peer).items()}
        for side, values in (("ours", ours), ("peer", peer)):
            samples[f"{prefix}{side}_step_ms"] = [round(ms, 4) for ms in values]
    config = {**record.config, "results": "results"}  # not where this machine had its temporary files
    parts: dict[str, Any] = {"config": config, "summary": summary, "samples": samples, "files": {}}
    result = dataclasses.replace(record, name=name, task="benchmark", **parts)
    result.leave(out)
    return result


def show(record: Record) -> str:
    """A small table of one record, as Markdown."""
    s = record.summary
    rows = [f"| {record.name} | ours, ms (quartiles) | peer, ms (quartiles) | overhead (95 % interval) | a step |"]
    rows.append("|---|---|---|---|---|")
    for clock in CLOCKS:
        p = "" if clock == "wall" else f"{clock}_"
        sides = []
        for side in ("ours", "peer"):
            first, middle, third = (s[f"{p}{side}_step_ms_{key}"] for key in ("p25", "p50", "p75"))
            sides.append(f"{middle:.2f} ({first:.2f} to {third:.2f})")
        low, middle, high = (s[f"{p}overhead_{key}percent"] for key in ("low_", "", "high_"))
        over = f"{middle:+.2f} % ({low:+.2f} to {high:+.2f})"
        rows.append(f"| {clock} | {' | '.join(sides)} | {over} | {s[f'{p}overhead_ms']:+.2f} ms |")
    ranks = f"{record.world} rank{'s' if record.world > 1 else ''} of {record.env['threads']} threads"
    rows.append(f"\n{s['pairs']:.0f} pairs, {ranks}, {record.env['device_name']}")
    return "\n".join(rows)


def show_speeds(record: Record) -> str:
    """A table of one record of `lorafa_speed`, as Markdown: a line each subject, then what is claimed of them."""
    s, settings = record.summary, record.config["benchmark"]
    rows = [f"| {record.run_id} | step ms (quartiles) | tokens/s | optimizer ms | CPU ms |", "|---|---|---|---|---|"]
    for name in settings["subjects"]:
        first, middle, third, alone, cpu = (
            s[f"{name}_{key}"]
            for key in ("step_ms_p25", "step_ms_p50", "step_ms_p75", "optimizer_ms_p50", "cpu_ms_p50")
        )
        step = f"{middle:.1f} ({first:.1f} to {third:.1f})"
        rows.append(f"| {name} | {step} | {s[f'{name}_tokens_per_s']:,.0f} | {alone:.1f} | {cpu:.1f} |")
    rows += [
        "",
        "| speed, median over the rounds | wall clock (95 % interval) | CPU time (95 % interval) |",
        "|---|---|---|",
    ]
    for pair in settings["pairs"]:
        cells = []
        for clock in CLOCKS:
            low, middle, high = (s[f"{pair}_{clock}_{key}"] for key in ("low", "ratio", "high"))
            cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
        rows.append(f"| {pair.replace(':', ' / ')} | {' | '.join(cells)} |")
    model, threads = record.config["model"], record.env["threads"]
    shape = f"{model['num_layers']} layers of width {model['hidden_size']}, r = {settings['r']}"
    text = f"{settings['batch']} x {settings['length']} tokens, {settings['rounds']} rounds, {threads} threads"
    rows.append(f"\n{shape}, {text}, {record.env['device_name']}")
    return "\n".join(rows)


def show_links(records: Sequence[Record]) -> str:
    """A table of links, one line a link and pattern, as Markdown."""
    rows = ["| link, ranks | nominal Mbit/s | pattern | reached | fitted | alpha ms | worst error % |"]
    rows.append("|---|---|---|---|---|---|---|")
    for record in records:
        s = record.summary
        for pattern in ("pair", "all_reduce"):
            keys = ("reached_mbit", "fitted_mbit", "alpha_ms", "worst_error_percent")
            numbers = " | ".join(f"{s[f'{pattern}_{key}']:.4g}" for key in keys)
            link = f"{record.config['network']['name']}, {record.world}"
            rows.append(f"| {link} | {s['nominal_mbit']:g} | {pattern} | {numbers} |")
    return "\n".join(rows)


def main(arguments: Sequence[str]) -> None:
    """Prints the tables of the records of `task: benchmark` below the folder named, or below `records/`."""
    from llmsys import results

    records = [r for r in results.read(arguments[0] if arguments else RECORDS) if r.task == "benchmark"]
    for record in records:
        if "overhead_percent" in record.summary:
            print(show(record) + "\n")
        if record.name == "lorafa_speed":
            print(show_speeds(record) + "\n")
    if links := [record for record in records if "nominal_mbit" in record.summary]:
        print(show_links(links))


if __name__ == "__main__":
    main(sys.argv[1:])
