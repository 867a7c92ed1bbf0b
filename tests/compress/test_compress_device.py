"""On a GPU: the hook, its futures and flags over NCCL, and the kernels' numbers. One GPU is enough; no test of these
has run on one yet. The same checks run on the CPU over gloo, so that what they claim is tried everywhere.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hook_harness import Net, batch, config_of, descend, loss, wrapped
from torch import nn

from llmsys.comm.place import Place
from llmsys.compress import register, transfer
from llmsys.compress.methods import sparse
from llmsys.compress.orthogonal import all_orthonormal_, orthonormal_
from llmsys.compress.reference import Reference
from llmsys.schema.compress import METHODS
from rank_pool import Pool

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FEW = ("none", "efsign", "topk", "powersgd", "acpsgd")
"""What is tried on a CPU here; all of them are on two ranks in test_compress_hook."""


@functools.cache
def group_of(device: str) -> Any:
    """A group of this rank alone, for as long as it lives: one that is let go of right after a step may be taken down
    by its own thread, which is still within a callback, and ends the process."""
    return dist.new_group(backend="nccl" if device == "cuda" else "gloo")


def hooked(place: Place, device: str, settings: dict[str, Any], alone: bool) -> dict[str, Any]:
    """Eight steps of one rank under DDP, the loss of step 3 infinite: how far gradients are from the reference's, and
    the steps that were left out. Collectives are real, over a group of one, unless the rank is to know that it is
    `alone`."""
    start = transfer.start
    if not alone:
        transfer.start = lambda request, group, world: start(request, group, 2)
    try:
        return _hooked(device, settings)
    finally:
        transfer.start = start


def _hooked(device: str, settings: dict[str, Any]) -> dict[str, Any]:
    config, model = config_of(settings), Net().to(device)
    ddp = wrapped(model, process_group=group_of(device))
    state = register(ddp, config)
    reference, worst, left_out = Reference(config, 1), 0.0, []
    named = dict(model.named_parameters())
    for step in range(8):
        x = batch(0, step).to(device)
        if step == 3:
            (loss(ddp(x)) * torch.inf).backward()
            assert not any(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        else:
            local = torch.autograd.grad(loss(model(x)), list(named.values()))
            wanted = reference.step([dict(zip(named, (g.cpu() for g in local), strict=True))])
            loss(ddp(x)).backward()
            for name, p in named.items():
                assert p.grad is not None
                worst = max(worst, float((p.grad.cpu() - wanted[name]).abs().max()))
        if state.left_out():
            left_out.append(step)
        if step == 3:
            model.zero_grad()
        descend(model)
    return {"worst": worst, "left_out": left_out}


def overflown(place: Place, device: str) -> list[float]:
    """A loss scale of 2^16 on this device, an overflow in step 3: the scales, and how far weights end from where they
    end without a scale."""
    ends, scales = [], []
    for scaled in (True, False):
        model = Net().to(device).float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**16, enabled=scaled)
        ddp = wrapped(model, process_group=group_of(device))
        register(ddp, config_of({}), loss_scale=scaler.get_scale)
        for step in range(8):
            value = loss(ddp(batch(0, step).to(device).float()))
            scaler.scale(value * torch.inf if step == 3 else value).backward()
            if scaled or step != 3:
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
        ends.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    return [*scales[:8], float((ends[0] - ends[1]).abs().max())]


@pytest.mark.parametrize(
    ("method", "device"),
    [*((name, "cpu") for name in FEW), *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in METHODS)],
)
def test_a_hook_over_real_collectives_gives_the_references_gradients(alone: Pool, method: str, device: str) -> None:
    """Eleven in four buckets, whose callbacks run on threads and streams of their own; fp16 rounds."""
    (found,) = alone.call("test_compress_device:hooked", device, {"method": method, "error_feedback": None}, False)
    assert found["worst"] < {"fp16": 1e-3, "bf16": 1e-2}.get(method, 1e-10)
    assert found["left_out"] == ([] if method in ("none", "fp16", "bf16") else [3])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["acpsgd", "powersgd", "topk"])
def test_one_rank_alone_exchanges_nothing_and_has_the_same(alone: Pool, method: str, device: str) -> None:
    """A future that is complete from the beginning, of a device whose tensors a callback returns."""
    (found,) = alone.call("test_compress_device:hooked", device, {"method": method}, True)
    assert found["worst"] < 1e-10


@pytest.mark.parametrize("device", DEVICES)
def test_a_grad_scaler_of_the_device_skips_and_goes_on(alone: Pool, device: str) -> None:
    ((*scales, far),) = alone.call("test_compress_device:overflown", device)
    assert scales == [2.0**16] * 3 + [2.0**15] * 5
    assert far == 0.0 if device == "cpu" else far < 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_many_factors_are_made_orthonormal_as_one_is(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 30), (4, 30), (2, 50), (4, 30), (1, 1)]
    factors = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]
    factors[1].zero_()
    wanted = [rows.clone() for rows in factors]
    for rows in wanted:
        orthonormal_(rows)
    all_orthonormal_(factors)
    for found, one in zip(factors, wanted, strict=True):
        torch.testing.assert_close(found, one, rtol=0, atol=1e-12)


@pytest.mark.gpu
def test_a_gpu_finds_the_largest_too() -> None:
    x = torch.randn(3 * sparse.PIECE, generator=torch.Generator().manual_seed(0))
    for k in (1, 1000, sparse.PIECE):
        wanted = x.abs().sort(descending=True).values[:k]
        for places in (sparse.largest(x.cuda(), k), sparse.above(x.cuda(), k, torch.Generator().manual_seed(0))):
            assert torch.equal(x[places.cpu().long()].abs().sort(descending=True).values, wanted)
