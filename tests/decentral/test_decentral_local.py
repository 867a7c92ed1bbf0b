"""The protocol: whatever happens to providers, the losses are bit for bit those of one process that nothing happens to,
no committed step is lost, and of each that was under way at most one attempt."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from decentral_harness import FAMILIES
from decentral_running import (
    MICRO_BATCHES,
    Astray,
    Storm,
    advance,
    job,
    losses,
    machines,
    mem_gib,
    together,
    trained,
    training,
    undisturbed,
)

from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.event_log import EventLog, read
from llmsys.decentral.events import Committed, Event
from llmsys.decentral.holdings import Holdings
from llmsys.decentral.local import Local, Stalled
from llmsys.decentral.planes.layout import packed, unpacked
from llmsys.decentral.planes.torch_stage import TorchPlane
from llmsys.decentral.running import Running
from llmsys.decentral.status import status
from llmsys.decentral.whereabouts import JobLost, Stuck
from llmsys.decentral.wire import BROKER, Frame, Malformed, decode, encode, header
from llmsys.errors import NotANumber
from llmsys.schema import Together
from rank_pool import briefly

STEPS = 6


@pytest.mark.parametrize("family", FAMILIES)
def test_several_providers_compute_what_one_process_computes(family: str) -> None:
    local = together(family, 3, 3, 4)
    local.run()
    assert len(local.coordinator.state.owners) > 1
    assert losses(local) == undisturbed(family, 4)


def test_gradients_are_clipped_by_the_norm_of_all_of_them() -> None:
    local = together("gpt2", 3, 3, 4, clip=0.1)
    local.run()
    assert min(each.scale for each in local.coordinator.updates.values()) < 0.5
    assert losses(local) == undisturbed("gpt2", 4, 0.1)


class Once:
    """Does `what` to the provider of a stage at the first moment that is asked for."""

    def __init__(self, what: str, moment: str, step: int, count: int = 1) -> None:
        self.what, self.moment, self.step, self.left, self.name = what, moment, step, count, ""

    def __call__(self, local: Local, name: str, what: str, step: int) -> None:
        if self.name or (what, step) != (self.moment, self.step) or name not in local.coordinator.state.owners:
            return
        self.left -= 1
        if self.left == 0:
            self.name = name
            if self.what == "leave":
                local.leave(name)
            elif self.what == "freeze":
                local.freeze(name)
            else:
                local.kill(name, noticed=self.what == "kill")


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("spares", [0, 2])
@pytest.mark.parametrize(
    ("what", "moment", "count"),
    [("kill", "work", 3), ("kill", "heard", 1), ("silence", "work", 5), ("freeze", "work", 2), ("leave", "work", 1)],
)
def test_one_that_goes_costs_the_step_under_way_at_most(
    what: str, moment: str, count: int, spares: int, every: int
) -> None:
    """With a spare, and without one, when the others have to take the stage over; from a copy of the last step, and
    from an older one, when the stage is computed again from what its neighbours had sent it."""
    once = Once(what, moment, 4, count)
    local = together("llama", 3 + spares, 2, STEPS, once, copy_every=every)
    local.run()
    assert once.name
    assert losses(local) == undisturbed("llama", STEPS)
    assert local.coordinator.again <= 1
    for name, expected in trained("llama", STEPS).items():
        assert torch.equal(unpacked(local.coordinator.trained[name]), expected), name
    if what == "leave":
        assert local.coordinator.again == 0
        assert once.name not in local.providers, "it is let go once nobody needs it"


def test_a_stage_that_nobody_has_as_it_is_now_is_computed_again_by_one_and_by_nobody_else() -> None:
    """Of five steps four are in no copy: the one who takes over does eight tasks for each, and the others none."""
    counted: dict[str, int] = {}

    def watch(own: Local, name: str, what: str, step: int) -> None:
        once(own, name, what, step)
        if once.name and what == "work" and own.coordinator.state.phase == "holding":
            counted[name] = own.providers[name].counters.tasks if name in own.providers else 0

    once = Once("kill", "work", 6, 1)
    local = together("llama", 4, 3, 8, watch, copy_every=100)
    before = dict.fromkeys(local.providers, 0)
    local.run()
    assert losses(local) == undisturbed("llama", 8)
    assert len(counted) == 1, counted
    (tasks,) = counted.values()
    assert tasks >= 5 * 8 - before[next(iter(counted))]


def test_one_that_was_stopped_and_wakes_up_is_not_listened_to() -> None:
    """A zombie: it goes on with the step that it was in, of an epoch that is past. It is one of the providers again as
    soon as it is heard of, and begins as anybody who comes."""
    once = Once("freeze", "work", 3, 2)
    woken: list[str] = []

    def watch(own: Local, name: str, what: str, step: int) -> None:
        once(own, name, what, step)
        if once.name and not woken and own.coordinator.state.step >= 4:
            woken.append(once.name)
            own.thaw(once.name)

    local = together("llama", 4, 2, STEPS, watch)
    local.run()
    assert woken
    assert woken[0] in local.coordinator.state.present
    assert losses(local) == undisturbed("llama", STEPS)
    assert local.coordinator.counters["stale"] > 0


def test_one_that_comes_is_used_when_another_goes() -> None:
    once = Once("kill", "work", 5, 1)

    def watch(own: Local, name: str, what: str, step: int) -> None:
        once(own, name, what, step)
        if step == 3 and "p9" not in own.providers:
            (late,) = machines(mem_gib("llama", 2), 10)[9:]
            own.join(late, TorchPlane())

    local = together("llama", 2, 2, 8, watch)
    local.run()
    assert "p9" in local.coordinator.state.owners
    assert losses(local) == undisturbed("llama", 8)


def test_when_too_few_are_left_it_waits_for_somebody_and_goes_on() -> None:
    once = Once("kill", "work", 3, 1)
    local = together("llama", 2, 2, STEPS, once)
    with pytest.raises(Stalled):
        local.run()
    (late,) = machines(mem_gib("llama", 2), 8)[7:]
    local.join(late, TorchPlane())
    local.run()
    assert losses(local) == undisturbed("llama", STEPS)


def test_a_spare_that_is_gone_is_said_to_be_gone_before_there_is_another_plan() -> None:
    local = together("llama", 4, 2, STEPS)
    local.coordinator.journal.state = local.coordinator.state.with_(job=dataclasses.replace(job("llama"), reserve=1))
    advance(local, 2)
    while local.coordinator.state.phase != "computing":
        local.round()
    (spare,) = local.coordinator.state.present - local.coordinator.state.owners
    assert status(local.coordinator, local.now)["providers"][spare]["role"] == "pool"
    epoch = local.coordinator.state.epoch
    local.kill(spare)
    local.coordinator.tick(local.now)
    assert local.coordinator.state.epoch == epoch
    assert status(local.coordinator, local.now)["providers"][spare]["role"] == "gone"


def test_a_broker_that_goes_on_speaks_of_its_own_steps_where_it_speaks_of_bytes() -> None:
    """What was sent before it was begun again it does not know."""
    local = together("llama", 3, 2, STEPS)
    local.run()
    own = job("llama")
    running = Running(Together(), None, own.chain, own.work, None, None)  # type: ignore[arg-type]
    running.coordinator = local.coordinator
    running.sent, running.ended_s = {"p0": 6 * 2**20, "p1": 2 * 2**20}, {STEPS - 1: 1.0, STEPS: 2.0}
    summary, _ = running.figures()
    assert (summary["steps"], summary["moved_mib"], summary["per_step_mib"]) == (STEPS, 8, 4)


def test_what_nobody_can_compute_again_is_said() -> None:
    """Both who kept a copy of a stage go with its owner, at once."""
    local = together("llama", 4, 2, STEPS, copies=1, owner_keeps=False)
    advance(local, 3)
    owner = local.coordinator.owners[0]
    for name in {owner, *local.coordinator.recovery.copies.keepers[owner]}:
        local.kill(name)
    (late,) = machines(mem_gib("llama", 2), 8)[7:]
    local.join(late, TorchPlane())
    with pytest.raises(JobLost, match="are lost, and nobody has what they are computed again from"):
        local.run()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("alone", [False, True])
def test_all_go_at_once_and_others_go_on_from_what_the_broker_keeps(every: int, alone: bool) -> None:
    """Every stage is computed again, by those who come, from the job's own inputs; committed steps are not lost."""
    local = together("llama", 1 if alone else 3, 1 if alone else 2, STEPS, copy_every=every)
    advance(local, 5)
    for name in [*local.providers]:
        local.kill(name)
    for late in machines(mem_gib("llama", 1 if alone else 2), 8)[5:]:
        local.join(late, TorchPlane())
    local.run()
    assert losses(local) == undisturbed("llama", STEPS)
    assert local.coordinator.again <= 1
    for name, expected in trained("llama", STEPS).items():
        assert torch.equal(unpacked(local.coordinator.trained[name]), expected), name


