"""On which machine a figure's numbers were made, and of which revisions of the code they are, below it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from llmsys.job import Record
from llmsys.revisions import mixed


def where(records: Sequence[Record]) -> str:
    """The machines of `records`, each once: `AMD EPYC, 2 cores` or `2 x NVIDIA H100 80GB HBM3`."""
    return "; ".join(dict.fromkeys(_name(record) for record in records)) or "machine unknown"


def _name(record: Record) -> str:
    env = record.env
    if env.get("device", "cpu") != "cpu" and env.get("device_name"):
        count = int(env.get("device_count", 1))
        return f"{count} x {env['device_name']}" if count > 1 else str(env["device_name"])
    name = env.get("cpu") or env.get("device_name")
    if not name:
        return "machine unknown"
    return f"{name}, {env['cores']} cores" if env.get("cores") else str(name)


def stamp(figure: Any, records: Sequence[Record], *, measured: bool = True) -> Any:
    """Writes below `figure`, in place, on which machine its numbers were measured, or computed, and, where they are of
    several revisions, of which; returns it."""
    verb = "Measured on" if measured else "Predicted, computed on"
    said = mixed({**record.env, "code_hash": record.code_hash} for record in records)
    lines = [f"{verb} {where(records)}", *textwrap.wrap(said, 120)]
    figure.supxlabel("\n".join(lines), fontsize=8, color="#555555", x=0.99, ha="right")
    return figure
