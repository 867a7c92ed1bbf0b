"""Spot checks: who computes something else than it should is found and named, whoever accuses others falsely is found
too, honest ones never are, and nobody can know before what will be checked."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from decentral_harness import FAMILIES, traced
from decentral_running import (
    MICRO_BATCHES,
    Astray,
    Storm,
    job,
    losses,
    losses_of,
    machines,
    mem_gib,
    together,
    training,
    undisturbed,
)

from llmsys.decentral.broker import Job
from llmsys.decentral.chain import chain
from llmsys.decentral.checking import Cheated
from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.cost import Workload
from llmsys.decentral.cut import Stage
from llmsys.decentral.event_log import EventLog, read
from llmsys.decentral.events import Event, Joined
from llmsys.decentral.graph import Graph
from llmsys.decentral.local import Local
from llmsys.decentral.planes import Arrays, Rules
from llmsys.decentral.planes.layout import packed, unpacked
from llmsys.decentral.planes.torch_stage import TorchPlane, TorchStage
from llmsys.decentral.processes import Processes
from llmsys.decentral.serve import Serving
from llmsys.decentral.stage_work import AHEAD, VALUE
from llmsys.decentral.status import status
from llmsys.decentral.wire import BROKER, Array, Frame, decode, encode

STEPS = 6
STAGES, SPARES = 3, 2


def slow(*values: object) -> Any:
    """One of many that a nightly run has."""
    return pytest.param(*values, marks=pytest.mark.slow)


# --- those who cheat ---


def times(arrays: Arrays, factor: float) -> dict[str, Array]:
    return {name: packed(unpacked(each) * factor) for name, each in arrays.items()}


class Scales(TorchStage):
    """One part in a million more."""

    def forward(self, step: int, micro_batch: int, inputs: Arrays, received: Arrays) -> dict[str, Array]:
        return times(super().forward(step, micro_batch, inputs, received), 1 + 1e-6)


class Zeroes(TorchStage):
    """Gradients that cost nothing."""

    def backward(
        self, micro_batch: int, gradients: Arrays, shared: Arrays
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        back, on = super().backward(micro_batch, gradients, shared)
        return times(back, 0.0), on


class Repeats(TorchStage):
    """The first gradients, again and again."""

    def backward(
        self, micro_batch: int, gradients: Arrays, shared: Arrays
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        back, on = super().backward(micro_batch, gradients, shared)
        self.first = getattr(self, "first", {})
        return self.first.setdefault(micro_batch, back), on


class Skips(TorchStage):
    """No update: all that it sends is computed as it should be."""

    def apply(self, rate: float, scale: float) -> None:
        self.forget()


class Cheats(TorchPlane):
    def __init__(self, how: type[TorchStage]) -> None:
        super().__init__()
        self.how = how

    def stage(self, graph: Graph, stage: Stage, given: Arrays, rules: Rules) -> TorchStage:
        return self.how(graph, stage, given, rules, self.device)


class Other(TorchPlane):
    """On a machine like no other."""

    @property
    def stack(self) -> str:
        return f"{super().stack} of its own"


@functools.cache
def roles() -> tuple[list[str], list[str]]:
    """Owners of stages in their order, and those in the pool, where nobody cheats."""
    local = together("llama", STAGES + SPARES, STAGES, 1)
    local.run()
    return local.coordinator.owners, sorted(local.coordinator.state.present - set(local.coordinator.owners))


def checked(
    planes: Mapping[str, TorchPlane], steps: int = STEPS, room: float = 1.0, spares: int = SPARES, **more: object
) -> Local:
    """A job of which all is checked; whoever is not in `planes` is honest."""
    local = Local(Coordinator(job("llama"), training("llama", steps, **{"checks": 1.0, **more})))
    local.coordinator.checks.asking.draws = random.Random(0)
    for each in machines(room * mem_gib("llama", STAGES), STAGES + spares):
        local.join(each, planes.get(each.name, TorchPlane()))
    return local


# --- nobody cheats ---


@pytest.mark.parametrize("family", ["gpt2", *(slow(each) for each in FAMILIES if each != "gpt2")])
def test_whoever_is_honest_is_believed(family: str) -> None:
    """Of every step and stage, but where one check of a stage is not over when the next would begin; a tied embedding,
    whose values and gradients go between stages, is no exception."""
    local = together(family, STAGES + SPARES, STAGES, STEPS, checks=1.0)
    local.run()
    own = local.coordinator.checks
    assert own.checked.total() + own.unchecked == STEPS * len(local.coordinator.owners)
    assert own.checked.total() >= own.unchecked
    assert (own.verdicts, own.cheats, own.undecided) == ([], {}, 0)
    assert losses(local) == undisturbed(family, STEPS)


@pytest.mark.parametrize("every", [2, 4])
def test_steps_between_copies_are_checked_together(every: int) -> None:
    local = checked({}, 9, copy_every=every)
    local.run()
    own = local.coordinator.checks
    assert own.checked.total() + own.unchecked == 9 * STAGES
    assert own.checked.total() >= 9
    assert own.verdicts == []


@pytest.mark.slow
def test_the_share_that_is_asked_for_is_checked() -> None:
    local = checked({}, 60, checks=0.2)
    local.run()
    own = local.coordinator.checks
    assert own.checked.total() + own.unchecked == pytest.approx(0.2 * 60 * STAGES, rel=0.4)
    assert own.verdicts == []


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("seed", [0, *map(slow, range(1, 4))])
def test_a_storm_accuses_nobody(seed: int, every: int) -> None:
    """Kills, silences and departures, of those too who check and of those whose stage is checked; plans change."""
    storm = Storm(seed, 10, STAGES + 1, most=4)
    local = together("llama", STAGES + 3, STAGES, 10, storm, checks=1.0, copy_every=every)
    local.run()
    own = local.coordinator.checks
    assert own.checked.total() + own.unchecked <= 10 * STAGES
    assert storm.happened
    assert own.checked.total() > 0
    assert (own.cheats, own.undecided, own.doubtful) == ({}, 0, None)
    assert losses(local) == undisturbed("llama", 10)


def test_who_takes_a_stage_over_is_checked_from_then_on() -> None:
    """Although the copies that there would be are few: with a new plan one more is made."""
    after: list[str] = []

    def watch(own: Local, name: str, what: str, step: int) -> None:
        if step == 4 and not after and name in own.coordinator.state.owners:
            own.kill(name)
            after.append(name)

    local = together("llama", STAGES + 3, STAGES, 9, watch, checks=1.0, copy_every=100)
    local.run()
    own = local.coordinator.checks
    assert own.checked.total() >= 5 * STAGES
    assert (own.verdicts, set(own.checked)) == ([], set(local.coordinator.owners))


def test_a_broker_that_is_rebuilt_goes_on_checking() -> None:
    """What was claimed before it died is not known any more, and so is not checked; nobody is accused for that."""
    noted: list[tuple[Event, Mapping[str, Any]]] = []

    def watch(own: Local, name: str, what: str, step: int) -> None:
        if step == 5 and own.coordinator is first:
            second = Coordinator(job("llama"), training("llama", 10, checks=1.0))
            second.rebuild([*noted], own.now)
            own.rebuilt(second)

    local = together("llama", STAGES + SPARES, STAGES, 10, watch, lambda *each: noted.append(each), checks=1.0)
    first = local.coordinator
    local.run()
    assert local.coordinator is not first
    assert local.coordinator.checks.checked.total() >= 3 * STAGES
    assert local.coordinator.checks.verdicts == []
    assert losses(local) == undisturbed("llama", 10)


@pytest.mark.parametrize("seed", [0, *map(slow, range(1, 4))])
def test_frames_that_go_astray_accuse_nobody(seed: int) -> None:
    local = checked({}, 8)
    local.carry = Astray(seed, 4, 2000)
    local.run()
    own = local.coordinator.checks
    assert own.checked.total() > 0
    assert (own.cheats, own.undecided, own.doubtful) == ({}, 0, None)
    assert losses(local) == undisturbed("llama", 8)


@pytest.mark.parametrize("compress", [slow("int8"), "adaptive"])
def test_what_is_compressed_on_its_way_is_compared_as_it_travels(compress: str) -> None:
    """Nobody who is honest is accused, and who cheats is found."""
    work, cheat = Workload(micro_batches=MICRO_BATCHES, most=1, compress=compress), ""
    lossy = Job(chain=chain(traced("llama").graph), work=work, least=STAGES + SPARES, reserve=SPARES)
    for _ in range(2):
        local = Local(Coordinator(lossy, training("llama", STEPS, checks=1.0, on_cheat="go_on")))
        for each in machines(mem_gib("llama", STAGES), STAGES + SPARES):
            local.join(each, Cheats(Zeroes) if each.name == cheat else TorchPlane())
        local.run()
        own = local.coordinator.checks
        assert own.checked.total() >= (1 if cheat else STEPS)  # who is sent away leaves nobody in the pool
        assert set(own.cheats) == {cheat} - {""}
        assert losses(local) != undisturbed("llama", STEPS)
        cheat = local.coordinator.owners[1]


# --- somebody cheats ---


@pytest.mark.parametrize("every", [1, slow(3)])
@pytest.mark.parametrize(
    ("how", "stage"),
    [slow(Scales, 0), (Scales, 1), slow(Zeroes, 1), slow(Zeroes, 2), slow(Repeats, 2), (Skips, 0), slow(Skips, 2)],
)
def test_whoever_cheats_is_found_named_and_sent_away(how: type[TorchStage], stage: int, every: int) -> None:
    """By the first or second check; the model is doubtful from the copy on with which that began."""
    cheat = roles()[0][stage]
    local = checked({cheat: Cheats(how)}, 9, copy_every=every, on_cheat="go_on")
    local.run()
    own = local.coordinator.checks
    assert set(own.cheats) == {cheat}
    (first,) = re.findall(rf"{cheat} does not, first of step (\d)", own.cheats[cheat])
    assert int(first) <= 4
    assert cheat not in local.coordinator.state.present
    assert any(each.startswith(f"{cheat} is sent away") for each in own.verdicts)
    assert own.doubtful is not None
    assert own.doubtful < int(first) <= own.doubtful + every
    assert len(local.coordinator.updates) == 9


def test_a_job_whose_model_was_tampered_with_ends_and_says_so() -> None:
    cheat = roles()[0][1]
    local = checked({cheat: Cheats(Skips)}, 50)
    with pytest.raises(Cheated, match=f"not to be trusted after step 0: stage 1.*{cheat} does not, first of step 1"):
        local.run()
    assert local.coordinator.state.step < 6


def test_a_cheat_of_the_last_step_is_found_before_the_job_is_over() -> None:
    """Copies of it are asked for, and the job waits for what is said of them."""
    cheat = roles()[0][2]

    class Late(Scales):
        def forward(self, step: int, micro_batch: int, inputs: Arrays, received: Arrays) -> dict[str, Array]:
            found = TorchStage.forward(self, step, micro_batch, inputs, received)
            self._results[micro_batch] = float(self._results[micro_batch]) * (1 if step < STEPS else 1.001)  # type: ignore[arg-type]
            return found

    local = checked({cheat: Cheats(Late)}, copy_every=4)
    with pytest.raises(Cheated, match=f"after step 4: .*{cheat} does not, first of step {STEPS}"):
        local.run()


def test_whoever_was_sent_away_is_not_taken_back_by_its_name() -> None:
    cheat = roles()[0][1]
    local = checked({cheat: Cheats(Zeroes)}, 8, on_cheat="go_on")
    machine = local.machines[cheat][0]
    back: list[str] = []

    def watch(own: Local, name: str, what: str, step: int) -> None:
        if cheat not in own.providers and not back:
            back.append(name)
            own.join(machine, TorchPlane())

    local.watch = watch
    local.run()
    assert back
    assert cheat not in local.coordinator.state.present


def test_a_broker_that_is_rebuilt_knows_who_has_cheated(tmp_path: Path) -> None:
    """And that the model is not to be trusted; whoever was found out does not come back in."""
    cheat, path = roles()[0][1], tmp_path / "events.jsonl"
    local = checked({cheat: Cheats(Zeroes)}, 8, on_cheat="go_on")
    with contextlib.closing(EventLog(path)) as log:
        local.coordinator.journal.note = log.note
        for each in local.machines.values():
            log.note(Joined(at_s=0.0, provider=each[0]), {"life": each[1]})
        while not local.coordinator.checks.cheats or cheat in local.coordinator.state.present:
            local.round()
    before, machine = local.coordinator.checks, local.machines[cheat][0]
    again = Coordinator(local.coordinator.state.job, training("llama", 8, checks=1.0, on_cheat="go_on"))
    again.rebuild(read(path), local.now)
    own = again.checks
    assert (own.cheats, own.doubtful, own.verdicts) == (before.cheats, before.doubtful, before.verdicts)
    assert own.counts() == before.counts()
    assert own.checked == before.checked
    local.rebuilt(again)
    local.join(machine, TorchPlane())
    local.run()
    assert cheat not in again.state.present
    assert own.doubtful is not None


def test_whoever_lies_of_another_is_sent_away_and_the_other_stays() -> None:
    """A third one is asked. Nothing is wrong with the model, so that the job goes on as if nothing had been."""
    owners, pool = roles()
    local = checked({pool[0]: Cheats(Scales)}, 8)
    local.run()
    own = local.coordinator.checks
    told = status(local.coordinator, local.now)
    assert told["checks"]["cheats"] == 1
    assert any(f"{pool[0]} is sent away" in each for each in told["checks"]["found"])
    assert sum(each["checked"] for each in told["providers"].values()) == told["checks"]["checked"] > 0
    assert set(own.cheats) == {pool[0]}
    assert sorted(local.coordinator.owners) == sorted(owners)
    assert (own.doubtful, own.undecided) == (None, 0)
    assert losses(local) == undisturbed("llama", 8)


def test_where_there_is_no_third_nobody_is_thrown_out() -> None:
    spare = f"p{STAGES}"
    local = checked({spare: Cheats(Scales), "p0": Cheats(Scales)}, spares=1, on_cheat="go_on")
    local.run()
    own = local.coordinator.checks
    assert own.cheats == {}
    assert own.undecided
    assert "one of them is wrong, and nobody can say which" in own.verdicts[-1]
    assert own.doubtful is not None
    with pytest.raises(Cheated, match="nobody can say which"):
        checked({spare: Cheats(Scales), "p0": Cheats(Scales)}, spares=1).run()


class Forging:
    """What `name` sends of a kind in step 3, where the frame goes to one of `to`, arrives as something else that is as
    well made: as if it had sent that."""

    def __init__(self, kind: str, name: str, to: list[str]) -> None:
        self.kind, self.name, self.to = kind, name, to
        self.forged: list[Frame] = []

    def __call__(self, to: str, data: bytes) -> list[bytes]:
        frame = decode(data)
        if (frame.kind, frame.step, frame.sender) != (self.kind, 3, self.name) or to not in self.to:
            return [data]
        self.forged.append(frame)
        return [encode(dataclasses.replace(frame, tensors=times(frame.tensors, 1.001)))]


@pytest.mark.parametrize(("kind", "to"), [(AHEAD, 1), (VALUE, 2)])
def test_two_neighbours_who_disagree_about_what_was_sent_are_both_named(kind: str, to: int) -> None:
    """Whether one has sent something else than it says, or the other has not got what it says, nobody can know."""
    owners, _ = roles()
    local = checked({}, checks=1e-9)
    local.carry = Forging(kind, owners[0], [owners[to]])
    with pytest.raises(Cheated, match=f"{owners[0]}, {owners[to]}: step 3: .*nobody can say which") as found:
        local.run()
    assert "after step 2" in str(found.value)


@pytest.mark.parametrize(("kind", "frames"), [(AHEAD, MICRO_BATCHES), (VALUE, 1)])
def test_whoever_says_something_else_when_it_is_asked_again_is_the_one_who_goes(kind: str, frames: int) -> None:
    """And not its neighbour, who would not have computed what it did from that."""
    owners, pool = roles()
    local = checked({}, 8)
    local.carry = forging = Forging(kind, owners[0], pool)
    local.run()
    own = local.coordinator.checks
    assert len(forging.forged) == 2 * frames, "to both who are asked"
    assert set(own.cheats) == {owners[0]}
    assert own.doubtful is None
    assert owners[1] in local.coordinator.owners
    assert losses(local) == undisturbed("llama", 8)


# --- who is asked, and what anybody knows ---


def test_what_will_be_checked_cannot_be_known_before() -> None:
    """Two jobs whose draws are not the same tell providers the same, bit for bit, until one of them checks something;
    by then those who computed it have said what came of it. By itself the draw is the system's."""
    assert isinstance(Coordinator(job("llama"), training("llama", 1)).checks.asking.draws, random.SystemRandom)
    told: list[list[tuple[str, bytes]]] = []
    for seed in (1, 7):
        local = checked({}, 12, checks=0.2)
        local.coordinator.checks.asking.draws = random.Random(seed)
        said: list[tuple[str, bytes]] = []

        def carry(to: str, data: bytes, said: list[tuple[str, bytes]] = said) -> list[bytes]:
            said.append((to, data))
            return [data]

        local.carry = carry
        local.run()
        told.append(said)
    differ = next(at for at, (one, other) in enumerate(zip(*told, strict=False)) if one != other)
    first = [decode(said[differ][1]) for said in told]
    (check,) = [frame for frame in first if frame.kind == "check"][:1]
    until = int(check.body["until"])
    assert differ > 100
    before = [decode(data) for to, data in told[0][:differ] if to == BROKER]
    assert {frame.sender for frame in before if frame.kind == "held" and frame.step == until} == set(roles()[0])