@pytest.mark.parametrize("every", [1, 2])
def test_the_brokers_copies_serve_where_they_are_older_than_what_neighbours_kept(every: int) -> None:
    """Its line is so thin that no copy after step 2 is there yet, while another's has let all drop what they had sent;
    then an owner and that other go at once. All stages begin again from step 2."""
    local = together("llama", 5, 2, STEPS, copy_every=every)

    def carry(to: str, data: bytes) -> list[bytes]:
        head = header(data)
        late = head["to"] == BROKER and head["kind"] == "state" and "keep" in head["body"] and head["step"] > 2
        return [] if late else [data]

    local.carry = carry
    while local.coordinator.recovery.copies.safe <= 2:
        local.round()
        local.now += 0.01
    assert local.coordinator.state.step < STEPS
    owner = local.coordinator.owners[0]
    for name in {owner, *local.coordinator.recovery.copies.keepers[owner]} - {BROKER}:
        local.kill(name)
    local.run()
    assert losses(local) == undisturbed("llama", STEPS)
    assert local.coordinator.restarts.astray == 0


def test_who_was_taken_to_hang_and_comes_again_begins_like_anybody() -> None:
    """What it had said of a task before is of another life: nothing is held against the new one."""
    local = together("llama", 3, 2, STEPS)
    own = local.coordinator
    name = own.owners[0] if own.state.plan else "p0"
    machine = local.machines[name][0]
    own.hearing.beat(name, local.now, busy=True, task_s=own.training.hung_s + 1)
    own.tick(local.now)
    assert name not in own.state.present
    assert any("at one thing for more than" in each for each in own.refusals)
    local.kill(name)
    local.join(machine, TorchPlane())
    own.tick(local.now)
    assert name in own.state.present
    local.run()
    assert losses(local) == undisturbed("llama", STEPS)


