"""Who cannot do what is its own to do says so, and others do it; the losses are those of one process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import queue
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from decentral_harness import traced
from decentral_running import job, losses, machines, mem_gib, training, undisturbed

from llmsys import schema
from llmsys.decentral import owner
from llmsys.decentral.chain import chain
from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.cost import Workload
from llmsys.decentral.cut import Stage
from llmsys.decentral.events import Left
from llmsys.decentral.fleet import Fleet
from llmsys.decentral.graph import Graph
from llmsys.decentral.link import LEAVE, provide
from llmsys.decentral.local import Local
from llmsys.decentral.plan import plan
from llmsys.decentral.planes import PARAMETER, Arrays, Rules
from llmsys.decentral.planes.torch_stage import TorchPlane, TorchStage
from llmsys.decentral.provider import Provider
from llmsys.decentral.quota import Meter
from llmsys.decentral.restarts import TRIES
from llmsys.decentral.wire import BROKER, Array, Frame, decode, encode

STEPS = 6


class Fails(TorchPlane):
    """A plane of whose stages `what` raises `error` from the `after`-th call on."""

    def __init__(self, what: str, error: Exception, after: int = 1) -> None:
        super().__init__()
        self.what, self.error, self.left = what, error, after

    def stage(self, graph: Graph, stage: Stage, given: Arrays, rules: Rules) -> TorchStage:
        made = super().stage(graph, stage, given, rules)
        setattr(made, self.what, self._failing(getattr(made, self.what)))
        return made

    def _failing(self, call: Callable[..., object]) -> Callable[..., object]:
        def called(*given: Any) -> object:
            if self.what != "put" or any(name.startswith(PARAMETER) for name in given[0]):  # not constants alone
                self.left -= 1
                if self.left <= 0:
                    raise self.error
            return call(*given)

        return called


def made(family: str, planes: dict[str, TorchPlane], **more: object) -> Local:
    """A job that two of three hold, beside a spare; whoever is not in `planes` has one that does as it should."""
    own = dataclasses.replace(job(family), least=3, reserve=1)
    local = Local(Coordinator(own, training(family, STEPS, **more)))
    for each in machines(mem_gib(family, 2), 3):
        local.join(each, planes.get(each.name, TorchPlane()))
    return local


@functools.cache
def roles(family: str) -> tuple[str, str]:
    """Who has the first stage of it, and who none."""
    local = made(family, {})
    local.round()
    (spare,) = local.coordinator.state.present - set(local.coordinator.owners)
    return local.coordinator.owners[0], spare


def beside(plane: TorchPlane, family: str = "llama") -> tuple[Local, str]:
    """Such a job, of which who has the first stage has this plane; its name."""
    name, _ = roles(family)
    return made(family, {name: plane}), name


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), ValueError("operands of no shape")])
@pytest.mark.parametrize(
    ("what", "after"), [("begin", 1), ("apply", 1), ("apply", 3), ("state", 3), ("forget", 2), ("squares", 2)]
)
def test_what_a_plane_raises_is_no_refusal_and_a_spare_takes_over_at_once(
    what: str, after: int, error: Exception
) -> None:
    """Of whatever kind: nothing is begun again and again with who would raise it again."""
    local, name = beside(Fails(what, error, after))
    local.run()
    own = local.coordinator
    assert losses(local) == undisturbed("llama", STEPS)
    assert own.restarts.astray == 0
    assert name not in own.state.present
    assert any(each.startswith(f"{name}: ") and str(error) in each for each in own.refusals)


def test_a_device_that_is_full_when_state_comes_is_no_refusal_either() -> None:
    local, name = beside(Fails("put", RuntimeError("CUDA out of memory")))
    local.run()
    assert losses(local) == undisturbed("llama", STEPS)
    assert (local.coordinator.restarts.astray, name in local.coordinator.state.present) == (0, False)


def test_who_refuses_what_it_is_told_is_planned_without_after_three_tries() -> None:
    """A ValueError of `put` says of a frame that it does not fit, which may be another's mistake: at first all begin
    again."""
    left: list[str] = []
    local, name = beside(Fails("put", ValueError("of another version")), "bert")  # no parameters come with a copy
    local.coordinator.journal.note = lambda event, more: left.append(event.name) if isinstance(event, Left) else None
    local.run()
    assert losses(local) == undisturbed("bert", STEPS)
    assert left == [name]
    assert local.coordinator.restarts.astray == TRIES


def test_who_cannot_compute_anothers_stage_again_says_so_and_stays() -> None:
    """In a check it is no part of its own that it cannot do."""
    _, spare = roles("llama")
    local = made("llama", {spare: Fails("put", RuntimeError("CUDA out of memory"))}, checks=1.0)
    local.run()
    own = local.coordinator
    assert spare in own.state.present
    assert f"{spare} cannot compute it again: RuntimeError: CUDA out of memory" in "".join(own.checks.verdicts)
    assert losses(local) == undisturbed("llama", STEPS)


def test_who_was_not_sent_all_that_it_begins_with_is_not_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece of it was lost: that is no fault of a plane, and all begin again."""
    monkeypatch.setattr("llmsys.decentral.holdings.CHUNK_BYTES", 1 << 14)
    local, name = beside(TorchPlane())
    lost: list[Frame] = []

    def carry(to: str, data: bytes) -> list[bytes]:
        frame = decode(data)
        if lost or (to, frame.kind, frame.body.get("piece")) != (name, "state", 0):
            return [data]
        lost.append(frame)
        return []

    local.carry = carry
    local.run()
    assert lost[0].body["of"] > 1
    assert (local.coordinator.restarts.astray, name in local.coordinator.state.present) == (1, True)
    assert losses(local) == undisturbed("llama", STEPS)


