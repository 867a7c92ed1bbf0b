"""Pages that MkDocs makes while it builds: one for each experiment of conf/exp, their list, and that of jobs/.

The purpose of an experiment is what `python -m llmsys --help` shows (`compose.choices`), the rest is the header of its
file, and below it stands the latest record that is committed of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from llmsys import compose
from llmsys.figures.machine import where
from llmsys.job import Record

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "records"
FIELDS = ("Paper", "Expected", "Hardware", "Time", "Command")
UNITS = {
    "ms": "ms", "s": "s", "us": "µs", "us_per_step": "µs a step", "j_per_step": "J a step", "steps": "steps",
    "gib": "GiB", "bytes": "bytes", "gb_per_s": "GB/s", "mbit": "Mbit/s", "gbit": "Gbit/s", "gbps": "GB/s",
    "percent": "%", "mfu": "%", "hfu": "%", "accuracy": "share", "f1": "share", "params": "parameters",
    "tflops": "TFLOP/s", "tokens_per_s": "tokens/s", "tokens_per_s_per_device": "tokens/s",
    "samples_per_s": "samples/s", "per_s": "1/s", "loss": "nats",
}  # fmt: skip
"""The end of a summary's key -> the unit that it names."""
MOST = 40
"""Rows of a table at most: some records have thousands of numbers, and tables of their own."""


def header(name: str) -> dict[str, str]:
    """The fields of an experiment's header. A line `Field: ...` goes on in the comment lines that begin with no other;
    `Hardware: ... Time: ...` may share one."""
    found: dict[str, str] = {}
    current = ""
    for line in (compose.CONF / "exp" / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        for part in re.split(rf"(?<=\.) (?=(?:{'|'.join(FIELDS)}): )", line.lstrip("# ")):
            field, colon, rest = part.partition(": ")
            if colon and field in FIELDS:
                current, found[field] = field, rest
            elif current:
                found[current] += ("\n" if current == "Command" else " ") + part
    return found


def committed(name: str) -> list[Record]:
    """The committed records of an experiment, in the order in which they were begun."""
    folders = [path.parent for path in (RECORDS / name).rglob("record.json")]
    found = [record for folder in folders if (record := Record.read(folder)) is not None]
    return sorted(
        (record for record in found if record.name == name), key=lambda record: (record.started, record.run_id)
    )


def unit(key: str) -> str:
    """The unit of a summary's key, by the longest end of it that names one; "" for a plain number."""
    words = re.sub(r"_(p\d+|se|sd|low|high|median)$", "", key.rpartition("/")[2]).split("_")
    return next((UNITS[end] for i in range(len(words)) if (end := "_".join(words[i:])) in UNITS), "")


def page(name: str, purpose: str) -> str:
    """An experiment's page, as Markdown."""
    fields = header(name)
    lines = [f"# {name}", "", purpose, ""]
    lines += [f"- **{field}**: {_text(fields[field])}" for field in FIELDS[:-1] if field in fields]
    lines += ["", "## Command", "", "```text", *fields.get("Command", "").splitlines(), "```", ""]
    lines += ["In seconds on a CPU, at a size that measures nothing:", "", "```text"]
    lines += [f"python -m llmsys +exp={name} smoke=true", "```", "", "## Latest record", ""]
    return "\n".join([*lines, *_record(committed(name)), ""])


def _record(records: Sequence[Record]) -> list[str]:
    if not records:
        return ["No record is committed."]
    record = records[-1]
    env, settings = record.env, record.config
    revision = f"`{str(env.get('git_sha', ''))[:12] or 'unknown'}`"
    dirty = ", with changes that were not committed" if env.get("git_dirty") else ""
    lines = [f"Of {len(records)}; the table of all: `python -m llmsys.results benchmarks/records/{record.name}`."]
    lines += ["", "| | |", "|---|---|", f"| run | `{record.run_id}` |", f"| status | {record.status} |"]
    lines += [f"| machine | {where([record])} |", f"| ranks | {record.world} |", f"| date | {record.started[:10]} |"]
    lines += [f"| git revision | {revision}{dirty} |", f"| took | {record.seconds:,.0f} s |"]
    if words := settings.get("command"):
        lines += [f"| command | `python -m llmsys {_text(' '.join(words))}` |"]
    lines += ["", "| number | value | unit |", "|---|---:|---|"]
    shown = list(record.summary.items())[:MOST]
    lines += [f"| `{_text(key)}` | {value:,.6g} | {unit(key)} |" for key, value in shown]
    if len(record.summary) > MOST:
        lines += ["", f"And {len(record.summary) - MOST:,} more numbers."]
    return lines


def _text(text: str) -> str:
    """Text that Markdown takes as it is."""
    return re.sub(r"([|<>])", lambda found: {"|": "&#124;", "<": "&lt;", ">": "&gt;"}[found[1]], text)


def index(purposes: dict[str, str]) -> str:
    """The list of all experiments, by the word that their names begin with."""
    lines = [
        "# Experiments",
        "",
        "One page for each file of `conf/exp`, made from its header and its latest record.",
        "",
    ]
    lines += ["| experiment | what it does |", "|---|---|"]
    return "\n".join([*lines, *(f"| [{name}]({name}.md) | {_text(text)} |" for name, text in purposes.items()), ""])


def on_config(config: Any) -> Any:
    """Puts the experiments at the end of the navigation."""
    pages = [{name: f"experiments/{name}.md"} for name in compose.choices("exp")]
    config.nav.append({"Experiments": ["experiments/index.md", *pages]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds their pages, of which nothing is written into docs/."""
    purposes = compose.choices("exp")
    texts = {"index": index(purposes), **{name: page(name, purpose) for name, purpose in purposes.items()}}
    for name, text in texts.items():
        files.append(File.generated(config, f"experiments/{name}.md", content=text))
    files.append(File.generated(config, "cluster.md", content=jobs()))
    return files


def jobs() -> str:
    """What jobs/ says of itself; files beside it are no pages, and stand by their names."""
    text = (ROOT / "jobs" / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\[([\w.]+)\]\(\1\)", r"`jobs/\1`", text)