def test_copies_that_do_not_arrive_are_not_sent_on_and_on() -> None:
    """A slow line's sender would keep them all. What is lost on the way is not waited for without end."""
    sent = set[int]()

    def carry(to: str, data: bytes) -> tuple[bytes, ...]:
        head = header(data)
        if head["kind"] != "state" or "keep" not in head["body"] or head["step"] == 0:
            return (data,)
        sent.add(head["step"])
        return ()

    local = together("llama", 3, 2, 40, copy_every=1, owner_keeps=False)
    local.carry = carry
    local.run()
    assert sent == {1, 2, 17, 18, 33, 34}
    assert losses(local) == undisturbed("llama", 40)


def test_a_copy_of_which_a_piece_is_missing_is_none() -> None:
    made, state = Holdings(), {"p/a": packed(torch.ones(2)), "c/b": packed(torch.zeros(1))}
    nbytes = {"p/a": 8, "p/z": 8, "c/b": 4}
    assert not made.keep((1, 0), 3, {"p/z": state["p/a"]}, nbytes, piece=1, of=2)
    assert not made.copies
    assert made.keep((1, 0), 3, state, nbytes, piece=0, of=2)
    assert set(made.copies[1, 0][3]) == {"p/a", "p/z"}


@pytest.mark.parametrize(
    ("names", "size", "piece", "of", "why"),
    [
        (["p/a", "p/other"], 2, 0, 1, "p/other: is none of its names"),
        (["p/a", "p/z"], 3, 0, 1, "p/a: is none of its names, or is larger"),
        (["p/a"], 2, 0, 1, "p/z: is in none of its pieces"),
        (["p/z"], 2, 1, 10**9, "piece 1 of 1000000000"),
        (["p/z"], 2, -1, 2, "piece -1 of 2"),
        (["p/z", "c/b"], 2, 1, 3, "p/z: is in two pieces"),
    ],
)
def test_nobody_keeps_more_of_a_copy_than_the_broker_has_said_that_there_is(
    names: list[str], size: int, piece: int, of: int, why: str
) -> None:
    made, nbytes = Holdings(), {"p/a": 8, "p/z": 8, "c/b": 8}
    made.keep((1, 0), 2, {"p/z": packed(torch.ones(2))}, nbytes, piece=0, of=3)
    with pytest.raises(ValueError, match=why):
        made.keep(
            (1, 0), 2 if of == 3 else 3, dict.fromkeys(names, packed(torch.ones(size))), nbytes, piece=piece, of=of
        )
    assert not made.copies