def test_what_no_frame_carries_is_said_and_others_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    local, name = beside(TorchPlane())

    def limited(frame: Frame) -> bytes:
        if (frame.sender, frame.kind) == (name, "ahead"):
            raise ValueError("a frame ahead of 600000000 bytes: must be 536870912 or less")
        return encode(frame)

    monkeypatch.setattr("llmsys.decentral.local.encode", limited)
    local.run()
    assert losses(local) == undisturbed("llama", STEPS)
    assert (local.coordinator.restarts.astray, name in local.coordinator.state.present) == (0, False)
    assert f"{name}: ahead: a frame ahead of 600000000 bytes: must be 536870912 or less" in local.coordinator.refusals


def test_a_provider_with_something_too_large_to_say_says_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes on until it is told to stop."""
    monkeypatch.setattr("llmsys.decentral.wire.FRAME_BYTES", 1 << 10)
    said: list[Frame] = []

    class Wire:
        inbox, meter, at_work = queue.SimpleQueue[bytes](), Meter(), contextlib.nullcontext

        def say(self, frame: Frame) -> None:
            said.append(decode(encode(frame)))

        def close(self) -> None: ...

    provider = Provider("p0", TorchPlane())
    provider.says.out = [Frame(kind="ahead", sender="p0", to="p1", tensors={"x": Array.of_bytes(bytes(1 << 10))})]
    Wire.inbox.put(LEAVE)
    Wire.inbox.put(encode(Frame(kind="stop", sender=BROKER, to="p0")))
    provide(provider, Wire())  # type: ignore[arg-type]
    assert [each.kind for each in said] == ["leave", "unable"]
    assert "a frame ahead of" in said[-1].body["why"]


def test_a_model_is_cut_only_where_a_frame_carries_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    own, task = chain(traced("llama").graph), schema.DecentralTrain(stages=2, providers=2)
    inner = np.maximum(own.ahead, own.back)[own.places[1:-1]]
    most = int(np.median(inner))
    assert inner.max() > most
    monkeypatch.setattr("llmsys.decentral.owner.TENSOR_BYTES", most)
    found = owner.carried(own, task, {})
    assert (found.places[0], found.places[-1], set(found.places) < set(own.places)) == (0, own.count, True)
    work = Workload(micro_batches=4, most=1)
    (pipeline,) = plan(found, Fleet(providers=tuple(owner.machines(task, found, work))), work).pipelines
    assert len(pipeline.cuts) == 3
    assert own.ahead[pipeline.cuts[1]] <= most


def test_a_micro_batch_that_no_frame_carries_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where there is something to send."""
    monkeypatch.setattr("llmsys.decentral.owner.TENSOR_BYTES", 1 << 10)
    own, task = chain(traced("llama").graph), schema.DecentralTrain(stages=2, providers=2)
    said = r"train.micro_batch=2, train.length=16: wherever .* lower train.micro_batch or train.length"
    with pytest.raises(ValueError, match=said):
        owner.carried(own, task, {"train.micro_batch": 2, "train.length": 16})
    alone, work = schema.DecentralTrain(stages=1, providers=1), Workload(micro_batches=4, most=1)
    whole = owner.carried(own, alone, {})
    assert plan(whole, Fleet(providers=tuple(owner.machines(alone, whole, work))), work).pipelines[0].cuts == (
        0,
        own.count,
    )
