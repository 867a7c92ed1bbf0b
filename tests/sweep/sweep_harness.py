"""A machine that needs no processes: what a run would come to is a function of its config, and its record is real."""

from __future__ import annotations

import copy
import datetime
import io
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmsys import compose, device, dispatch, job, main
from llmsys.dispatch.show import Show
from llmsys.job import Job, Record
from llmsys.sweep.course import Course
from llmsys.sweep.settings import Config

Ending = tuple[str, str]
BASE = ("train.threads=1", "train.steps=3", "data.num_examples=40")


@cache
def _composed(*overrides: str) -> Config:
    return compose.compose([*BASE, *overrides])


def configs(results: Path, *overrides: str, **axes: Sequence[Any]) -> list[Config]:
    """The combinations of `axes` (`train__length=[8, 16]`), over one composed config."""
    made = [{**_composed(*overrides), "results": str(results)}]
    for name, values in axes.items():
        group, key = name.split("__")
        made = [_with(config, group, key, value) for config in made for value in values]
    return made


def _with(config: Config, group: str, key: str, value: Any) -> Config:
    config = copy.deepcopy(config)
    config[group][key] = value
    if key == "micro_batch":
        config[group]["global_batch"] = value * config["train"]["world"]
    return config


class Machine:
    """Stands in for `dispatch.process.run`. `ends(config)`: (status, reason) of a run. `step_ms(n)`: of the n-th run
    made.

    `made`: the configs of the runs that were really made, in order; `stop_after`: Ctrl-C in the run after so many.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, ends: Callable[[Config], Ending] = lambda _: ("ok", "")
    ) -> None:
        self.ends = ends
        self.step_ms: Callable[[int], float] = lambda n: 100.0
        self.made: list[Config] = []
        self.stop_after: int | None = None
        monkeypatch.setitem(dispatch._PLACES, "process", self._run)

    def _run(self, job: Job, progress: Callable[[dict[str, Any]], None], lock: int, stop: object) -> Record:
        stopped = self.stop_after == len(self.made)
        self.made.append(job.config)
        record = ended(job, *(("interrupted", "signal") if stopped else self.ends(job.config)))
        number = len(self.made)
        record.started = (datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC) + number * MINUTE).isoformat()
        if record.status == "ok":
            ms = self.step_ms(number)
            record.summary = {"step_ms_p50": ms, "tokens_per_s": 1e6 / ms}
        record.write(Path(job.out))
        if stopped:
            raise KeyboardInterrupt
        return record


def ended(job: Job, status: str, reason: str) -> Record:
    """The record of a run of `job` on this machine that has ended so."""
    record = Record.begin(job)
    record.status, record.reason, record.error = status, reason, ""
    record.env = {"device": "cpu", "device_name": device.cpu_name(), "memory_gib": 1e6}
    return record


MINUTE = datetime.timedelta(minutes=1)


def course(made: Sequence[Config], show: Show | None = None) -> Course:
    """A sweep that is shown to nobody, unless to `show`."""
    return Course(made, main.make_job, show or Show(nowhere()))


def nowhere() -> Console:
    return Console(file=io.StringIO())


def statuses(course: Course, key: str) -> list[tuple[Any, str, str]]:
    """(value of a dotted key, status, reason) of every run, in order of their ending."""
    group, name = key.split(".")
    return [(j.config[group][name], record.status, record.reason) for j, record in course.run()]


def written(results: Path) -> list[Record]:
    found = (Record.read(path.parent) for path in sorted(results.rglob("record.json")))
    return [record for record in found if record is not None]


__all__ = ["BASE", "Course", "Machine", "configs", "course", "ended", "job", "nowhere", "statuses", "written"]