def test_a_stage_that_is_private_is_seen_by_trusted_ones_alone() -> None:
    _, pool = roles()
    own = chain(traced("llama").graph)
    work = Workload(micro_batches=MICRO_BATCHES, most=1, private=(1, 1))
    local = Local(Coordinator(Job(chain=own, work=work), training("llama", STEPS, checks=1.0)))
    local.coordinator.checks.asking.draws = random.Random(0)
    for each in machines(mem_gib("llama", STAGES), STAGES + SPARES):
        local.join(dataclasses.replace(each, trusted=each.name != pool[0]), TorchPlane())
    asked: dict[bool, set[str]] = {True: set(), False: set()}

    def carry(to: str, data: bytes) -> list[bytes]:
        frame = decode(data)
        if frame.kind == "check":
            stage = int(frame.body["stage"]["index"])
            asked[local.coordinator.recovery.where.now.is_private(stage)].add(to)
        return [data]

    local.carry = carry
    local.run()
    assert pool[0] not in asked[True]
    assert asked[True]
    assert pool[0] in asked[False]


def test_bits_of_another_stack_are_not_compared() -> None:
    """Whoever has it is neither checked nor asked, and what is not checked is counted."""
    owners, pool = roles()
    local = checked({owners[1]: Other(), pool[0]: Other()})
    local.run()
    own = local.coordinator.checks
    assert own.checked[owners[1]] == STEPS, "by the one other who has the same"
    assert own.checked[owners[0]] > 0
    alone = checked({owners[1]: Other()})
    alone.run()
    assert alone.coordinator.checks.checked[owners[1]] == 0
    assert alone.coordinator.checks.unchecked >= STEPS


