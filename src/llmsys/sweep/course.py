"""The course of a sweep: what runs next, given what has been seen. Nothing here touches a device or a task."""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsys import device, dispatch, schema
from llmsys.dispatch import memory_limit
from llmsys.dispatch.needs import Need
from llmsys.dispatch.show import Show
from llmsys.dispatch.stop import Stop
from llmsys.job import Job, Record
from llmsys.sweep import memory, order, predict, prune
from llmsys.sweep.cells import Cell, Make, cell, cells, write
from llmsys.sweep.parallel import Unit, together
from llmsys.sweep.search import Bracket, next_probe
from llmsys.sweep.settings import Config, changed, get, with_value

Made = tuple[Job, Record]
RAN, DID_NOT = ("ok",), ("oom", "unsupported")


@dataclass(frozen=True)
class Found:
    """What a search found of one combination: the largest value that ran (0: none) with its record, and the smallest
    that did not (None: it ran up to the limit) with why. `verified`: it ran for `sweep.verify_steps`, so that its times
    are more than those of a step or two."""

    combination: Job
    largest: int
    record: Record | None
    smallest: int | None
    why: str
    probes: int
    verified: bool


class Course:
    """One sweep over `configs`. `run` yields each job with its record; `records`, `references`, `found` grow with it.

    ValueError, before anything starts, for a mistake in any config, where no combination can be, and where configs have
    different settings of the sweep itself.
    """

    def __init__(self, configs: Sequence[Config], make: Make, show: Show) -> None:
        self.settings = _agreed(configs)
        self.cells = cells(configs, make)
        self.records: dict[str, Made] = {}
        self._first: Cell | None = None
        """That ran well, of those that are run again."""
        self.found: list[Found] = []
        self._make, self._show = make, show
        self._witnesses = prune.Witnesses(self.settings.monotone)
        self._possible = [each for each in self.cells if not each.fault]
        self._ran = 0
        """Runs that were really made in this session."""
        self._lock = threading.Lock()
        """Of what runs at the same time see of each other."""
        first = self._possible[0].job.config
        self._kind, device_name = device.resolve(first["hardware"]["device"])
        look = functools.partial(memory.read, self._kind)
        self._baseline = memory.Baseline(self.settings.baseline_gib, self.settings.baseline_timeout_s, look)
        for key in self.settings.monotone:
            if not any(isinstance(get(each.job.config, key), int | float) for each in self._possible):
                raise ValueError(f"sweep.monotone={key}: is no number in any of these runs")
        if self.settings.prune:
            host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
            folders = {Path(each.job.out).parent for each in self._possible}
            for record in prune.kept(folders, reuse=first["reuse"], device_name=device_name, memory_gib=host):
                self._witnesses.see(record)
        self._plan = [] if self.settings.search == "max" else self._planned()

    def run(self) -> Iterator[Made]:
        """Makes the runs, yielding each as it ends. KeyboardInterrupt passes through, after the run that it ended."""
        if said := next(filter(None, (memory_limit.ignored(each.job.config) for each in self._possible)), ""):
            self._show.note(said)
        impossible = [each for each in self.cells if each.fault]
        total = 0 if self.settings.search == "max" else len(impossible) + len(self._plan)
        for number, each in enumerate(impossible, 1):
            yield from self._one(each, number, total, Stop())
        units = self._searches() if self.settings.search == "max" else self._turns(len(impossible), total)
        if any(each.job.config["dispatch"]["kind"] == "ray" for each in self._possible):
            yield from together(units)
        else:
            for unit in filter(None, units):
                yield from unit.run(Stop())
        places = {each.job.run_id: place for place, each in enumerate(self._possible)}
        self.found.sort(key=lambda found: places[found.combination.run_id])

    def _planned(self) -> list[Cell]:
        """Every run of a grid but the references, in order, and all made: a mistake in one stops everything."""
        possible, settings = self._possible, self.settings
        costs = [predict.peak_bytes(each.job.config) if settings.order == "predicted" else None for each in possible]
        points = [prune.point(each.job.config, settings.monotone) for each in possible]

        def places(repeat: int) -> list[int]:
            if settings.order == "shuffled":
                return order.shuffled(len(possible), settings.seed, repeat)
            return order.ascending(costs, points) if settings.order == "predicted" else list(range(len(possible)))

        return [
            self._repeated(possible[place], repeat)
            for place, repeat in order.rounds(settings.repeats, places)
            if not (repeat and possible[place].config.get("repeat"))  # a repeat that was asked for is one run
        ]

    def _repeated(self, each: Cell, repeat: int) -> Cell:
        return cell(changed(each.config, repeat=repeat), self._make) if repeat else each

    def _turns(self, before: int, total: int) -> Iterator[Unit[Made] | None]:
        """The runs of the plan. After every `reference_every` that were really made, and after the last one, the first
        cell that ran well is run once more; its repeats that an earlier session left are taken along."""
        since, again, every = 0, self.settings.repeats, self.settings.reference_every
        for number, each in enumerate(self._plan, before + 1):
            yield self._unit(each, number, total)
            if number == total:
                yield None  # what is said below is said of all runs
            if self._first is None and every:
                seen = self._plan[: number - before]
                self._first = next((one for one in seen if self._status(one) == "ok"), None)
                while self._first and dispatch.finished((left := self._repeated(self._first, again)).job):
                    yield self._unit(left, number, total)
                    again += 1
            ran = self._ran - since
            if self._first and ran and (ran >= every or number == total):
                yield self._unit(self._repeated(self._first, again), number, total)
                since, again = self._ran, again + 1

    @property
    def references(self) -> list[Record]:
        """Of the cell that is run again and again, all runs."""
        if self._first is None:
            return []
        own = self._first.job.config
        return [record for job, record in self.records.values() if _same(job.config, own)]

    def _unit(self, each: Cell, number: int, total: int) -> Unit[Made]:
        return Unit(functools.partial(self._one, each, number, total), functools.partial(room, each.job))

    def _status(self, each: Cell) -> str:
        """None yet of a run that has not ended."""
        made = self.records.get(each.job.run_id)
        return made[1].status if made else ""

    def _searches(self) -> Iterator[Unit[Made]]:
        """Of each combination the largest value that runs."""
        numbers = itertools.count(len(self.cells) - len(self._possible) + 1)
        for each in self._possible:
            yield Unit(functools.partial(self._largest, each, numbers), functools.partial(room, each.job))

    def _largest(self, combination: Cell, numbers: Iterator[int], stop: Stop) -> Iterator[Made]:
        settings, key = self.settings, self.settings.search_key
        outcomes: dict[int, bool] = {}
        records: dict[int, Record] = {}
        ended = ""

        def probe(value: int, steps: int | None = None) -> Iterator[Made]:
            nonlocal ended
            config = with_value(combination.config, key, value, combination.job.config)
            if steps:
                config = changed(config, train__steps=steps)
            for job, record in self._one(cell(config, self._make), next(numbers), 0, stop):
                yield job, record
                outcomes[value] = record.status in RAN
                records[value] = record
                refused = record.status == "skipped" and record.reason in ("witness", "memory")
                if not (outcomes[value] or refused or record.status in DID_NOT):
                    ended = f"{record.status} ({record.reason})"

        start = self._start(combination)
        steps = max(settings.verify_steps, combination.config["train"]["steps"])
        verified: set[int] = set()
        while not ended:
            bracket = Bracket.of(outcomes)
            value = next_probe(bracket, start, settings.search_limit, settings.search_within)
            if value is not None:
                yield from probe(value)
            elif bracket.ran and bracket.ran not in verified and steps > combination.config["train"]["steps"]:
                verified.add(bracket.ran)
                yield from probe(bracket.ran, steps)
            else:
                break
        bracket = Bracket.of(outcomes)
        best = records.get(bracket.ran)
        failed = records.get(bracket.failed) if bracket.failed else None
        why = f"{failed.status} ({failed.reason})" if failed else ""
        self.found.append(
            Found(
                combination=combination.job,
                largest=bracket.ran,
                record=best,
                smallest=bracket.failed,
                why=why,
                probes=len(outcomes),
                verified=best is not None and 0 < settings.verify_steps <= best.config["train"]["steps"],
            )
        )

    def _start(self, combination: Cell) -> int:
        """Where a search begins: the largest value that is predicted to fit; 1 where the device does not say into
        what."""
        settings, resolved = self.settings, combination.job.config

        def needs(value: int) -> int | None:
            return predict.peak_bytes(with_value(resolved, settings.search_key, value))

        try:
            if resolved["dispatch"]["kind"] == "ray":
                raise memory.NotKnown("how much memory the nodes' devices have is not asked")
            reading = memory.read(self._kind)
        except memory.NotKnown as error:
            self._show.note(f"{settings.search_key}: the search begins at 1: {error}")
            return 1
        return predict.largest(needs, predict.room_bytes(resolved, min(reading.total)), settings.search_limit)

    def _one(self, each: Cell, number: int, total: int, stop: Stop) -> Iterator[Made]:
        """One cell: as it was left, or not run and why, or run."""
        waited: dict[str, Any] = {}

        def instead(job: Job) -> Record | None:
            with self._lock:
                return decided(job)

        def decided(job: Job) -> Record | None:
            if each.fault:
                return write(job, "unsupported", "contradiction", each.fault)
            if self.settings.prune and (witness := self._witnesses.against(job.config)):
                return write(job, "skipped", "witness", self._witnesses.why(job.config, witness))
            if job.config["dispatch"]["kind"] != "ray":  # there nobody knows before on which node it will be
                waited.update(self._baseline.wait())
            if waited.get("clean") is False and self._kind != "cpu":
                return write(job, "skipped", "baseline", memory.why_not(waited))
            if not waited.get("clean", True):
                self._show.note(f"      {memory.doubt(waited)}")
            self._ran += 1
            return None

        for record in dispatch.submit([each.job], self._show, number, total, instead, stop):
            if waited:
                record.env["sweep"] = waited
                if not waited["clean"]:
                    record.notes["baseline"] = memory.doubt(waited)
                record.write(Path(each.job.out))
            with self._lock:
                self._witnesses.see(record)
                self.records[record.run_id] = each.job, record
            yield each.job, record


def room(job: Job) -> int:
    """How many runs like this one may be made at once."""
    if job.config["dispatch"]["kind"] != "ray":
        return 1
    from llmsys.dispatch import ray

    given = int(job.config["dispatch"]["max_parallel"])
    there = Need.of(job.config).runs(ray.nodes())
    return min(given, there) if given else there


def _agreed(configs: Sequence[Config]) -> schema.Sweep:
    """The settings of the sweep; ValueError where its configs differ in them."""
    first = configs[0].get("sweep", {})
    for config in configs:
        for key, value in config.get("sweep", {}).items():
            if value != first.get(key):
                raise ValueError(f"sweep.{key}={value}: one sweep has one; it also has {first.get(key)}")
    return schema.Sweep(**first)


def _same(one: Config, other: Config) -> bool:
    """Whether two configs are repeats of one cell."""
    leave = ("repeat", "command")
    return {k: v for k, v in one.items() if k not in leave} == {k: v for k, v in other.items() if k not in leave}
