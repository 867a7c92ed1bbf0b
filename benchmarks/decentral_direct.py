"""Steps over slow lines, by way of the broker and past it.

    python benchmarks/decentral_direct.py [--mbit 16,64] [--delay-ms 20] [--steps 16] [--rounds 3] [--out FOLDER]

Three provider processes train `llama_6m` by the command that a user gives, with `task.direct=false` and `true`, turn by
turn. Each one's line carries so many 10**6 bit/s out and as many in, in its own process, whoever it talks to; between
any two is the same delay, either way. So what the broker costs here is that it has a frame whole before it passes it on
(out of one line, then into the other, not both at once); its own line is not slow, and what it would cost besides, with
all that providers say to each other on it, is not in these numbers. The first `WARM` steps, in which lines are dialled
and measured, are left out. Nothing is copied meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from decentral_links import WORDS, ran
from llmsys.job import Record
from llmsys.table import piped
from script_record import RECORDS, Script

WARM = 6


def show(record: Record) -> str:
    """One record as Markdown."""
    rows = []
    for where in sorted({key.partition("/")[0] for key in record.samples}):
        times = [record.samples[f"{where}/{way}/step_ms"] for way in ("relayed", "direct")]
        spread = [f"{statistics.median(each):.0f} ({min(each):.0f} to {max(each):.0f})" for each in times]
        ratios = record.samples[f"{where}/ratio"]
        rows.append([where, *spread, f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                     f"{record.summary[f'{where}/direct_share']:.0%}"])  # fmt: skip
    heads = ("line", "relayed, ms (least to most)", "direct, ms", "relayed / direct, by round", "past the broker")
    return "\n".join(piped(heads, rows))


def main(given: Sequence[str]) -> Record:
    """Measures, writes the record, prints its table, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", default="16,64")
    parser.add_argument("--delay-ms", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RECORDS)
    asked = parser.parse_args(given)
    if asked.steps <= WARM + 1:
        parser.error(f"--steps {asked.steps}: must be more than {WARM + 1}")
    script = Script("decentral_direct")
    summary, samples = dict[str, float](), dict[str, list[float]]()
    for mbit in map(float, asked.mbit.split(",")):
        where = f"{mbit:g}mbit"
        for _ in range(asked.rounds):
            line = (f"task.up_mbit={mbit}", f"task.down_mbit={mbit}", f"task.delay_ms={asked.delay_ms}")
            medians = dict[str, float]()
            for way in ("relayed", "direct"):
                record = ran(asked.steps, *line, f"task.direct={str(way == 'direct').lower()}")
                took = record["samples"]["step_ms"][WARM:]
                medians[way] = statistics.median(took)
                samples.setdefault(f"{where}/{way}/step_ms", []).extend(took)
            samples.setdefault(f"{where}/ratio", []).append(medians["relayed"] / medians["direct"])
            summary[f"{where}/direct_share"] = record["summary"]["direct_mib"] / record["summary"]["moved_mib"]
        summary[f"{where}/ratio"] = statistics.median(samples[f"{where}/ratio"])
    config = {key: getattr(asked, key) for key in ("mbit", "delay_ms", "steps", "rounds")}
    config["words"] = list(WORDS)
    left = script.left(asked.out, f"{asked.mbit.replace(',', '-')}x{asked.steps}", config=config, summary=summary,
                       samples=samples)  # fmt: skip
    print(show(left))
    return left


if __name__ == "__main__":
    main(sys.argv[1:])