def test_a_loss_that_is_no_number_ends_the_job_before_it_is_applied() -> None:
    local = together("llama", 2, 2, STEPS, rate=lambda step: 1e30)
    with pytest.raises(NotANumber, match="step 2: a loss or a gradient is NaN or infinite"):
        local.run()
    assert local.coordinator.state.step == 1


FAR = 2**50
"""A step that is none; what is said of it is said as if it had come."""
HOSTILE = [
    ("prepared", {"squares": {}, "results": [1.0]}),
    ("prepared", {"squares": {"x": 1.0}, "results": []}),
    ("prepared", {"squares": {"lm_head": -1e300}, "results": []}),
    ("prepared", {"squares": {"x": 10**400}, "results": []}),
    ("copied", {"cutting": 1, "stage": 0}),
    ("copied", {"cutting": 10**400, "stage": 0}),
    ("state", {"keep": [1, 0], "piece": 0, "of": 1}),
    ("state", {"keep": [1, 0], "piece": 0, "of": 10**9}),
    ("state", {}),
    ("have", {"stages": [[1]], "copies": 3, "constants": []}),
    *(("have", {"stages": [[1, 0, since, []]], "copies": [], "constants": []}) for since in (-2, 0.5, 2**40, FAR)),
    ("have", {"stages": [[1, -1, 0, []]], "copies": [], "constants": []}),
    ("have", {"stages": [], "copies": [[1, 0, [FAR]]], "constants": []}),
    *(("held", {"since": since}) for since in (-1, 2**40, FAR)),
    ("revived", {"cutting": 9, "stage": 9, "since": 0}),
    *(("revived", {"cutting": 1, "stage": 0, "since": since}) for since in (0, FAR)),
]


@pytest.mark.parametrize(("kind", "body"), HOSTILE)
@pytest.mark.parametrize("who", ["owner", "spare"])
def test_nothing_that_a_provider_says_ends_the_job_or_changes_the_model(
    kind: str, body: dict[str, object], who: str
) -> None:
    local = together("llama", 4, 2, STEPS)
    local.coordinator.journal.state = local.coordinator.state.with_(job=dataclasses.replace(job("llama"), reserve=1))
    advance(local, 2)
    own = local.coordinator
    name = own.owners[0] if who == "owner" else next(iter(own.state.present - set(own.owners)))
    step = FAR if kind == "copied" or "keep" in body or str(FAR) in str(body) else own.state.step
    tensors = {"p/model.norm.weight": packed(torch.ones(7))} if kind == "state" else {}
    frame = Frame(kind=kind, epoch=own.state.epoch, step=step, sender=name, to=BROKER, body=body, tensors=tensors)
    own.hear(name, encode(frame), local.now)
    local.run()
    assert own.counters["refused"] >= 1
    assert losses(local) == undisturbed("llama", STEPS)


def test_what_goes_between_stages_is_not_taken_from_anybody_else() -> None:
    """An owner says what another one's stage sends, just after it: nobody computes with that, and the broker learns of
    it."""
    local = together("llama", 3, 3, STEPS)

    def carry(to: str, data: bytes) -> list[bytes]:
        head = header(data)
        if head["kind"] not in ("ahead", "back", "shared"):
            return [data]
        real = decode(data)
        liar = next(name for name in local.coordinator.owners if name not in (head["sender"], to))
        zeros = {name: dataclasses.replace(each, data=bytes(len(each.data))) for name, each in real.tensors.items()}
        return [data, encode(dataclasses.replace(real, sender=liar, tensors=zeros))]

    local.carry = carry
    local.run()
    assert losses(local) == undisturbed("llama", STEPS)
    assert any("is not from" in each for each in local.coordinator.refusals)


