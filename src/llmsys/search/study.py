"""Trials of one search: asked for, run, told of, and given up early where they do badly."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from llmsys import dispatch, schema
from llmsys.dispatch.show import Show
from llmsys.dispatch.stop import Stop
from llmsys.errors import Contradiction
from llmsys.job import Job, Record
from llmsys.nearest import nearest
from llmsys.search import space
from llmsys.search.pruned import PRUNED, PrunedRun
from llmsys.sweep.parallel import Unit
from llmsys.sweep.settings import Config, changed, get
from llmsys.words import key_of

Made = tuple[Job, Record]
RUN, FAILED = "run_id", "failed"
"""Attributes of a trial: the id of its run, and that it has failed."""


@dataclass(frozen=True)
class Tried:
    """A trial that has ended. `value` of the metric, None of one that has none; `how`: ok, pruned or failed."""

    number: int
    settings: dict[str, Any]
    value: float | None
    how: str
    run_id: str


class Study:
    """Of `config`, a composed config with a search. ValueError for a mistake in it, before anything runs."""

    def __init__(self, config: Config, make: Callable[[Config], Job], show: Show) -> None:
        self.config, self._make, self._show = config, make, show
        self.settings = schema.Search(**config["search"])
        self.space = space.parse(self.settings.space)
        for key in self.space:
            group, _, last = key.rpartition(".")
            there = get(config, group) or {}
            if last not in there:
                near = nearest(last, there) if there else nearest(group, schema.SCHEMAS)
                raise ValueError(f"search.space: {key}: no such setting; {near}")
        job = make(_without_search(config))  # what is wrong with it is said now
        self.path = Path(job.out).parent / f"search-{self._id()}.journal"
        self._lock()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = JournalStorage(JournalFileBackend(str(self.path), JournalFileOpenLock(str(self.path))))
        self._study = optuna.create_study(
            study_name=self._id(),
            storage=storage,
            direction="minimize" if self.settings.direction == "minimize" else "maximize",
            pruner=_pruner(self.settings),
            load_if_exists=True,
        )
        # of a sampler that begins anew with each session, the seed must not be the same
        self._study.sampler = _sampler(self.settings, self.settings.seed + len(self._study.get_trials(deepcopy=False)))
        self._begin_again()

    def _id(self) -> str:
        """Of what is searched, where and by what; not of how many trials."""
        what = dataclasses.asdict(self.settings)
        del what["trials"]
        left_out = ("search", "command", "results", "reuse", "dispatch", "tracker")
        rest = {key: value for key, value in self.config.items() if key not in left_out}
        return hashlib.sha256(json.dumps([what, rest], sort_keys=True).encode()).hexdigest()[:12]

    def _lock(self) -> None:
        """As long as this process lives: to another, the trials that are under way here look as if nobody made them."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._locked = open(self.path.with_suffix(".lock"), "w")  # noqa: SIM115  closed with the process
        except OSError as error:
            raise ValueError(f"results={self.config['results']}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"search: another process is making it: {self.path}") from None

    def _begin_again(self) -> None:
        """Trials that an earlier session has left under way: the same settings once more, whose run goes on."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)
            self._study.enqueue_trial(trial.params)

    def units(self, room: Callable[[Job], int]) -> Iterator[Unit[Made]]:
        """The trials that are left; what the next one tries depends on those that have ended by then. `room`: how many
        runs like this one may be made at once."""
        ended = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
        for number in range(1 + sum(_counts(each) for each in ended), 1 + self.settings.trials):
            trial = self._study.ask(self.space)
            config = _without_search(self.config)
            for key, value in trial.params.items():
                config = changed(config, **{key.replace(".", "__"): value})
            try:
                job = self._make(config)
            except Contradiction as error:
                self._show.note(f"[{number}/{self.settings.trials}] {trial.params}: {error}")
                trial.set_user_attr(FAILED, True)
                self._study.tell(trial, state=TrialState.FAIL)
                continue
            yield Unit(functools.partial(self._run, trial, job, number), functools.partial(room, job))

    def _run(self, trial: optuna.Trial, job: Job, number: int, stop: Stop) -> Iterator[Made]:
        watch = PrunedRun(trial, self.settings, Path(job.out), stop, self._show.note)
        for record in dispatch.submit([job], self._show, number, self.settings.trials, stop=watch.stop, watch=watch):
            self._tell(trial, job, record)
            yield job, record

    def _tell(self, trial: optuna.Trial, job: Job, record: Record) -> None:
        """A run that was interrupted is still under way for the study: the next session begins it again."""
        value = record.summary.get(self.settings.metric)
        if record.status == "interrupted":
            return
        trial.set_user_attr(RUN, job.run_id)
        if record.reason == PRUNED:
            self._study.tell(trial, state=TrialState.PRUNED)
        elif record.status == "ok" and value is not None:
            self._study.tell(trial, value)
        else:
            trial.set_user_attr(FAILED, True)
            self._study.tell(trial, state=TrialState.FAIL)
            if record.status == "ok":  # as of all trials that would follow
                raise ValueError(
                    f"search.metric={self.settings.metric}: the run is ok, and its record has no such number; "
                    f"{nearest(self.settings.metric, record.summary)}"
                )

    def tried(self) -> list[Tried]:
        """All trials that have ended, the best first."""
        found = [_tried(each) for each in self._study.get_trials(deepcopy=False) if each.state.is_finished()]
        sign = 1 if self.settings.direction == "minimize" else -1
        return sorted(found, key=lambda each: math.inf if each.value is None else sign * each.value)

    def lines(self) -> tuple[list[str], list[list[str]]]:
        """Headers and cells of a table of the trials."""
        keys = list(self.space)
        headers = ["trial", *keys, self.settings.metric, "how", "run"]
        cells = [
            [
                str(each.number),
                *(_short(each.settings.get(key)) for key in keys),
                "–" if each.value is None else f"{each.value:.6g}",
                each.how,
                each.run_id or "–",
            ]
            for each in self.tried()
        ]
        return headers, cells

    def best(self) -> str:
        """The command that makes the best trial's run; "" where none has ended well."""
        first = next(iter(self.tried()), None)
        if first is None or first.value is None:
            return ""
        words = _without_search(self.config)["command"]
        return " ".join(["python -m llmsys", *words, *(f"{key}={value}" for key, value in first.settings.items())])


def _without_search(config: Config) -> Config:
    """What each trial's run is made of: the search is no part of it."""
    words = [word for word in config.get("command", []) if key_of(word).partition(".")[0] != "search"]
    return {**{key: value for key, value in config.items() if key != "search"}, "command": words}


def _counts(trial: FrozenTrial) -> bool:
    """Whether an ended trial is one of those asked for: not if it was killed, and is begun again."""
    return trial.state != TrialState.FAIL or FAILED in trial.user_attrs


def _tried(trial: FrozenTrial) -> Tried:
    how = {TrialState.COMPLETE: "ok", TrialState.PRUNED: PRUNED}.get(trial.state, "failed")
    value = trial.value if trial.state == TrialState.COMPLETE else None
    return Tried(trial.number, dict(trial.params), value, how, trial.user_attrs.get(RUN, ""))


def _sampler(settings: schema.Search, seed: int) -> optuna.samplers.BaseSampler:
    startup = settings.startup
    if settings.sampler == "tpe":
        return optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed)
    if settings.sampler == "cmaes":
        return optuna.samplers.CmaEsSampler(n_startup_trials=max(1, startup), seed=seed)
    if settings.sampler == "qmc":
        return optuna.samplers.QMCSampler(seed=seed, warn_independent_sampling=False)
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(settings: schema.Search) -> optuna.pruners.BasePruner:
    if settings.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=settings.startup)
    if settings.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner()
    if settings.pruner == "successive_halving":
        return optuna.pruners.SuccessiveHalvingPruner()
    return optuna.pruners.NopPruner()


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
