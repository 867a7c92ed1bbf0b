"""What the broker sends of a job: stages, their programs, their state, and a step's inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llmsys.decentral.broker import State
from llmsys.decentral.cutting import Cutting
from llmsys.decentral.holdings import chunks
from llmsys.decentral.planes import CONSTANT, EXPORTERS, Arrays, key_of
from llmsys.decentral.saying import Tell
from llmsys.decentral.stage_work import INPUT
from llmsys.decentral.training import Training
from llmsys.decentral.wire import Array


class Handing:
    """Of `training`. `unfit`: who cannot run what is theirs to run, and why."""

    def __init__(self, training: Training, tell: Tell) -> None:
        self.training, self._tell = training, tell
        self.unfit: dict[str, str] = {}

    def described(self, cutting: Cutting, index: int) -> dict[str, Any]:
        """A stage, for whoever is to compute it."""
        return {
            "stage": cutting.stages[index].to_json(),
            "graph": cutting.parts[index].to_json(),
            "rules": dataclasses.asdict(self.training.rules),
            "count": len(cutting.stages),
            "claims": self.training.checks > 0,
            "codecs": dataclasses.asdict(cutting.codecs),
            "noise": self._noise(cutting, index),
        }

    def _noise(self, cutting: Cutting, index: int) -> dict[str, Any] | None:
        """Its key is told to those alone who have a stage that adds it."""
        own, names = self.training.noise, cutting.noisy(index)
        return None if own is None or not names else {**dataclasses.asdict(own), "names": names}

    def programs(self, name: str, cutting: Cutting, index: int, state: State) -> Arrays | None:
        """What is exported of it for a provider's plane. None: not yet."""
        place = state.place(name)
        assert place is not None
        plane, exports = state.providers[place].plane, self.training.exports
        if plane not in EXPORTERS:
            return {}
        try:
            if exports is None:
                raise ValueError("this job exports nothing")
            return exports(plane, cutting, index)
        except ValueError as error:
            self.unfit[name] = f"plane={plane}: {error}"
            return None

    def constants(self, cutting: Cutting, index: int, held: Collection[str]) -> dict[str, Array]:
        """Of a stage, those that somebody needs who holds the names `held`."""
        own = {CONSTANT + key: self.training.tensors[key] for key in cutting.stages[index].constants}
        return {name: each for name, each in own.items() if name not in held}

    def first(self, name: str, names: Sequence[str], *, begin: bool) -> None:
        """State as it is before the first step; `begin`: and that is all."""
        if not (names or begin):
            return
        state = {each: self.training.tensors[key_of(each, self.training.rules)] for each in names}
        self.over(name, state, {"begin": begin})

    def over(self, name: str, state: Arrays, body: Mapping[str, Any], step: int | None = None) -> None:
        """State, in pieces; `begin` with the last of them."""
        cut = [*chunks(state)]
        for at, piece in enumerate(cut):
            told = {key: each for key, each in body.items() if key != "begin" or at == len(cut) - 1}
            self._tell(name, "state", step=step, body={**told, "piece": at, "of": len(cut)}, tensors=piece)

    def inputs(self, name: str, cutting: Cutting, index: int, step: int) -> None:
        """The job's own, of a step, as far as a stage has any."""
        own = cutting.stages[index].inputs
        if not own:
            return
        for at, arrays in enumerate(self.training.data(step)):
            body = {"cutting": cutting.number, "stage": index}
            self._tell(name, INPUT, step=step, body=body, tensors={key: arrays[key] for key in own}, micro_batch=at)