@pytest.mark.parametrize(("seed", "stages", "copies"), [(1, 3, False), (5, 4, True)])
@pytest.mark.parametrize("how", ["before", "beside"])
def test_state_is_taken_only_from_whom_the_broker_has_asked_for_it(
    how: str, seed: int, stages: int, copies: bool
) -> None:
    """Owners go, and others give what those lack who take their stages over, or compute them again. Somebody else gives
    it, too, all of it zeros: as soon as they have been told what is theirs, or before and behind what is given. Nor is
    it anybody else's to say that all begins, or what never changes."""
    storm, every = Storm(seed, STEPS, least=stages + 1), 1 + seed % 4
    local = together("llama", stages + 3, stages, STEPS, storm, copy_every=every, owner_keeps=False)
    model = {f"p/{key}": each for key, each in local.coordinator.training.tensors.items()}
    lied: list[tuple[str, bool]] = []

    def lie(frame: Frame, to: str, body: Mapping[str, object]) -> bytes:
        asked = (frame.sender, to, frame.body.get("giver"))
        liar = next(name for name in local.providers if name not in asked)
        given = {**model, **frame.tensors, "c/more": model["p/model.norm.weight"]}
        zeros = {name: dataclasses.replace(each, data=bytes(len(each.data))) for name, each in given.items()}
        lied.append((to, "copy" in body))
        return encode(dataclasses.replace(frame, kind="state", sender=liar, to=to, body=body, tensors=zeros))

    def carry(to: str, data: bytes) -> list[bytes]:
        frame = decode(data)
        given = frame.kind == "state" and BROKER not in (frame.sender, to) and "keep" not in frame.body
        if how == "beside" and given:
            return [lie(frame, to, frame.body), data, lie(frame, to, {**frame.body, "begin": True})]
        if how == "before" and frame.kind == "plan" and frame.step and frame.body["stage"]:
            return [data, lie(dataclasses.replace(frame, tensors={}), to, {"begin": True})]
        if how == "before" and frame.kind == "revive":
            place, first = [frame.body["cutting"], frame.body["stage"]["index"]], frame.body["after"]
            return [data, lie(dataclasses.replace(frame, tensors={}, step=first), to, {"copy": place})]
        return [data]

    local.carry = carry
    local.run()
    assert {copy for _, copy in lied} >= {False, copies}
    assert losses(local) == undisturbed("llama", STEPS)
    assert local.coordinator.restarts.astray == 0
    said = [each for own in local.providers.values() for each in own.counters.refusals]
    assert any("was not asked for it" in each for each in said)
    assert not any("c/more" in own.here.constants for own in local.providers.values())


def test_only_the_stage_that_computes_them_says_what_came_of_a_step_and_only_of_the_one_under_way() -> None:
    """An owner in the middle says losses, of this step and of another; nothing of it is committed."""
    local = together("llama", 3, 3, STEPS)

    def carry(to: str, data: bytes) -> list[bytes]:
        real = decode(data)
        if real.kind != "prepared" or real.body["results"]:
            return [data]
        lie = dataclasses.replace(real, body={"squares": {}, "results": [0.0] * MICRO_BATCHES})
        own = local.coordinator.owners[-1]
        late = dataclasses.replace(real, sender=own, step=real.step - 1, body=lie.body)
        return [encode(lie), encode(late), data]

    local.carry = carry
    local.run()
    assert losses(local) == undisturbed("llama", STEPS)
    said = " ".join(local.coordinator.refusals)
    assert "results, which another stage computes" in said


