"""One stage of one step after another: what can be done next, with what has come so far.

The order is the schedule's; each task waits for what it is sent. What goes out is kept until a copy of every stage is
safe, so that a stage that is lost can be computed again from what its neighbours had sent it, by somebody who has an
earlier copy of its state, while the others do nothing again (Swift, arXiv 2302.06173).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmsys.decentral.claims import Claims, hashed
from llmsys.decentral.compression import Codecs
from llmsys.decentral.cut import Stage
from llmsys.decentral.graph import Graph
from llmsys.decentral.noise import Noise
from llmsys.decentral.packing import AHEAD, BACK, SHARED, Packing
from llmsys.decentral.planes import PARAMETER, Executor, Plane, Rules
from llmsys.decentral.planes.guarded import Guarded
from llmsys.decentral.schedule import orders
from llmsys.decentral.wire import Array, Frame

VALUE, INPUT = "value", "input"
"""What travels as well: shared parameters' new values, and the job's own inputs."""
KINDS = (AHEAD, BACK, SHARED, VALUE, INPUT)


@dataclass(frozen=True, kw_only=True)
class Sent:
    """`arrays` for stage `to`, as they are sent (`packing`), of a step and a micro-batch (of values: of the step
    alone). `absent`: gradients that it waits for, and that are none."""

    to: int
    kind: str
    step: int
    micro_batch: int
    arrays: Mapping[str, Array]
    absent: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Done:
    """All tasks of a step are done: the sum of squares of each gradient that the stage owns, and the losses or tokens
    of micro-batches, where it computes them."""

    step: int
    squares: Mapping[str, float]
    results: tuple[float | list[int], ...]

    def told(self) -> dict[str, Any]:
        """As the broker is told of it."""
        squares = {key: _plain(value) for key, value in self.squares.items()}
        return {"squares": squares, "results": [_plain(each) for each in self.results]}


class StageWork:
    """Of `stage`, one of `count`, whose part of the graph is `graph` (`cut.part`). `claiming`: it notes what
    comes and goes."""

    def __init__(
        self,
        graph: Graph,
        stage: Stage,
        executor: Executor,
        rules: Rules,
        packing: Packing,
        *,
        count: int,
        claiming: bool = False,
    ) -> None:
        self.graph, self.stage, self.executor, self.rules, self.count = graph, stage, executor, rules, count
        self.packing = packing
        self.order = orders(rules.schedule, count, rules.micro_batches)[stage.index]
        if rules.streams:
            self.order = [("F", at) for at in range(rules.micro_batches)]
        self.flops = 0.0  # of the task that was done last
        self._forward_flops = sum(graph.by_name[name].flops for name in stage.nodes)
        self.log: list[Sent] = []
        self._claims = Claims() if claiming else None
        self.step = 0  # under way; 0: none
        self.next = 0
        self._here: dict[tuple[str, int, int, str], Array | None] = {}

    # --- what comes ---

    def expects(self, kind: str, name: str) -> bool:
        """Whether it is sent such a thing at all."""
        own = self.stage
        if kind == AHEAD:
            return name in own.receives
        if kind == BACK:
            return name in own.sends and name in own.trained
        if kind == SHARED:
            return name in own.hears
        if kind == VALUE:
            return name in own.shares
        return kind == INPUT and name in own.inputs

    def put(self, sent: Sent) -> None:
        """ValueError for what this stage is not sent, or another shape than the graph has."""
        arrays = self.packing.unpacked(sent.kind, sent.arrays)
        for name in (*arrays, *sent.absent):
            if not self.expects(sent.kind, name):
                raise ValueError(f"{sent.kind} {name}: is not for stage {self.stage.index}")
        if sent.absent and sent.kind not in (BACK, SHARED):
            raise ValueError(f"{sent.kind} {sent.absent[0]}: cannot be absent")
        if not 0 <= sent.micro_batch < self.rules.micro_batches:
            raise ValueError(f"{sent.kind}: micro-batch {sent.micro_batch}: there is none")
        for name, array in arrays.items():
            shared = sent.kind in (SHARED, VALUE)
            value = self.graph.parameters[name] if shared else self.graph.by_name[name].values[0]
            if (array.dtype, array.shape) != (value.dtype, value.shape):
                raise ValueError(f"{sent.kind} {name}: {array.dtype} {list(array.shape)}: is not as in the graph")
        own = {AHEAD: self.stage.receives, BACK: self.stage.sends, SHARED: self.stage.hears}.get(sent.kind)
        if self._claims and own is not None:
            (stage,) = {own[name] for name in (*arrays, *sent.absent)}  # all of it is from one
            for name in (*sent.arrays, *sent.absent):
                what = f"{sent.kind}/{sent.micro_batch}/{name}"
                self._claims.came(sent.step, stage, what, sent.arrays.get(name))
        for name in (*arrays, *sent.absent):
            self._here[sent.kind, sent.step, sent.micro_batch, name] = arrays.get(name)

    # --- a step ---

    def begin(self, step: int) -> None:
        """The step after the last that was applied."""
        self.executor.forget()
        self.step, self.next = step, 0
        if self._claims:
            self._claims.begin(step)
        self._here = {key: array for key, array in self._here.items() if key[1] >= step}

    def give_up(self) -> None:
        """The step under way: nothing of it counts, and it comes again."""
        if self.step:
            self.executor.forget()
            self.log = [each for each in self.log if each.step < self.step]
            self._here = {key: each for key, each in self._here.items() if key[1] < self.step}
            if self._claims:
                self._claims.give_up()
        self.step = 0

    @property
    def computed(self) -> bool:
        """Whether all tasks of the step under way are done."""
        return self.step > 0 and self.next == len(self.order)

    def work(self) -> list[Sent] | None:
        """Does the next task, if what it needs is there, and says what goes out; None: there is nothing to do."""
        if not self.step or self.next == len(self.order):
            return None
        what, micro_batch = self.order[self.next]
        needs = self._forward_needs() if what == "F" else self._backward_needs()
        keys = [(kind, self.step, micro_batch, name) for kind, name in needs]
        if any(key not in self._here for key in keys):
            return None
        given: dict[str, dict[str, Array]] = {kind: {} for kind in KINDS}
        for key in keys:
            if (array := self._here.pop(key)) is not None:
                given[key[0]][key[3]] = array
        if what == "F":
            found = self.executor.forward(self.step, micro_batch, given[INPUT], given[AHEAD])
            out = self._grouped(AHEAD, micro_batch, found, self.stage.sends, ())
        else:
            back, on = self.executor.backward(micro_batch, given[BACK], given[SHARED])
            wanted = [name for name in self.stage.receives if name in self.stage.trained]
            out = [
                *self._grouped(BACK, micro_batch, back, self.stage.receives, wanted),
                *self._grouped(SHARED, micro_batch, on, self.stage.shares, self.stage.shares),
            ]
        self.next += 1
        self.flops = self._forward_flops * (1 if what == "F" else 2)
        self.log += out
        for each in out if self._claims else ():
            for name in (*each.arrays, *each.absent):
                assert self._claims is not None
                self._claims.sent(each.to, f"{each.kind}/{micro_batch}/{name}", each.arrays.get(name))
        return out

    def done(self) -> Done:
        """Of the step under way, all of whose tasks are done."""
        found = [self.executor.result(m) for m in range(self.rules.micro_batches)]
        there = tuple(each for each in found if each is not None)
        return Done(step=self.step, squares=self.executor.squares(), results=there)

    def apply(self, rate: float, scale: float) -> list[Sent]:
        """The step's update: what goes out is new values of shared parameters."""
        step, self.step = self.step, 0
        self.executor.apply(rate, scale)
        out = []
        for key, stages in self.stage.tells.items():
            value = self.executor.state([PARAMETER + key])[PARAMETER + key]
            out += [Sent(to=to, kind=VALUE, step=step, micro_batch=0, arrays={key: value}) for to in stages]
        self.log += out
        return out

    def settle(self, step: int) -> bool:
        """Takes values that others own, as they are after `step`; whether all of them have come."""
        keys = {key: (VALUE, step, 0, key) for key in self.stage.shares}
        if any(key not in self._here for key in keys.values()):
            return False
        found = {PARAMETER + key: self._here.pop(place) for key, place in keys.items()}
        self.executor.put({name: array for name, array in found.items() if array is not None})
        return True

    # --- what was sent ---

    def claim(self, step: int) -> dict[str, Any] | None:
        """Of the step that was applied last: hashes of what came and went, and of what the parameters are now that
        other stages have as well. None: it was not computed here."""
        if self._claims is None or self._claims.step != step:
            return None
        keys = [*self.stage.shares, *self.stage.tells]
        values = self.executor.state(PARAMETER + key for key in keys)
        return {**self._claims.told(), "values": {key: hashed({key: values[PARAMETER + key]}) for key in keys}}

    def logged(self, to: int, after: int, until: int) -> Iterator[Sent]:
        """For stage `to`, of the steps after `after`, up to `until`."""
        return (each for each in self.log if each.to == to and after < each.step <= until)

    def drop(self, until: int) -> None:
        """Nobody asks for these steps any more."""
        if self.log and self.log[0].step <= until:
            self.log = [each for each in self.log if each.step > until]

    def _forward_needs(self) -> list[tuple[str, str]]:
        return [*((INPUT, name) for name in self.stage.inputs), *((AHEAD, name) for name in self.stage.receives)]

    def _backward_needs(self) -> list[tuple[str, str]]:
        sent = [(BACK, name) for name in self.stage.sends if name in self.stage.trained]
        return [*sent, *((SHARED, key) for key in self.stage.hears)]

    def _grouped(
        self,
        kind: str,
        micro_batch: int,
        arrays: Mapping[str, Array],
        to: Mapping[str, int],
        wanted: Iterable[str],
    ) -> list[Sent]:
        """One message for each stage, which says of those that are `wanted` and not there that they are none."""
        found, wanted = [], tuple(wanted)
        for stage in sorted({to[name] for name in (*arrays, *wanted)}):
            own = {name: each for name, each in arrays.items() if to[name] == stage}
            own = self.packing.packed(kind, self.step, micro_batch, own)
            absent = tuple(name for name in wanted if to[name] == stage and name not in arrays)
            found.append(Sent(to=stage, kind=kind, step=self.step, micro_batch=micro_batch, arrays=own, absent=absent))
        return found


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def work_of(frame: Frame, plane: Plane) -> StageWork:
    """That of the stage which a broker's frame tells of. ValueError, KeyError and the like for what is none."""
    body = frame.body
    rules = Rules.of_json(body["rules"])
    graph, stage = Graph.of_json(body["graph"]), Stage.of_json(body["stage"])
    executor = Guarded(plane.stage(graph, stage, frame.tensors, rules))
    noise = None if body["noise"] is None else Noise(**{**body["noise"], "names": tuple(body["noise"]["names"])})
    packing = Packing(graph, stage, rules, Codecs.of_json(body["codecs"]), noise)
    count, claiming = int(body["count"]), body["claims"] is True
    return StageWork(graph, stage, executor, rules, packing, count=count, claiming=claiming)
