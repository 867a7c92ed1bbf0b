"""What a provider does with what it is told: frames come, frames go, and between them its stage is computed.

No socket, no thread and no clock is here: whoever drives a `Provider` hands it frames, lets it `work` a task at a time,
and takes what goes `out`. So tests, simulators and real processes run the same code.

Of a new plan it is told its stage, if it has one, and says what it has: stages whose state it holds, and copies that it
keeps for others. What it lacks comes from others, or is computed again (`revival`). It begins a step when it is told,
changes nothing before the commit, and applies an update once, by its number. Whatever is of another epoch than its own
is left alone and counted, and so is what is not as the plan says.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from llmsys.decentral import arrivals, measure
from llmsys.decentral.giving import Giving
from llmsys.decentral.holdings import Held, Holdings, Place
from llmsys.decentral.keeping import Keeping
from llmsys.decentral.measure import MEASURE, MEASURED
from llmsys.decentral.opinion import Opinions
from llmsys.decentral.planes import Plane
from llmsys.decentral.planes.guarded import Failed, why
from llmsys.decentral.revival import Revivals
from llmsys.decentral.saying import Saying
from llmsys.decentral.stage_work import INPUT, KINDS, Sent, StageWork, work_of
from llmsys.decentral.wire import BROKER, Frame, Malformed, decode

MOST_SAID = 100
"""Refusals that the broker is told of."""


@dataclass(kw_only=True)
class Counters:
    """What was left alone, and why; and tasks done, with their FLOPs."""

    malformed: int = 0
    foreign: int = 0
    stale: int = 0
    refused: int = 0
    tasks: int = 0
    flops: float = 0.0
    refusals: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=MOST_SAID))


class Provider:
    """`name`: under which the broker knows it."""

    def __init__(self, name: str, plane: Plane, job: str = "") -> None:
        self.name, self.plane = name, plane
        self.stopped, self.why = False, ""
        self.busy = False
        self.counters = Counters()
        self.says = Saying(name)
        self._of(job)

    def _of(self, job: str) -> None:
        """With nothing of another job."""
        self.says.job, self.says.epoch, self.says.step = job, 0, 0
        self.here = Holdings()
        self.revivals = Revivals(self.here, self._work_of, self._send)
        self.opinions = Opinions(self.here, self._work_of, lambda body: self.says.say("opinion", body=body))
        self.live: Place | None = None
        self.peers: dict[int, str] = {}
        self.giving = Giving(self.here)
        self.keeping = Keeping(self.here, self.says.give)
        self.said: tuple[str, int, int] | None = None

    # --- what comes ---

    def hear(self, data: bytes) -> None:
        """Bytes that have come. Nothing of them can harm: what is no frame, or none for now, is counted."""
        try:
            self.take(decode(data))
        except Malformed as error:
            self.counters.malformed += 1
            self.counters.refusals.append(str(error))

    def take(self, frame: Frame) -> None:
        """A frame that is one. A broker's plan is of its job, whatever this provider did for another that broke off."""
        if frame.kind == MEASURE and frame.to == self.name:
            self._obey(frame)  # of whatever job, or none: nothing of one that broke off is lost by it
            return
        told = frame.sender == BROKER and frame.to == self.name and frame.kind in ("plan", "stop")
        if told and frame.job != self.says.job:
            self._of(frame.job)
        if frame.to != self.name or frame.job != self.says.job:
            self.counters.foreign += 1
            return
        if frame.epoch < self.says.epoch or (frame.epoch > self.says.epoch and frame.kind not in ("plan", "stop")):
            self.counters.stale += 1
            return
        self._obey(frame)
        try:
            self._settle()
        except Exception as error:  # noqa: BLE001  as in `work`: no frame is at fault
            self._unable(why(error), self.says.epoch)

    def _obey(self, frame: Frame) -> None:
        orders: Mapping[str, Callable[[Frame], None]] = {
            "plan": self._plan, "revive": self.revivals.told, "resend": self._resend, "give": self._give,
            "expect": self.giving.expect, "state": self._state, "begin": self._begin, "commit": self._commit,
            "tidy": self._tidy, "stop": self._stop, "copy": self._asked_to_copy, "check": self.opinions.told,
            "keepers": lambda each: self.keeping.told(each.body), MEASURE: self._measure,
        }  # fmt: skip
        from_broker = frame.kind not in (*KINDS, "state")
        try:
            if from_broker and frame.sender != BROKER:
                raise ValueError(f"{frame.kind}: is the broker's to say")
            if frame.kind in KINDS:
                if frame.kind == INPUT and frame.sender != BROKER:
                    raise ValueError("input: is the broker's to say")
                self._data(frame)
            elif frame.kind in orders:
                orders[frame.kind](frame)
            else:
                raise ValueError(f"{frame.kind[:40]}: no such frame")
        except Exception as error:  # noqa: BLE001  whatever somebody sends, or a plane's framework raises
            self.counters.refused += 1
            said = f"{frame.kind}: {why(error)}"
            self.counters.refusals.append(said)
            awaited = frame.sender == BROKER and frame.kind in ("plan", "revive")  # all would wait for it
            if awaited or isinstance(error, Failed):
                self._unable(said, frame.epoch)
            elif len(self.counters.refusals) < MOST_SAID:
                self.says.say("refused", body={"why": said[:500]})

    def _unable(self, why: str, epoch: int) -> None:
        """It cannot do what is its own to do, and does no more of it: others have to."""
        self.live = None
        self.revivals.open.clear()
        said = self.says.frame("unable", BROKER, self.says.step, {"why": why[:500]}, {})
        self.says.out.append(dataclasses.replace(said, epoch=epoch))

    # --- plans ---

    def _plan(self, frame: Frame) -> None:
        body = frame.body
        if frame.epoch == self.says.epoch:
            return  # told before
        place = None if body["stage"] is None else (int(body["cutting"]), int(body["stage"]["index"]))
        old = self.here.stages.get(place) if place else None
        made = None if place is None or (old and old.at == frame.step) else self._work_of(frame)
        self.says.epoch, self.says.step = frame.epoch, frame.step
        self.revivals.open.clear()
        self.opinions.open.clear()
        self.here.partial.clear()
        self.giving.givers.clear()
        for held in self.here.stages.values():
            held.work.give_up()
        self.live, self.said = place, None
        self.peers = {at: str(name) for at, name in enumerate(body["peers"])}
        self.keeping.plan(body)
        if place is not None and made is not None:
            self.here.stages[place] = Held(work=made, at=frame.step, since=frame.step)
        self.giving.fill(self.live, self.says.step)
        self.says.say("have", body={**self.here.have(self.says.step), "stack": self.plane.stack})

    def _work_of(self, frame: Frame) -> StageWork:
        return work_of(frame, self.plane)

    def _begin(self, frame: Frame) -> None:
        """Of stages only the one that it has now is kept."""
        if self.live is None or frame.step != self.says.step + 1:
            raise ValueError(f"step {frame.step}: the last one was {self.says.step}")
        own = self.here.stages[self.live]
        if own.work.step == frame.step:
            return  # told before
        if own.lacks or own.at != self.says.step:
            raise ValueError(f"step {frame.step}: its state is not here")
        self.here.stages = {self.live: own}
        self.revivals.open.clear()
        self.giving.givers.clear()
        own.work.begin(frame.step)
        self.keeping.due = frame.step if frame.body["copy"] else self.keeping.due
        self.here.drop(int(frame.body["safe"]))

    def _stop(self, frame: Frame) -> None:
        self.stopped, self.why = True, str(frame.body.get("why", ""))

    def _tidy(self, frame: Frame) -> None:
        """Of somebody without a stage: what it had is old now."""
        if self.live is None:
            self.here.stages.clear()
            self.revivals.open.clear()
        self.here.drop(int(frame.body["safe"]))

    def _commit(self, frame: Frame) -> None:
        if self.live is None:
            raise ValueError("commit: it has no stage")
        own = self.here.stages[self.live]
        if frame.step <= own.at:
            return  # applied before
        if frame.step != own.at + 1 or own.work.step != frame.step or not own.work.computed:
            raise ValueError(f"commit of step {frame.step}: it is at {own.at}")
        out = own.work.apply(float(frame.body["rate"]), float(frame.body["scale"]))
        own.applied()
        self.says.step = own.at
        if frame.body.get("at_once"):  # and the broker takes it that it holds it
            self.said = ("held", self.says.epoch, own.at)
        self._send(self.live, out, self.peers)

    # --- data ---

    def _data(self, frame: Frame) -> None:
        place, sent = arrivals.sent(frame)
        replay = self.revivals.open.get(place) or self.opinions.open.get(place)
        if replay is not None:
            arrivals.checked(frame, replay.held.work.stage, replay.near)
            replay.held.work.put(sent)
        elif place == self.live:
            own = self.here.stages[place]
            if not own.at <= frame.step <= own.at + 2:
                raise ValueError(f"{frame.kind}: step {frame.step}: it is at {own.at}")
            arrivals.checked(frame, own.work.stage, self.peers)
            own.work.put(sent)
        else:
            raise ValueError(f"{frame.kind}: stage {place} is not here")

    def work(self) -> bool:
        """One task, of what has been lost before that of a step; whether there was one."""
        self.busy = True
        try:
            return self._worked()
        except Exception as error:  # noqa: BLE001  its plane's framework may raise anything
            self._unable(why(error), self.says.epoch)
            return True
        finally:
            self.busy = False

    def _worked(self) -> bool:
        if (revived := self.revivals.finished()) is not None:
            place, held = revived
            self.giving.fill(self.live, self.says.step)
            self.says.say("revived", body={"cutting": place[0], "stage": place[1], "since": held.since})
            self._settle()
            return True
        if (work := self.revivals.work()) is not None:
            self._did(work)
            return True
        own = self.here.stages.get(self.live) if self.live else None
        sent = None if own is None else own.work.work()
        if own is None or self.live is None or sent is None:
            return self.opinions.work()  # where it has nothing else to do
        self._did(own.work)
        self._send(self.live, sent, self.peers)
        if own.work.computed:
            done = own.work.done()
            self.says.say("prepared", step=done.step, body=done.told())
        return True

    def _did(self, work: StageWork) -> None:
        self.counters.tasks += 1
        self.counters.flops += work.flops

    def _send(self, place: Place, sent: Iterable[Sent], peers: Mapping[int, str]) -> None:
        """To those of `peers` that it is for; what is for oneself takes no way round."""
        for each in sent:
            to = peers.get(each.to)
            if to is None:
                continue
            body = {"cutting": place[0], "stage": each.to, "absent": list(each.absent)}
            frame = self.says.frame(each.kind, to, each.step, body, each.arrays, each.micro_batch)
            if to == self.name:
                self._data(frame)
            else:
                self.says.out.append(frame)

    def _measure(self, frame: Frame) -> None:
        body, tensors = measure.answer(frame.body, self.plane)
        self.says.out.append(self.says.frame(MEASURED, BROKER, self.says.step, body, tensors))

    # --- what was lost ---

    def _resend(self, frame: Frame) -> None:
        """To whoever has a neighbour now, what that one had been sent."""
        body = frame.body
        place, to = (int(body["cutting"]), int(body["stage"])), int(body["for"])
        logged = self.here.stages[place].work.logged(to, int(body["after"]), int(body["until"]))
        self._send(place, [*logged], {to: str(body["who"])})

    # --- state ---

    def _give(self, frame: Frame) -> None:
        found, extra = self.giving.asked(frame)
        self.says.give(found, str(frame.body["who"]), frame.step, extra)

    def _state(self, frame: Frame) -> None:
        """State, from whom the broker has asked for it; or somebody's copy to keep."""
        body = frame.body
        if "keep" in body:
            if (place := self.keeping.keep(frame)) is not None:
                self.says.say("copied", step=frame.step, body={"cutting": place[0], "stage": place[1]})
        elif "copy" in body:
            place = (int(body["copy"][0]), int(body["copy"][1]))
            self.revivals.given(place, frame)
        elif "check" in body and frame.sender == BROKER:
            self.opinions.put((int(body["check"][0]), int(body["check"][1])), frame.step, frame.tensors)
        else:
            at_this_step = self.live is not None and frame.step == self.says.step
            self.giving.take(frame, self.here.stages[self.live] if at_this_step and self.live else None)

    def _settle(self) -> None:
        """Says once that the state of its stage is here; and sends the copy of it that is due."""
        own = self.here.stages.get(self.live) if self.live else None
        if own is None or self.live is None or own.at != self.says.step:
            return
        if own.work.step or not own.settled() or own.lacks:
            return
        mark = ("held", self.says.epoch, own.at)
        if self.said != mark:
            self.said = mark
            self.says.say("held", step=own.at, body={"since": own.since, "claim": own.work.claim(own.at)})
        self.keeping.send_due(self.live, own, self.says.epoch)

    def _asked_to_copy(self, frame: Frame) -> None:
        if self.live is None or self.here.stages[self.live].lacks:
            raise ValueError("copy: it has nothing to copy")
        self.keeping.send(self.live, self.here.stages[self.live], self.says.epoch)

    # --- what goes ---

    def tell(self, say: Callable[[Frame], None]) -> None:
        """Hands what goes `out` to `say`. What that raises a ValueError for, as no frame carries it, this provider
        cannot say the next time either."""
        while self.says.out:
            out, self.says.out = self.says.out, []
            for frame in out:
                try:
                    say(frame)
                except ValueError as error:
                    self._unable(f"{frame.kind}: {error}", self.says.epoch)

    def say_leave(self) -> None:
        """It wants to go; until it is told to `stop`, it does its part."""
        self.says.say("leave")