def test_what_is_said_while_there_is_no_plan_is_of_none() -> None:
    """Nobody holds the model: the broker waits, whatever is said to it."""
    local = together("llama", 2, 2, STEPS)
    advance(local, 2)
    own = local.coordinator
    name = own.owners[0]
    local.kill(own.owners[1])
    local.round()
    assert own.state.plan is None
    for kind in ("held", "copied", "prepared", "have", "state"):
        frame = Frame(kind=kind, epoch=own.state.epoch, step=own.state.step, sender=name, to=BROKER)
        own.hear(name, encode(frame), local.now)
    assert own.counters["stale"] >= 5


def test_a_copy_is_kept_of_whoever_the_broker_has_named_and_nobody_else() -> None:
    local = together("llama", 4, 3, STEPS)
    advance(local, 2)
    own = local.coordinator
    place = (own.recovery.where.now.number, 0)
    (keeper,) = {*own.recovery.copies.keepers[own.owners[0]]} - {BROKER}
    there = local.providers[keeper]
    before = dict(there.here.copies[place])
    body = {"keep": [*place], "piece": 0, "of": 1}
    frame = Frame(kind="state", epoch=own.state.epoch, step=own.state.step, sender=own.owners[1], to=keeper, body=body)
    there.take(frame)
    assert there.here.copies[place] == before
    assert "is not p" in there.counters.refusals[-1]


def test_who_is_measured_loses_nothing_of_a_job_whose_broker_has_died() -> None:
    local = together("llama", 2, 2, STEPS)
    advance(local, 2)
    provider = local.providers[local.coordinator.owners[0]]
    before = (provider.live, provider.says.epoch, dict(provider.here.stages))
    provider.says.job = "of a broker"
    provider.take(Frame(kind="measure", sender=BROKER, to=provider.name, body={"id": 1, "bytes": 10}))
    assert [each.kind for each in provider.says.out] == ["measured"]
    assert (provider.live, provider.says.epoch, provider.here.stages) == before


def test_what_never_changes_is_not_changed_by_others() -> None:
    made = Holdings()
    names = {"c/mask", "c/other", "p/a"}
    made.note({"c/mask": packed(torch.ones(2)), "p/a": packed(torch.ones(2)), "c/none": packed(torch.ones(2))}, names)
    made.note({"c/mask": packed(torch.zeros(2)), "c/other": packed(torch.zeros(2))}, names)
    assert made.constants == {"c/mask": packed(torch.ones(2)), "c/other": packed(torch.zeros(2))}


def test_a_step_that_comes_to_no_end_ends_the_job_and_says_why() -> None:
    """A provider whose every gradient is refused: all would begin again for ever."""
    local = together("llama", 3, 3, STEPS)

    def carry(to: str, data: bytes) -> list[bytes]:
        real = decode(data)
        if real.kind != "back":
            return [data]
        return [encode(dataclasses.replace(real, tensors={"nothing": packed(torch.ones(1))}))]

    local.carry = carry
    with pytest.raises(Stuck, match=r"step 1: begun again 10 times, and nothing comes; p\d: back: .* nothing"):
        local.run()


def test_a_tensor_that_no_frame_carries_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmsys.decentral.training.TENSOR_BYTES", 1 << 10)
    with pytest.raises(ValueError, match=r"model: .* has 0 MiB: a tensor of at most"):
        training("llama", 1)


def test_a_frame_with_numbers_that_json_does_not_have_is_none() -> None:
    data = encode(Frame(kind="ahead", body={"cutting": float("inf")}))
    with pytest.raises(Malformed):
        header(data)


@pytest.mark.parametrize(
    ("family", "stages", "every"), [("llama", 2, 2), pytest.param("gpt2", 4, 3, marks=pytest.mark.slow)]
)
def test_storms(family: str, stages: int, every: int) -> None:
    for seed in range(5):
        stormy(family, stages, every, seed)


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(each, marks=pytest.mark.slow) for each in range(6, 100))])
def test_frames_that_do_not_arrive_as_they_were_sent(seed: int) -> None:
    """One that is corrupt or lost nobody waits for: all begin the step again; one that comes twice counts once."""
    astray = Astray(seed, count=1 + seed % 4, among=300)
    local = together("llama", 3, 2, STEPS, copy_every=1 + seed % 3)
    local.carry = astray
    local.run()
    assert astray.happened
    assert losses(local) == undisturbed("llama", STEPS)
    assert local.coordinator.again <= len(astray.happened)
    corrupt = sum(kind == "corrupt" for _, kind, _ in astray.happened)
    found = sum(each.counters.malformed for each in local.providers.values())
    assert found + local.coordinator.counters["malformed"] >= corrupt


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", briefly(("llama", "gpt2", "t5")))
def test_a_hundred_storms(family: str) -> None:
    for seed in range(100):
        stormy(family, 2 + seed % 3, 1 + seed % 4, seed)


