"""Where the state of a job is, and how it gets to where a plan wants it.

With each plan providers say what they have: stages as they are after the last committed step, and copies. What an owner
lacks others give it. What nobody has is computed again: one provider gets an older copy of a lost stage, what the
stage's neighbours had sent it since, and the job's own inputs, and ends where the stage had been. No step begins before
all that is there for whatever stage may be lost next.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmsys.decentral.broker import State
from llmsys.decentral.compression import Codecs
from llmsys.decentral.cutting import Cutting, lost, sources
from llmsys.decentral.holdings import Holdings, Place, chunks
from llmsys.decentral.planes import CONSTANT, EXPORTERS, PARAMETER, VARIABLE, Arrays, key_of, value_of
from llmsys.decentral.provider import BROKER
from llmsys.decentral.stage_work import INPUT
from llmsys.decentral.training import Training, Update
from llmsys.decentral.wire import Array, Frame


class JobLost(RuntimeError):
    """Nobody has what the job needs to go on, and nobody can compute it again."""


@dataclass(kw_only=True)
class Told:
    """What providers have said since the epoch began; `plan`: who is told of it; `due` of them, with their stages:
    who is not told yet, as what is sent with the stage is still being made; `waiting`: so is something else."""

    plan: set[str] = field(default_factory=set)
    due: dict[str, int | None] = field(default_factory=dict)
    waiting: bool = False
    gathering: bool = False
    holds: dict[str, set[str]] = field(default_factory=dict)
    stages: dict[Place, str] = field(default_factory=dict)
    copies: dict[Place, dict[int, set[str]]] = field(default_factory=dict)
    since: dict[Place, int] = field(default_factory=dict)
    asked: dict[str, set[str]] = field(default_factory=dict)
    copying: bool = False
    reviving: dict[int, str] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)
    results: tuple[Any, ...] = ()


def owners(state: State) -> list[str]:
    """Of stages, in their order, by the plan."""
    assert state.plan is not None
    (pipeline,) = state.plan.pipelines
    return [state.providers[p].name for p in pipeline.order]


def copies_every(state: State, cutting: Cutting | None, copies: int) -> int:
    """Steps between two copies of the stages' state, so that no line is busy with them for more than `COPYING` of the
    time; in between neighbours keep what they have sent, from which a lost stage is computed again."""
    assert state.plan is not None
    assert cutting is not None
    (pipeline,) = state.plan.pipelines
    busy_s = 0.0
    for p, names, graph in zip(pipeline.order, cutting.names, cutting.parts, strict=True):
        nbytes = sum(value_of(graph, name, cutting.rules).nbytes for name in names if not name.startswith(CONSTANT))
        busy_s = max(busy_s, copies * nbytes * 8e-6 / state.providers[p].up_mbit)
    return max(1, min(MOST_BETWEEN, math.ceil(busy_s / (COPYING * state.plan.score.step_s))))


COPYING = 0.5
MOST_BETWEEN = 64


class Recovery:
    """Of `training`; `tell(name, kind, step=, body=, tensors=, micro_batch=)` sends a frame. `state` is the broker's,
    `leaving` are those without a stage who are still there to hand over what they have."""

    def __init__(self, training: Training, tell: Callable[..., None]) -> None:
        self.training, self._tell = training, tell
        self.cutting: Cutting | None = None
        self.base: Cutting | None = None  # by which the last step was computed
        self.cuttings: dict[int, Cutting] = {}
        self.told = Told()
        self.keepers: dict[str, list[str]] = {}
        self.safe = 0
        self.every = 1
        self.updates: dict[int, Update] = {}
        self.gathered: dict[str, Array] = {}
        self.kept = Holdings()
        self.unfit: dict[str, str] = {}  # who cannot run what is theirs to run, and why

    # --- a plan ---

    def cut(self, state: State) -> None:
        """As the plan says; a model that is cut so already, with stages that send what they send so, stays as it is."""
        if state.plan is None:
            return
        (pipeline,) = state.plan.pipelines
        codecs = Codecs.of(state.costs, pipeline.order, pipeline.cuts)
        if self.cutting is None or (self.cutting.cuts, self.cutting.codecs) != (pipeline.cuts, codecs):
            own, private = self.training, state.job.work.private
            self.cutting = Cutting(state.epoch, own.graph, own.chain, pipeline.cuts, own.rules, codecs, private)
            self.cuttings[self.cutting.number] = self.cutting

    def based(self) -> None:
        """A step begins by the model as it is cut now."""
        assert self.cutting is not None
        self.base = self.cutting
        self.cuttings = {self.cutting.number: self.cutting}

    def plan(self, state: State, leaving: Collection[str]) -> None:
        """Tells everybody what is theirs to do in this epoch, and so asks what they have."""
        self.cut(state)
        if state.plan is None:
            return
        self.told = Told()
        self._own_copies(state)
        order = owners(state)
        self.keepers = self.keepers_of(state)
        self.every = self.training.copy_every or copies_every(
            state, self.cutting, self.training.copies + self.training.owner_keeps
        )
        for name in sorted({*state.present, *leaving}):
            index = order.index(name) if name in order else None
            self.told.plan.add(name)
            self.told.due[name] = index
        self.tell_due(state, leaving)

    def _own_copies(self, state: State) -> None:
        """What the broker itself has, as providers say what they have."""
        self.kept.partial.clear()
        for place, steps in self.kept.copies.items():
            for step in steps:
                self.told.copies.setdefault(place, {}).setdefault(step, set()).add(BROKER)
        self.told.holds[BROKER] = {name for steps in self.kept.copies.values() for name in steps.get(state.step, ())}

    def keep(self, frame: Frame, state: State) -> None:
        """A piece of a copy that the broker keeps: the last that is left, whoever goes. ValueError where it is not from
        the stage's owner, or of a step that is none."""
        place = (int(frame.body["keep"][0]), int(frame.body["keep"][1]))
        self._theirs(place, frame, state, [frame.sender])
        piece, of = int(frame.body["piece"]), int(frame.body["of"])
        if self.kept.keep(place, frame.step, frame.tensors, piece=piece, of=of):
            self._copied(place, frame.step, BROKER)

    def drop(self) -> None:
        """What the broker keeps that nobody asks for any more."""
        assert self.cutting is not None
        self.kept.copies = {place: own for place, own in self.kept.copies.items() if place[0] == self.cutting.number}
        if own := self._kept_here():
            self.kept.drop(max(own))
        self.told.since = {place: max(since, self.safe) for place, since in self.told.since.items()}

    def _kept_here(self) -> set[int]:
        """Steps of which the broker itself has all stages, as the model is cut now."""
        assert self.cutting is not None
        places = [(self.cutting.number, at) for at in range(len(self.cutting.stages))]
        return set.intersection(*(set(self.kept.copies.get(place, {})) for place in places))

    def tell_due(self, state: State, leaving: Collection[str]) -> None:
        """Of the plan, those whose stage is ready to be sent; and goes on with what waited for such a thing."""
        if state.plan is None:
            return
        told, order = self.told, owners(state)
        for name, index in [*told.due.items()]:
            given = {} if index is None else self._given(name, self.cutting, index, state)
            if given is not None:
                del told.due[name]
                self._tell(name, "plan", body=self._stage(index, order), tensors=given)
        if told.waiting:
            told.waiting = False
            self.move(state, leaving)

    def keepers_of(self, state: State) -> dict[str, list[str]]:
        """Of each owner, who keep its copies: first those in the pool, who may take one over; and the broker."""
        order = owners(state)
        spares = sorted(state.present - set(order))
        found = {}
        for at, name in enumerate(order):
            turned = [*spares[at % max(1, len(spares)) :], *spares[: at % max(1, len(spares))]]
            others = [*turned, *order[at + 1 :], *order[:at]]
            if self._private(self.cutting, at, state):
                others = [each for each in others if self._trusted(each, state)]
            found[name] = [each for each in others if each in state.present][: self.training.copies]
            found[name] += [BROKER] if self.training.owner_keeps else []
        return found

    def kept_by_others(self, state: State) -> None:
        """Where somebody who kept copies has gone."""
        keepers = self.keepers_of(state)
        if keepers == self.keepers:
            return
        self.keepers, self.told.copying = keepers, False
        for name, names in keepers.items():
            self._tell(name, "keepers", body={"keepers": names})

    def _stage(self, index: int | None, order: Sequence[str]) -> dict[str, Any]:
        assert self.cutting is not None
        common = {"cutting": self.cutting.number, "peers": list(order), "every": self.every}
        if index is None:
            return {**common, "stage": None, "keepers": [], "rules": None}
        return {**common, **self._described(self.cutting, index), "keepers": self.keepers[order[index]]}

    def _described(self, cutting: Cutting, index: int) -> dict[str, Any]:
        return {
            "stage": cutting.stages[index].to_json(),
            "graph": cutting.parts[index].to_json(),
            "rules": dataclasses.asdict(self.training.rules),
            "count": len(cutting.stages),
            "codecs": dataclasses.asdict(cutting.codecs),
            "noise": self._noise(cutting, index),
        }

    def _noise(self, cutting: Cutting, index: int) -> dict[str, Any] | None:
        """Its key is told to those alone who have a stage that adds it."""
        own, names = self.training.noise, cutting.noisy(index)
        return None if own is None or not names else {**dataclasses.asdict(own), "names": names}

    def _given(self, name: str, cutting: Cutting | None, index: int, state: State) -> Arrays | None:
        """What a provider is sent with a stage: what is exported for its plane. None: not yet."""
        assert cutting is not None
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

    # --- what is where ---

    def have(self, frame: Frame) -> None:
        """What a provider says that it has."""
        body, name, told = frame.body, frame.sender, self.told
        holds = told.holds.setdefault(name, set())
        for number, index, since, lacks in body["stages"]:
            if number in self.cuttings:  # else it is of a plan that nobody asks for any more
                if since >= 0:
                    told.stages[number, index] = name
                    told.since[number, index] = int(since)
                holds |= self.cuttings[number].names[index] - set(lacks)
        for number, index, steps in body["copies"]:
            if number in self.cuttings:
                for step in steps:
                    told.copies.setdefault((number, index), {}).setdefault(int(step), set()).add(name)
                if frame.step in steps:
                    holds |= {each for each in self.cuttings[number].names[index] if not each.startswith(CONSTANT)}
        holds |= set(body["constants"])

    def revived(self, frame: Frame) -> None:
        """A stage that was lost is there again."""
        body, name, told = frame.body, frame.sender, self.told
        place = (int(body["cutting"]), int(body["stage"]))
        told.stages[place], told.since[place] = name, int(body["since"])
        told.holds[name] |= self.cuttings[place[0]].names[place[1]]

    def copied(self, frame: Frame, state: State) -> None:
        """Somebody keeps a copy. ValueError where it is not theirs to keep, or of a step that is none."""
        place = (int(frame.body["cutting"]), int(frame.body["stage"]))
        self._theirs(place, frame, state, [name for name, keep in self.keepers.items() if frame.sender in keep])
        self._copied(place, frame.step, frame.sender)

    def _theirs(self, place: Place, frame: Frame, state: State, names: Collection[str]) -> None:
        """ValueError where none of `names` has that stage, or the step has not been committed."""
        order, cutting = owners(state), self.cutting
        there = cutting is not None and place[0] == cutting.number and 0 <= place[1] < len(order)
        if not there or order[place[1]] not in names or not 0 <= frame.step <= state.step:
            raise ValueError(f"a copy of stage {place} as it is after step {frame.step}: is not theirs")

    def _copied(self, place: Place, step: int, who: str) -> None:
        """Perhaps that makes an older step one that nobody asks for any more."""
        told = self.told
        told.copies.setdefault(place, {}).setdefault(step, set()).add(who)
        if self.cutting is not None:
            places = [(self.cutting.number, at) for at in range(len(self.cutting.stages))]
            self.safe = max(self.safe, *(set.intersection(*(set(told.copies.get(each, {})) for each in places)) or {0}))

    def prepared(self, frame: Frame, state: State) -> None:
        """An owner's gradients are there. ValueError for what it cannot say of them."""
        assert self.cutting is not None
        body, order = frame.body, owners(state)
        stage = self.cutting.stages[order.index(frame.sender)]
        squares = {str(key): math.nan if value is None else float(value) for key, value in body["squares"].items()}
        mine = {key for key in stage.parameters if key not in stage.shares}
        if not set(squares) <= mine or any(value < 0 for value in squares.values()):
            raise ValueError("prepared: squares of gradients that are none of its own")
        self.told.squares |= squares
        if body["results"]:
            self.told.results = self.training.checked(body["results"])

    def held(self, frame: Frame, state: State) -> None:
        """An owner has the state of its stage."""
        assert self.cutting is not None
        self.told.since[self.cutting.number, owners(state).index(frame.sender)] = int(frame.body["since"])

    def guarded(self, state: State) -> bool:
        """Whether whatever stage is lost could be computed again: of some step each has a copy with somebody else than
        its owner, and all that was sent since is still there. Nobody begins a step before; alone there is nobody
        else, and without copies nobody would keep one. The broker has one of each before, too, where it keeps any, so
        that all may go. Asks for copies where they are needed."""
        assert self.cutting is not None
        order, told = owners(state), self.told
        last_left = not self.training.owner_keeps or bool(self._kept_here())
        if not any(self.keepers.values()) or (last_left and self._common(state) is not None):
            return True
        if not told.copying:
            told.copying = True
            for name in order:
                self._tell(name, "copy")
        return False

    def _common(self, state: State) -> int | None:
        """The last step of which all these stages, as the model is cut now, have copies with others that are there,
        and that no owner of the others has begun after."""
        assert self.cutting is not None
        number, told, order = self.cutting.number, self.told, owners(state)
        steps = [
            {
                at
                for at, who in told.copies.get((number, index), {}).items()
                if who & (state.present | {BROKER}) - {order[index]}
            }
            for index in range(len(order))
        ]
        since = max((told.since.get((number, index), state.step) for index in range(len(order))), default=0)
        return max((at for at in set.intersection(*steps) if at >= since), default=None)

    def gather(self, state: State) -> None:
        """After the last step: asks owners for the model that has been trained, once in an epoch."""
        assert self.cutting is not None
        if self.told.gathering:
            return
        self.told.gathering = True
        for index, name in enumerate(owners(state)):
            names = sorted(self._results(index) - set(self.gathered))
            self._tell(name, "give", body={"names": names, "who": BROKER})

    def collect(self, frame: Frame, state: State) -> None:
        """What an owner gives of the trained model. ValueError for what was not asked for, or is another."""
        order, own = owners(state), self.training
        results = self._results(order.index(frame.sender)) if self.told.gathering and frame.sender in order else set()
        for name, array in frame.tensors.items():
            value = value_of(own.graph, name, own.rules) if name in results else None
            if value is None or (array.dtype, array.shape) != (value.dtype, value.shape):
                raise ValueError(f"state {name}: was not asked for, or is another")
        self.gathered |= frame.tensors

    @property
    def gathered_all(self) -> bool:
        """Whether every parameter and variable is here."""
        stages = () if self.cutting is None else self.cutting.stages
        return bool(stages) and all(self._results(at) <= set(self.gathered) for at in range(len(stages)))

    def _results(self, index: int) -> set[str]:
        """Of a stage, which names of the model are its to give."""
        assert self.cutting is not None
        own = self.cutting.stages[index]
        if self.training.rules.streams:
            return set()  # what has been generated is here already
        keys = {PARAMETER: [key for key in own.parameters if key not in own.shares], VARIABLE: own.variables}
        return {prefix + key for prefix, names in keys.items() for key in names}

    def move(self, state: State, leaving: Collection[str]) -> None:
        """Asks for what owners lack and somebody has, and has computed again what nobody has. As far as all who are
        there have said what they have."""
        told, cutting = self.told, self.cutting
        if cutting is None or (told.plan & {*state.present, *leaving}) - set(told.holds):
            return
        there = {name: frozenset(names) for name, names in told.holds.items()}
        everything = frozenset().union(*there.values())
        missing = set[str]()
        for index, name in enumerate(owners(state)):
            wanted = cutting.names[index] - there.get(name, frozenset()) - told.asked.setdefault(name, set())
            if state.step == 0:
                self._initial(name, cutting, index)
                told.asked[name] |= wanted
                continue
            others = {each: names for each, names in there.items() if each != name}
            for source, names in sources(wanted, others).items():
                if source == BROKER:
                    self._hand_over(name, self.kept.found(names, state.step), {})
                else:
                    self._tell(source, "give", body={"names": names, "who": name})
                told.asked[name] |= set(names)
            nowhere = wanted - everything
            constants = sorted(each for each in nowhere if each.startswith(CONSTANT))
            self._hand_out(name, constants, begin=False)  # what never changes the broker still has
            told.asked[name] |= set(constants)
            missing |= nowhere - set(constants)
        if missing:
            self._revive(missing, state)

    def _initial(self, name: str, cutting: Cutting, index: int) -> None:
        """Before the first step the broker has it all."""
        own = [each for each in sorted(cutting.names[index]) if each.startswith((PARAMETER, VARIABLE, CONSTANT))]
        if not self.told.asked[name]:
            self._hand_out(name, own, begin=True)

    def _hand_out(self, name: str, names: Sequence[str], *, begin: bool) -> None:
        if not (names or begin):
            return
        state = {each: self.training.tensors[key_of(each, self.training.rules)] for each in names}
        self._hand_over(name, state, {"begin": begin})

    def _hand_over(self, name: str, state: Arrays, body: Mapping[str, Any], step: int | None = None) -> None:
        """In pieces; `begin` with the last of them."""
        cut = [*chunks(state)]
        for at, piece in enumerate(cut):
            told = {key: each for key, each in body.items() if key != "begin" or at == len(cut) - 1}
            self._tell(name, "state", step=step, body={**told, "piece": at, "of": len(cut)}, tensors=piece)

    def _revive(self, missing: Iterable[str], state: State) -> None:
        """Has the stages computed again that have these names. JobLost where no copies of them are left."""
        base, told, until = self.base, self.told, state.step
        assert base is not None, "a step has been committed"
        wanted = [at for at in lost(base, missing) if at not in told.reviving]
        if not wanted:
            return
        every, kept, after = self._from_where(base, {*wanted, *told.reviving}, until)
        who = {at: self._reviver(base, at, state) for at in every}
        given = {at: self._given(who[at], base, at, state) for at in every}
        if None in given.values():
            told.waiting = True
            return
        for at in every:
            self._tell(
                who[at],
                "revive",
                body={
                    **self._described(base, at),
                    "cutting": base.number,
                    "after": after,
                    "until": until,
                    "updates": [[self.updates[s].rate, self.updates[s].scale] for s in range(after + 1, until + 1)],
                    "peers": {str(other): name for other, name in who.items()},
                },
                tensors=given[at],
            )
            self._tell(
                who[at],
                "state",
                step=after,
                body={"copy": [base.number, at], "piece": 0, "of": 1},
                tensors={CONSTANT + key: self.training.tensors[key] for key in base.stages[at].constants},
            )
            if who[at] not in kept[at][after]:
                near_by = kept[at][after] - {BROKER}
                if near_by:
                    copy = {"copy": [base.number, at], "who": who[at]}
                    self._tell(min(near_by), "give", step=after, body=copy)
                else:
                    own = self.kept.copies[base.number, at][after]
                    self._hand_over(who[at], own, {"copy": [base.number, at]}, after)
        told.reviving = who
        for at in every:
            for step in range(after + 1, until + 1):
                self.inputs(who[at], base, at, step)
            for other in self._neighbours(base, at) - set(every):
                body = {
                    "cutting": base.number,
                    "stage": other,
                    "for": at,
                    "who": who[at],
                    "after": after,
                    "until": until,
                }
                self._tell(told.stages[base.number, other], "resend", body=body)

    def _from_where(
        self, base: Cutting, lost: Collection[int], until: int
    ) -> tuple[list[int], dict[int, dict[int, set[str]]], int]:
        """Which stages to compute again, who keeps copies of them, by step, and the step from which all of them begin.
        A neighbour that has its state from elsewhere, and not what it has sent since that step, is one of them.
        JobLost where there is no such step."""
        told, every = self.told, set(lost)
        while True:
            kept = {
                at: {
                    step: there
                    for step, who in told.copies.get((base.number, at), {}).items()
                    if (there := who & set(told.holds))
                }
                for at in sorted(every)
            }
            common = set.intersection(*(set(each) for each in kept.values()))
            if not common:
                raise JobLost(
                    f"step {until}: stages {sorted(every)} are lost, and nobody has what they are computed again from"
                )
            after = max(common)
            near = {other for at in every for other in self._neighbours(base, at)} - every
            late = {other for other in near if told.since.get((base.number, other), until + 1) > after}
            if not late:
                return sorted(every), kept, after
            every |= late

    def _reviver(self, base: Cutting, at: int, state: State) -> str:
        """The owner that has most use for what a stage had."""
        assert self.cutting is not None
        order = owners(state)
        names, private = self.cutting.names, self._private(base, at, state)
        may = [index for index in range(len(order)) if not private or self._trusted(order[index], state)]
        return order[max(may, key=lambda index: len(names[index] & base.names[at]))]

    def _private(self, cutting: Cutting | None, at: int, state: State) -> bool:
        assert cutting is not None
        return cutting.is_private(at)

    def _trusted(self, name: str, state: State) -> bool:
        place = state.place(name)
        assert place is not None
        return state.providers[place].trusted

    def _neighbours(self, cutting: Cutting, at: int) -> set[int]:
        """Stages that send something to this one."""
        own = cutting.stages[at]
        shared = {other.index for other in cutting.stages if at in {t for to in other.tells.values() for t in to}}
        return {*own.receives.values(), *own.sends.values(), *own.hears.values()} | shared

    def inputs(self, name: str, cutting: Cutting, index: int, step: int) -> None:
        own = cutting.stages[index].inputs
        if not own:
            return
        for at, arrays in enumerate(self.training.data(step)):
            body = {"cutting": cutting.number, "stage": index}
            self._tell(name, INPUT, step=step, body=body, tensors={key: arrays[key] for key in own}, micro_batch=at)
