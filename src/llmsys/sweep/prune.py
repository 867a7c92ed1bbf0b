"""What needs at least as much memory as a run that ran out of it: seen, never predicted.

A config is a point: its place on the monotone axes, along which memory never shrinks, and the rest. A run that was seen
to run out of memory is a witness against every point with the same rest that is nowhere below it, unless others may
have held that memory (`Record.doubtful`). Prediction takes no part: another project's analytic estimate, used as a
gate, under-predicted by 2.5x and was thrown out for this rule (lablup/mlxcel, issues 807 and 808).

What is compared on an axis is not always the setting itself. With several micro-batches a step, the gradients of the
first are held while the next is computed, and with one they are not: `train.global_batch` counts as whether there are
several. Key and value heads count by their width. A limit on the process's memory counts downwards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmsys import tasks
from llmsys.flat import flat
from llmsys.job import Record, code_hash
from llmsys.sweep.settings import Config, get, shares

LABELS = ("model.name", "data.make", "train.lr_by_method", "train.lr_scale", "techniques")
"""Settings that change no byte of a step's memory."""
NOT_COMPARED = ("results", "reuse", "force", "smoke", "baselines", "command", "tracker", "sweep", "repeat")


def _accumulates(config: Config) -> float:
    train = config["train"]
    return float(train["global_batch"] > train["micro_batch"] * shares(config))


def _kv_width(config: Config) -> float:
    model = config["model"]
    return float(model["num_kv_heads"] * model["hidden_size"] / model["num_heads"])


def _limit(config: Config) -> float:
    given = get(config, "dispatch.memory_gib")
    return -math.inf if given is None else -float(given)


MEANS: dict[str, Callable[[Config], float]] = {
    "train.global_batch": _accumulates,
    "model.num_kv_heads": _kv_width,
    "dispatch.memory_gib": _limit,
}
"""Keys whose place on their axis is not their value."""


@dataclass(frozen=True)
class Point:
    """`axes`: key -> place, sorted; `rest`: everything else that a run's memory can depend on, as text."""

    axes: tuple[tuple[str, float], ...]
    rest: str

    def covers(self, other: Point) -> bool:
        """Whether this needs at least as much memory as `other`: nowhere below it, and the same in all else."""
        mine, theirs = dict(self.axes), dict(other.axes)
        return self.rest == other.rest and mine.keys() == theirs.keys() and all(mine[k] >= theirs[k] for k in theirs)


def keys(task: str, more: Iterable[str] = ()) -> tuple[str, ...]:
    """The monotone axes that a task declares, and `more`."""
    return tuple(dict.fromkeys((*tasks.MONOTONE.get(task, ()), *more)))


def point(config: Config, more: Iterable[str] = ()) -> Point | None:
    """Where a config stands; None where memory grows along no axis that is known: `train.recompute=auto` keeps the less
    the more there is to keep."""
    if get(config, "train.recompute") == "auto":
        return None
    axes = {}
    for key in keys(config["task"]["kind"], more):
        value = get(config, key)
        if key in MEANS and (value is not None or key == "dispatch.memory_gib"):
            axes[key] = MEANS[key](config)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            axes[key] = float(value)
    rest = {key: value for key, value in flat(config).items() if not _aside(key) and key not in axes}
    return Point(tuple(sorted(axes.items())), json.dumps(rest, sort_keys=True))


def _aside(key: str) -> bool:
    """Settings that say nothing of memory: who is told, where it runs and how long it may, and `LABELS`."""
    group, _, name = key.partition(".")
    return group in NOT_COMPARED or key.startswith(LABELS) or (group == "dispatch" and name != "memory_gib")


@dataclass(frozen=True)
class Witness:
    """A run that was seen to run out of memory."""

    run_id: str
    reason: str
    point: Point


class Witnesses:
    """What has been seen to run out of memory, in this sweep and before it."""

    def __init__(self, more: Sequence[str] = ()) -> None:
        self._more = tuple(more)
        self._seen: dict[str, Witness] = {}

    def see(self, record: Record) -> None:
        """Remembers a record, if it is one of running out of memory, and not a doubtful one."""
        if record.status == "oom" and not record.doubtful and (place := point(record.config, self._more)):
            self._seen[record.run_id] = Witness(record.run_id, record.reason, place)

    def against(self, config: Config) -> Witness | None:
        """The first witness that `config` needs at least as much memory as; not a run of its own id."""
        place = point(config, self._more)
        if place is None:
            return None
        return next((witness for witness in self._seen.values() if place.covers(witness.point)), None)

    def why(self, config: Config, witness: Witness) -> str:
        """One line for the record: which run it was, and where this one stands above it."""
        place = point(config, self._more)
        assert place is not None
        theirs = dict(witness.point.axes)
        above = [f"{key}={get(config, key)}" for key, value in place.axes if value > theirs[key]]
        where = f"it has less of {', '.join(above)}" if above else "it is of the same size"
        return f"not run: run {witness.run_id} ran out of memory ({witness.reason}), and {where}"


def kept(folders: Iterable[Path], *, reuse: str, device_name: str, memory_gib: float) -> list[Record]:
    """Records of running out of memory that earlier sweeps left in these folders of runs, as far as they count here: of
    this device, of a host with no less memory, and of this code unless `reuse=any`; none with `reuse=never`."""
    if reuse == "never":
        return []
    found = []
    for path in sorted(path for folder in set(folders) for path in folder.glob("*/record.json")):
        try:
            record = Record.read(path.parent)
        except ValueError:  # set aside, with a word, when its run is made
            continue
        if record is None or record.status != "oom" or record.doubtful:
            continue
        if record.env.get("device_name") != device_name:
            continue
        same_host = record.env.get("memory_gib", 0.0) >= 0.99 * memory_gib  # a virtual machine's total wanders
        if (reuse == "any" or record.code_hash == code_hash()) and same_host:
            found.append(record)
    return found
