"""What each provider has done over many jobs: the sum of their `contributions.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmsys.decentral.contributions import FILE

SUMMED = ("tflop", "forward", "backward", "updates", "given_up", "sent_mib", "copies_mib", "present_s")
_SHOWN = (("TFLOP", "tflop", ".4g"), ("passes", "passes", "d"), ("given up", "given_up", "d"),
          ("sent MiB", "sent_mib", ".1f"), ("copies MiB", "copies_mib", ".1f"), ("hours", "hours", ".3f"))  # fmt: skip


def ledger(folders: Sequence[Path]) -> dict[str, Any]:
    """Of all finished runs below these folders, each once: `runs`, their folders; `providers`, by name, with how many
    `jobs` each had a part in, and its `share` of all FLOPs. ValueError where there is none, or for a file that is no
    such thing."""
    runs: dict[Path, Mapping[str, Any]] = {}
    for folder in folders:
        for path in sorted(folder.resolve().rglob(FILE)):
            try:
                if json.loads((path.parent / "record.json").read_text(encoding="utf-8"))["status"] == "ok":
                    runs[path.parent] = {name: _checked(each) for name, each in json.loads(path.read_text()).items()}
            except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
                raise ValueError(f"{path}: {type(error).__name__}: {error}") from None
    if not runs:
        raise ValueError(f"{', '.join(map(str, folders))}: no finished run with {FILE} below")
    found: dict[str, dict[str, Any]] = {}
    for given in runs.values():
        for name, each in given.items():
            own = found.setdefault(name, {"jobs": 0, **dict.fromkeys(SUMMED, 0)})
            own["jobs"] += each["forward"] > 0
            for key in SUMMED:
                own[key] += each[key]
    total = sum(each["tflop"] for each in found.values())
    for each in found.values():
        each["share"] = each["tflop"] / total if total else 0.0
    most_first = sorted(found.items(), key=lambda own: -own[1]["tflop"])
    return {"runs": [str(run) for run in runs], "providers": dict(most_first)}


def _checked(given: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in SUMMED:
        if not isinstance(given[key], int | float):
            raise ValueError(f"{key}={given[key]}: must be a number")
    return given


def lines(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows, who did most first."""
    rows = []
    for name, each in found["providers"].items():
        own = {**each, "passes": each["forward"] + each["backward"], "hours": each["present_s"] / 3600}
        cells = [format(own[key], form) for _, key, form in _SHOWN]
        rows.append([name, str(each["jobs"]), f"{100 * each['share']:.2f}", *cells])
    return ["provider", "jobs", "share %", *(head for head, *_ in _SHOWN)], rows
