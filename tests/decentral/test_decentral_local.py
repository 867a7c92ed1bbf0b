"""The protocol: whatever happens to providers, the losses are bit for bit those of one process that nothing happens to,
no committed step is lost, and of each that was under way at most one attempt."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

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
from llmsys.decentral.events import Committed
from llmsys.decentral.holdings import Holdings
from llmsys.decentral.local import Local, Stalled
from llmsys.decentral.planes.layout import packed, unpacked
from llmsys.decentral.planes.torch_stage import TorchPlane
from llmsys.decentral.whereabouts import JobLost, Stuck
from llmsys.decentral.wire import BROKER, Frame, Malformed, decode, encode, header
from llmsys.errors import NotANumber
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
    assert local.coordinator.astray == 0


def test_a_copy_of_which_a_piece_is_missing_is_none() -> None:
    made, state = Holdings(), {"p/a": packed(torch.ones(2)), "c/b": packed(torch.zeros(1))}
    assert not made.keep((1, 0), 3, {"p/z": state["p/a"]}, piece=1, of=2)
    assert not made.copies
    assert made.keep((1, 0), 3, state, piece=0, of=2)
    assert set(made.copies[1, 0][3]) == {"p/a", "p/z"}


def test_a_loss_that_is_no_number_ends_the_job_before_it_is_applied() -> None:
    local = together("llama", 2, 2, STEPS, rate=lambda step: 1e30)
    with pytest.raises(NotANumber, match="step 2: a loss or a gradient is NaN or infinite"):
        local.run()
    assert local.coordinator.state.step == 1


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
    ("revived", {"cutting": 9, "stage": 9, "since": 0}),
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
    step = 2**50 if kind == "copied" or "keep" in body else own.state.step
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
    before = (provider.live, provider.epoch, dict(provider.here.stages))
    provider.job = "of a broker"
    provider.take(Frame(kind="measure", sender=BROKER, to=provider.name, body={"id": 1, "bytes": 10}))
    assert [each.kind for each in provider.out] == ["measured"]
    assert (provider.live, provider.epoch, provider.here.stages) == before


def test_what_never_changes_is_not_changed_by_others() -> None:
    made = Holdings()
    made.note({"c/mask": packed(torch.ones(2)), "p/a": packed(torch.ones(2))})
    made.note({"c/mask": packed(torch.zeros(2)), "c/other": packed(torch.zeros(2))})
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


def test_a_log_with_a_line_that_is_no_event_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "Left", "at_s": 1.0, "name": "a", "more": {}}\n{"event": "Nonsense"}\n')
    with pytest.raises(ValueError, match=r"events\.jsonl:2: no event"):
        read(path)


class _Died(Exception):
    pass