def test_nobody_without_room_for_it_is_asked() -> None:
    """Owners of stages have theirs to hold already: with room for two they check each other."""
    tight, roomy = checked({}, spares=0), checked({}, spares=0)

    def watch(own: Local, name: str, what: str, step: int) -> None:
        if step == 1 and what == "work":  # after the plan, which would else be of fewer stages
            more = tuple(dataclasses.replace(each, mem_gib=2.5 * each.mem_gib) for each in machines(mem, STAGES))
            own.coordinator.journal.state = dataclasses.replace(own.coordinator.state, providers=more)

    mem, roomy.watch = mem_gib("llama", STAGES), watch
    for local in (tight, roomy):
        local.run()
        assert len(local.coordinator.owners) == STAGES
    assert (tight.coordinator.checks.checked.total(), tight.coordinator.checks.unchecked) == (0, STAGES * STEPS)
    assert roomy.coordinator.checks.checked.total() >= STEPS
    assert roomy.coordinator.checks.verdicts == []


@pytest.mark.parametrize("what", ["freeze", "kill"])
def test_whoever_is_asked_and_says_nothing_is_not_waited_for(what: str) -> None:
    _, pool = roles()
    local = checked({}, 8)
    gone: list[str] = []

    def watch(own: Local, name: str, kind: str, step: int) -> None:
        if name in pool and own.providers[name].opinions.open and not gone:
            gone.append(name)
            own.freeze(name) if what == "freeze" else own.kill(name)

    local.watch = watch
    local.run()
    assert gone
    assert local.coordinator.checks.checked.total() >= STAGES
    assert local.coordinator.checks.cheats == {}
    assert losses(local) == undisturbed("llama", 8)


def test_where_nothing_is_checked_nothing_is_noted_of_copies() -> None:
    """It would be of every step, to the end of the job."""
    local = together("llama", 3, 2, 4)
    local.run()
    assert local.coordinator.recovery.copies.kept.copies
    assert not local.coordinator.checks._givers


@pytest.mark.slow
def test_processes_check_each_other(tmp_path: Path) -> None:
    """Bits are the same from one process to another."""
    coordinator = Coordinator(job("llama"), training("llama", STEPS, checks=1.0))
    with Processes(tmp_path / "providers", "for this test") as processes:

        def ready(port: int) -> None:
            for each in machines(mem_gib("llama", 2), 4):
                processes.start(each, f"127.0.0.1:{port}")

        coordinator.journal.state = dataclasses.replace(
            coordinator.state, job=dataclasses.replace(job("llama"), least=4)
        )
        asyncio.run(asyncio.wait_for(Serving(coordinator, "for this test").run(ready=ready), 90))
    own = coordinator.checks
    assert own.checked.total() >= STEPS
    assert (own.verdicts, own.undecided) == ([], 0)
    assert losses_of(coordinator) == undisturbed("llama", STEPS)