def stormy(family: str, stages: int, every: int, seed: int) -> None:
    storm = Storm(seed, STEPS, least=stages + 1)
    local = together(family, stages + 3, stages, STEPS, storm, copy_every=every)
    local.run()
    assert losses(local) == undisturbed(family, STEPS), (seed, storm.happened)
    assert local.coordinator.again <= len(storm.happened)


@pytest.mark.parametrize("at", range(1, 60, 6))
def test_a_broker_that_dies_is_rebuilt_and_nothing_is_lost(tmp_path: Path, at: int) -> None:
    """At any moment: after the n-th thing that happens to anybody."""
    path = tmp_path / "events.jsonl"
    left = at

    def watch(own: Local, name: str, what: str, step: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise _Died

    log = EventLog(path)
    local = together("llama", 3, 2, STEPS, watch, note=log.note)
    with pytest.raises(_Died):
        local.run()
    log.close()
    committed = local.coordinator.state.step
    with open(path, "a") as file:
        file.write('{"event": "Comm')  # what it was writing
    again = Coordinator(job("llama"), training("llama", STEPS))
    again.rebuild(read(path), local.now)
    assert again.state.step == committed
    with contextlib.closing(EventLog(path)) as log:
        again.journal.note = log.note
        local.rebuilt(again)
        local.run()
    assert losses(local) == undisturbed("llama", STEPS)
    assert again.again <= 1
    assert [event.step for event, _ in read(path) if isinstance(event, Committed)] == [*range(1, STEPS + 1)]


def test_who_does_not_come_back_to_a_broker_that_was_rebuilt_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    local = together("llama", 4, 2, STEPS, note=log.note)
    while local.coordinator.state.step < 3:
        local.round()
    gone = local.coordinator.owners[0]
    log.close()
    del local.providers[gone], local.inboxes[gone]
    again = Coordinator(job("llama"), training("llama", STEPS))
    again.rebuild(read(path), local.now)
    local.rebuilt(again)
    local.run()
    assert gone not in again.state.present
    assert losses(local) == undisturbed("llama", STEPS)


@pytest.mark.parametrize("stage", range(3))
def test_who_is_left_applies_what_a_broker_had_committed_that_died_with_one_of_them(tmp_path: Path, stage: int) -> None:
    """Nobody has been told of the commit: the stages of those who come back are not computed again for all that."""
    path, revived = tmp_path / "events.jsonl", set[int]()
    log = EventLog(path)

    def note(event: Event, more: Mapping[str, Any]) -> None:
        log.note(event, more)
        if isinstance(event, Committed) and event.step == 4:
            raise _Died

    local = together("llama", 4, 3, STEPS, note=note)
    with contextlib.closing(log), pytest.raises(_Died):
        local.run()
    assert len(local.coordinator.owners) == 3
    gone = local.coordinator.owners[stage]
    del local.providers[gone], local.inboxes[gone]

    def carry(to: str, data: bytes) -> tuple[bytes]:
        frame = decode(data)
        if frame.kind == "revive":
            revived.add(int(frame.body["stage"]["index"]))
        return (data,)

    again = Coordinator(job("llama"), training("llama", STEPS))
    again.rebuild(read(path), local.now)
    local.carry = carry
    local.rebuilt(again)
    local.run()
    assert revived <= {stage}
    assert losses(local) == undisturbed("llama", STEPS)


def test_a_log_with_a_line_that_is_no_event_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "Left", "at_s": 1.0, "name": "a", "more": {}}\n{"event": "Nonsense"}\n')
    with pytest.raises(ValueError, match=r"events\.jsonl:2: no event"):
        read(path)


class _Died(Exception):
    pass
