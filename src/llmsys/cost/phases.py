"""A step's phases, and what is alive in each: the peak is their maximum.

    load        before the first step, where an engine cuts weights over ranks that it is given whole
    forward     its end: everything that is kept, and the logits as the head has made them, cast for the loss, and as
                log-probabilities; or the last block, with what it does not keep; what an engine has gathered
    loss        the backward pass begins: the log-probabilities and their gradient, before and after the softmax. A
                chunked loss has a moment of its own instead
    backward    the worst of its moments: blocks from the last to the first, what later ones kept is gone and their
                gradients have come
    reduction   all gradients are there, and what ranks exchange of them
    optimizer   the update; AdamW is fused and makes nothing, an engine may

Weights, the optimizer's state and master copies are in all of them (AdamW makes its state in its first step, at the
end, so that step needs no more than later ones). Gradients are there where micro-batches are accumulated, and where
they live in buckets (DDP). What an engine offloads counts on the host, or where the device is the host with the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsys import schema
from llmsys.cost.case import Case
from llmsys.cost.engines import Holding

if TYPE_CHECKING:
    from llmsys.cost.memory import Ledger

KERNELS = 32 * 2**20
"""cuBLAS's workspace as the trainer sets it (`:4096:8`); torch takes it from the same allocator."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Bytes of one rank by kind: `weights`, `gradients`, `optimizer`, `master`, `compress`, `activations`, `logits`,
    `workspace`; those that are 0 left out."""

    name: str
    device: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


def of(case: Case, parts: Ledger, held: Holding) -> list[Phase]:
    """All phases, in order."""
    state = {"weights": held.weights, "optimizer": held.optimizer, "master": held.master, "compress": held.compress}
    state["workspace"] = held.workspace.get("always", 0)
    gradients, host = held.gradients, {kind: nbytes for kind, nbytes in held.host.items() if nbytes}
    if case.device == "cpu":  # the same memory
        state["workspace"] += host.get("workspace", 0)
        host = {}
    else:
        state = {kind: nbytes - host.get(kind, 0) * (kind != "workspace") for kind, nbytes in state.items()}
        state["workspace"] += KERNELS
        gradients -= host.get("gradients", 0)
    accumulated = schema.accumulation(case.train, case.engine) > 1
    before = gradients if held.standing or (accumulated and held.trained) else 0

    def phase(name: str, gradients: int = 0, activations: int = 0, logits: int = 0, workspace: int = 0) -> Phase:
        found = {**state, "gradients": max(gradients, before), "activations": activations, "logits": logits}
        found["workspace"] = state["workspace"] + workspace + held.workspace.get(name, 0)
        return Phase(name=name, device={kind: n for kind, n in found.items() if n}, host=host)

    rising = [
        (there + held.reducing * (made > held.reducing), gradients * made // held.trained if held.trained else 0)
        for there, made in parts.moments
    ]
    there, made = max(rising, key=lambda each: each[0] + max(before, each[1]), default=(0, 0))
    cast = 4 * (parts.head // case.product_width) if case.product_width < 4 else 0
    logits, message = parts.logits + parts.head + cast, held.workspace.get("message", 0)
    forward = {"activations": parts.kept, "logits": logits}
    if message + parts.running > logits:
        forward = {"activations": parts.kept + parts.running, "workspace": message}
    gradient = 0 if parts.fleeting else 2 * parts.logits
    loading = [Phase(name="load", device={"weights": held.loading})] if held.loading else []
    return [
        *loading,
        phase("forward", **forward),
        phase("loss", activations=parts.kept, logits=parts.logits + gradient, workspace=parts.fleeting),
        phase("backward", gradients=made, activations=there),
        phase("reduction", gradients=gradients if held.trained else 0),
        phase("optimizer", gradients=gradients),
    ]
