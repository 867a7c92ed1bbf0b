"""Where the state of a job is, and how it gets to where a plan wants it.

With each plan providers say what they have: stages as they are after the last committed step, and copies. What an owner
lacks others give it. What nobody has is computed again (`reviving`), from copies (`copies`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from llmsys.decentral.broker import State
from llmsys.decentral.compression import Codecs
from llmsys.decentral.copies import Copies
from llmsys.decentral.cutting import Cutting, sources
from llmsys.decentral.handing import Handing
from llmsys.decentral.planes import CONSTANT, PARAMETER, VARIABLE, value_of
from llmsys.decentral.reviving import Reviving
from llmsys.decentral.saying import Tell
from llmsys.decentral.training import Training, Update
from llmsys.decentral.whereabouts import Told, Whereabouts, owners
from llmsys.decentral.wire import BROKER, Array, Frame


class Recovery:
    """Of `training`. `state` is the broker's,
    `leaving` are those without a stage who are still there to hand over what they have."""

    def __init__(self, training: Training, tell: Tell) -> None:
        self.training, self._tell = training, tell
        self.where = Whereabouts()
        self.updates: dict[int, Update] = {}
        self.gathered: dict[str, Array] = {}
        self.copies = Copies(training, self.where, tell)
        self.handing = Handing(training, tell)
        self._reviving = Reviving(self.where, self.copies, self.handing, self.updates, tell)

    @property
    def told(self) -> Told:
        return self.where.told

    # --- a plan ---

    def cut(self, state: State) -> None:
        """As the plan says; a model that is cut so already, with stages that send what they send so, stays as it is."""
        if state.plan is None:
            return
        (pipeline,) = state.plan.pipelines
        where = self.where
        codecs = Codecs.of(state.costs, pipeline.order, pipeline.cuts)
        if where.cutting is None or (where.cutting.cuts, where.cutting.codecs) != (pipeline.cuts, codecs):
            own, private = self.training, state.job.work.private
            where.cutting = Cutting(state.epoch, own.graph, own.chain, pipeline.cuts, own.rules, codecs, private)
            where.cuttings[where.cutting.number] = where.cutting

    def based(self) -> None:
        """A step begins by the model as it is cut now."""
        self.where.base = self.where.now
        self.where.cuttings = {self.where.now.number: self.where.now}

    def plan(self, state: State, leaving: Collection[str]) -> None:
        """Tells everybody what is theirs to do in this epoch, and so asks what they have."""
        self.cut(state)
        if state.plan is None:
            return
        self.where.told = Told()
        self.copies.plan(state)
        order = owners(state)
        for name in sorted({*state.present, *leaving}):
            self.told.plan.add(name)
            self.told.due[name] = order.index(name) if name in order else None
        self.tell_due(state, leaving)

    def tell_due(self, state: State, leaving: Collection[str]) -> None:
        """Of the plan, those whose stage is ready to be sent; and goes on with what waited for such a thing."""
        if state.plan is None:
            return
        told, order = self.told, owners(state)
        for name, index in [*told.due.items()]:
            programs = {} if index is None else self.handing.programs(name, self.where.now, index, state)
            if programs is not None:
                del told.due[name]
                self._tell(name, "plan", body=self._stage(name, index, order), tensors=programs)
        if told.waiting:
            told.waiting = False
            self.move(state, leaving)

    def _stage(self, name: str, index: int | None, order: Sequence[str]) -> dict[str, Any]:
        common = {"cutting": self.where.now.number, "peers": list(order)}
        common["keeps"] = self.copies.keeps(name, order)
        if index is None:
            return {**common, "stage": None, "keepers": [], "rules": None}
        described = self.handing.described(self.where.now, index)
        return {**common, **described, "keepers": self.copies.keepers[order[index]]}

    # --- what is where ---

    def have(self, frame: Frame, state: State) -> None:
        """What a provider says that it has. ValueError for a stage that is none, and for what is of a step that has
        not been committed."""
        body, name, told, cuttings = frame.body, frame.sender, self.told, self.where.cuttings
        holds = told.holds.setdefault(name, set())  # nobody waits for what cannot be
        last = min(frame.step, state.step)
        for number, index, since, lacks in body["stages"]:
            if number in cuttings:  # else it is of a plan that nobody asks for any more
                _checked(cuttings[number], index, since, -1, last)
                if since >= 0:
                    told.stages[number, index] = name
                    told.since[number, index] = since
                holds |= cuttings[number].names[index] - set(lacks)
        for number, index, steps in body["copies"]:
            if number in cuttings:
                for step in steps:
                    _checked(cuttings[number], index, step, 0, last)
                    told.copies.setdefault((number, index), {}).setdefault(step, set()).add(name)
                if frame.step in steps:
                    holds |= {each for each in cuttings[number].names[index] if not each.startswith(CONSTANT)}
        holds |= set(body["constants"])

    def forgotten(self, name: str) -> None:
        """Somebody begins anew, by that name: what was there under it is not."""
        self.told.holds.pop(name, None)
        for steps in self.told.copies.values():
            for who in steps.values():
                who.discard(name)

    def revived(self, frame: Frame, state: State) -> None:
        """A stage that was lost is there again. ValueError from who was not asked for it."""
        body, name, told, base = frame.body, frame.sender, self.told, self.where.base
        place = (int(body["cutting"]), int(body["stage"]))
        if base is None or place[0] != base.number or told.reviving.get(place[1]) != name:
            raise ValueError(f"revived: stage {place}: is not theirs")
        _checked(base, place[1], body["since"], 0, state.step)
        told.stages[place], told.since[place] = name, body["since"]
        told.holds[name] |= base.names[place[1]]

    def held(self, frame: Frame, state: State) -> None:
        """An owner has the state of its stage. ValueError where that is of a step that has not been committed."""
        cutting, at, since = self.where.now, owners(state).index(frame.sender), frame.body["since"]
        _checked(cutting, at, since, 0, min(frame.step, state.step))
        self.told.since[cutting.number, at] = since

    def move(self, state: State, leaving: Collection[str]) -> None:
        """Asks for what owners lack and somebody has, and has computed again what nobody has. As far as all who are
        there have said what they have."""
        told, cutting = self.told, self.where.cutting
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
                    self.handing.over(name, self.copies.kept.found(names, state.step), {})
                else:
                    self._tell(name, "expect", body={"names": names, "who": source})
                    self._tell(source, "give", body={"names": names, "who": name})
                told.asked[name] |= set(names)
            nowhere = wanted - everything
            constants = sorted(each for each in nowhere if each.startswith(CONSTANT))
            self.handing.first(name, constants, begin=False)  # what never changes the broker still has
            told.asked[name] |= set(constants)
            missing |= nowhere - set(constants)
        if missing:
            self._reviving.begin(missing, state)

    def _initial(self, name: str, cutting: Cutting, index: int) -> None:
        """Before the first step the broker has it all."""
        own = [each for each in sorted(cutting.names[index]) if each.startswith((PARAMETER, VARIABLE, CONSTANT))]
        if not self.told.asked[name]:
            self.handing.first(name, own, begin=True)

    # --- what comes of steps ---

    def prepared(self, frame: Frame, state: State) -> None:
        """An owner's gradients are there. ValueError for what it cannot say of them."""
        body, order = frame.body, owners(state)
        stage = self.where.now.stages[order.index(frame.sender)]
        squares = {str(key): math.nan if value is None else float(value) for key, value in body["squares"].items()}
        mine = {key for key in stage.parameters if key not in stage.shares}
        if not set(squares) <= mine or any(value < 0 for value in squares.values()):
            raise ValueError("prepared: squares of gradients that are none of its own")
        graph = self.training.graph
        last = graph.loss if graph.loss is not None else graph.outputs[0]
        if bool(body["results"]) != (last in stage.nodes):
            raise ValueError("prepared: results, which another stage computes, or none")
        self.told.squares |= squares
        if body["results"]:
            self.told.results = self.training.checked(body["results"])

    def gather(self, state: State) -> None:
        """After the last step: asks owners for the model that has been trained, once in an epoch."""
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
        stages = () if self.where.cutting is None else self.where.cutting.stages
        return bool(stages) and all(self._results(at) <= set(self.gathered) for at in range(len(stages)))

    def _results(self, index: int) -> set[str]:
        """Of a stage, which names of the model are its to give."""
        own = self.where.now.stages[index]
        if self.training.rules.streams:
            return set()  # what has been generated is here already
        keys = {PARAMETER: [key for key in own.parameters if key not in own.shares], VARIABLE: own.variables}
        return {prefix + key for prefix, names in keys.items() for key in names}


def _checked(cutting: Cutting, index: Any, step: Any, least: int, last: int) -> None:
    """ValueError unless both are whole numbers, of a stage, and of a step from `least` to `last`: all would wait for
    what is said to be of a later one."""
    if type(index) is not int or not 0 <= index < len(cutting.stages):
        raise ValueError(f"stage {index!r:.40}: is none")
    if type(step) is not int or not least <= step <= last:
        raise ValueError(f"stage {index}: step {step!r:.40}: must be from {least} to {last}")
