"""Stages that are computed again: what is sent for it is what is not there already, in frames that a wire carries."""

from __future__ import annotations

import functools

import pytest
from decentral_harness import example, model
from decentral_running import MICRO_BATCHES, advance, hold, losses, machines, training

from llmsys.decentral.broker import Job
from llmsys.decentral.chain import Chain, chain
from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.cost import Workload
from llmsys.decentral.local import Local
from llmsys.decentral.planes import CONSTANT
from llmsys.decentral.planes.layout import packed
from llmsys.decentral.planes.torch_stage import TorchPlane
from llmsys.decentral.trace import Traced, trace
from llmsys.decentral.wire import BROKER, decode

STEPS = 6
WORK = Workload(micro_batches=MICRO_BATCHES, most=1)
MOST = 128 << 10
"""Bytes of a frame: a stage's graph is in one, its 144 KiB of frozen weights are not."""


@functools.cache
def frozen() -> tuple[Traced, Chain]:
    """A model of which little is trained."""
    own = model("llama")
    for name, parameter in own.named_parameters():
        parameter.requires_grad_("proj" not in name)
    found = trace(own, example("llama"))
    return found, chain(found.graph)


def started(count: int, stages: int, **more: object) -> Local:
    traced, own = frozen()
    tensors = {key: packed(tensor) for key, tensor in traced.tensors.items()}
    made = training("llama", STEPS, graph=traced.graph, chain=own, tensors=tensors, **more)
    local = Local(Coordinator(Job(chain=own, work=WORK), made))
    for each in machines(hold(own, WORK, stages), count):
        local.join(each, TorchPlane())
    return local


@functools.cache
def alone() -> list[tuple[float, ...]]:
    local = started(1, 1)
    local.run()
    return losses(local)


@pytest.mark.parametrize("giver", ["the broker", "another", "itself"])
def test_frozen_weights_of_a_lost_stage_go_in_as_many_frames_as_they_need_to_who_has_none(
    monkeypatch: pytest.MonkeyPatch, giver: str
) -> None:
    """Whoever gives the copy that it begins with. Who kept that itself has them, and is sent nothing."""
    monkeypatch.setattr("llmsys.decentral.wire.FRAME_BYTES", MOST)
    monkeypatch.setattr("llmsys.decentral.holdings.CHUNK_BYTES", MOST // 4)
    given: dict[str, set[str]] = {}

    def carry(to: str, data: bytes) -> list[bytes]:
        frame = decode(data)
        if frame.kind == "state" and "copy" in frame.body:
            given.setdefault(frame.sender, set()).update(frame.tensors)
        return [data]

    local = started(1 if giver == "the broker" else 2, 1, owner_keeps=giver == "the broker")
    local.carry = carry
    advance(local, 3)
    if giver != "itself":
        *_, faster = machines(hold(frozen()[1], WORK, 1), 9)
        local.join(faster, TorchPlane())
    local.kill(local.coordinator.owners[0])
    local.run()
    assert losses(local) == alone()
    constants = {name for names in given.values() for name in names if name.startswith(CONSTANT)}
    if giver == "itself":
        assert given == {}
    else:
        assert constants == {name for name in given[BROKER] if name.startswith(CONSTANT)}
        assert constants == {CONSTANT + key for key in local.coordinator.recovery.where.now.stages[0].constants}
        assert (given[BROKER] == constants) == (giver == "another")
