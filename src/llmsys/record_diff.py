"""What differs between two runs: settings, environment, code, data, and the numbers they left.

    python -m llmsys.results diff A B       two folders of runs, or two run ids below `--root`

Two folders with many runs are matched run by run: the same experiment, task and settings, but for the device, threads
and placement that they were given. Settings that change no result, such as where it was written, are not shown.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsys.flat import flat
from llmsys.identity import NOT_IDENTITY
from llmsys.job import Record
from llmsys.rows import row
from llmsys.table import piped

ASIDE = ("name", *NOT_IDENTITY)
"""Settings that change no result, by how their keys begin."""
_RESOLVED = ("dispatch.", "hardware.device", "train.threads")
"""Settings of where a run is placed, or of what this machine has: runs of the same question may differ in them."""
_LACKS = "–"


@dataclass(frozen=True)
class Difference:
    """One value that is not the same in both; None where a run lacks it. `group`: run, settings, environment or
    summary."""

    group: str
    key: str
    a: Any
    b: Any

    @property
    def absolute(self) -> float | None:
        """b - a, of numbers of a summary."""
        if self.group != "summary" or self.a is None or self.b is None:
            return None
        return float(self.b - self.a)

    @property
    def relative(self) -> float | None:
        """(b - a) / |a|; None where a is 0."""
        return None if self.absolute is None or not self.a else self.absolute / abs(self.a)


def diff(a: Record, b: Record) -> list[Difference]:
    """What differs between two records, samples and times of day aside: first the run, then its settings, environment
    and summary, each by key."""
    about = ("name", "task", "status", "reason", "world", "kernel", "resumed_from_step", "code_hash", "data_hash")
    sides = [
        {
            "run": {key: getattr(each, key) for key in about},
            "settings": _settings(each),
            "environment": flat(each.env),
            "summary": dict(each.summary),
        }
        for each in (a, b)
    ]
    found = []
    for group in sides[0]:
        one, other = (side[group] for side in sides)
        keys = one if group == "run" else sorted({*one, *other})
        for key in keys:
            if (key in one) != (key in other) or not _same(one[key], other[key]):
                found.append(Difference(group, key, one.get(key), other.get(key)))
    return found


def _settings(record: Record) -> dict[str, Any]:
    config: dict[str, Any] = row(record)["config"]
    return {key: value for key, value in config.items() if not key.startswith(ASIDE)}


def _same(one: Any, other: Any) -> bool:
    """Equal, or both NaN; 1 and True are not."""
    if isinstance(one, bool) != isinstance(other, bool):
        return False
    return bool(one == other or (one != one and other != other))


def matched(a: Sequence[Record], b: Sequence[Record]) -> tuple[list[tuple[Record, Record]], list[Record], list[Record]]:
    """(pairs of the same experiment, task and settings, those of `a` alone, those of `b` alone). Of several runs of the
    same settings the first is paired with the first, by when they were started."""
    waiting: dict[str, list[Record]] = {}
    for each in sorted(b, key=lambda record: record.started):
        waiting.setdefault(_what(each), []).append(each)
    pairs, alone = [], []
    for each in sorted(a, key=lambda record: record.started):
        others = waiting.get(_what(each))
        if others:
            pairs.append((each, others.pop(0)))
        else:
            alone.append(each)
    return pairs, alone, [each for others in waiting.values() for each in others]


def _what(record: Record) -> str:
    asked = {key: value for key, value in _settings(record).items() if not key.startswith(_RESOLVED)}
    return repr((record.name, record.task, sorted(asked.items())))


def show(pairs: Sequence[tuple[Record, Record]]) -> list[str]:
    """The differences of pairs of runs as Markdown, line by line. What all pairs of several have alike, as when one
    folder is of another machine, is said once."""
    found = [diff(a, b) for a, b in pairs]
    alike = set.intersection(*({repr(each) for each in one} for one in found)) if len(pairs) > 1 else set()
    lines = []
    if alike:
        common = [each for each in found[0] if repr(each) in alike]
        lines += [f"# All {len(pairs)} pairs", "", *_table(common), ""]
    for (a, b), one in zip(pairs, found, strict=True):
        own = [each for each in one if repr(each) not in alike]
        what = _table(own) if own else [f"No {'other ' if alike else ''}difference."]
        lines += [f"# {a.name} {a.run_id} and {b.name} {b.run_id}", "", *what, ""]
    return lines[:-1]


def _table(found: Sequence[Difference]) -> list[str]:
    rows = []
    for each in found:
        absolute = "" if each.absolute is None else f"{each.absolute:+.4g}"
        relative = "" if each.relative is None else f"{100 * each.relative:+.2f} %"
        rows.append([each.group, each.key, _text(each.a), _text(each.b), absolute, relative])
    return piped(("", "key", "A", "B", "B - A", "of A"), rows)


def _text(value: Any) -> str:
    if value is None or value == "":
        return _LACKS
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def find(word: str, root: str) -> list[Record]:
    """The records that `word` means: those below a folder of that name, or the run of that id below `root`. ValueError
    where it is neither."""
    from llmsys import results

    if Path(word).is_dir():
        return results.read(word)
    if not Path(root).is_dir():
        raise ValueError(f"{word}: no such folder, nor is there {root} (--root), where a run of this id would be")
    for path in sorted(Path(root).rglob("record.json")):
        if path.parent.name == word and (record := Record.read(path.parent)) is not None:
            return [record]
    raise ValueError(f"{word}: neither a folder nor the id of a run below {root} (--root FOLDER says where)")


def main(words: Sequence[str]) -> None:
    """`python -m llmsys.results diff`. ValueError where A or B is nothing, or none of their runs match."""
    parser = argparse.ArgumentParser(
        prog="python -m llmsys.results diff",
        description="What differs between two runs, or run by run between two folders of them: settings, environment, "
        "code, data, and the numbers they left.",
    )
    for name in ("A", "B"):
        parser.add_argument(name, help="a folder with one run or many below it, or a run's id")
    root = os.environ.get("LLMSYS_RESULTS", "results")
    parser.add_argument("--root", default=root, metavar="FOLDER", help="where ids are sought (default: %(default)s)")
    asked = parser.parse_args(words)
    a, b = find(asked.A, asked.root), find(asked.B, asked.root)
    if len(a) == len(b) == 1:
        print("\n".join(show([(a[0], b[0])])))
        return
    pairs, only_a, only_b = matched(a, b)
    if pairs:
        print("\n".join(show(pairs)))
    for side, alone in ((asked.A, only_a), (asked.B, only_b)):
        for each in alone:
            print(f"only in {side}: {each.name} {each.run_id}")
    if not pairs:
        raise ValueError(f"{asked.A}, {asked.B}: no run of the one has the settings of a run of the other")
