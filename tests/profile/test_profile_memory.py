"""Bytes that can be counted by hand, and a probe that leaves no trace."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from llmsys.profile import memory


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))


def test_saved_bytes_are_those_of_a_hand_count() -> None:
    """Linear keeps x [5, 8] for dW; ReLU its output [5, 16], which the next layer keeps too: one storage, counted once.

    Weights are kept as well, but they are there anyway.
    """
    model, x = two_layers(), torch.randn(5, 8)
    assert memory.saved_tensors(model, lambda: model(x).sum()) == 4 * (5 * 8 + 5 * 16)


def test_two_views_of_one_storage_count_once() -> None:
    """h * h.T keeps both factors, which are one piece of memory."""
    model, x = nn.Linear(4, 4, bias=False), torch.randn(4, 4)

    def forward() -> Tensor:
        h = model(x)
        return (h * h.T).sum()

    assert memory.saved_tensors(model, forward) == 4 * (16 + 16), "x for dW, and h"


def test_a_frozen_layer_keeps_no_input() -> None:
    """Which is all that LoRA-FA is about."""
    model, x = two_layers(), torch.randn(5, 8)
    model[0].requires_grad_(False)
    assert memory.saved_tensors(model, lambda: model(x).sum()) == 4 * 5 * 16


def test_the_probe_leaves_no_trace() -> None:
    """Neither the random stream (dropout draws from it) nor gradients, weights, or the model's mode."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).eval()
    x = torch.randn(4, 8)
    model(x).sum().backward()
    state = torch.get_rng_state()
    before: list[Tensor] = [t.clone() for p in model.parameters() for t in (p.detach(), p.grad) if t is not None]
    assert memory.saved_tensors(model, lambda: model(x).sum()) > 4 * 4 * 8, "the dropout mask counts: it did train"
    after = [t for p in model.parameters() for t in (p.detach(), p.grad) if t is not None]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not model.training


def test_accounted_is_a_hand_count() -> None:
    """8x16 frozen, 16x4 trained, a buffer of 3: AdamW keeps two moments and a 4-byte step for what is trained."""
    model = two_layers()
    model[0].requires_grad_(False)
    model.register_buffer("extra", torch.zeros(3))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.randn(5, 8)).sum().backward()
    optimizer.step()
    found = memory.accounted(memory.held_locally(model, optimizer), saved_bytes=100)
    assert found == {
        "weights_bytes": 4 * (128 + 64 + 3),
        "gradients_bytes": 4 * 64,
        "optimizer_bytes": 2 * 4 * 64 + 4,
        "saved_bytes": 100,
        "accounted_bytes": 4 * 195 + 4 * 64 + 516 + 100,
    }


def test_a_storage_counts_once_and_for_the_first_kind_that_has_it() -> None:
    """Two views of one buffer of 100 elements; a stand-in for gradients counts its elements."""
    flat = torch.zeros(100)
    held = {"weights": [flat[:10], flat[10:30]], "gradients": [torch.empty(30, device="meta")], "master": [flat]}
    assert memory.accounted(held, 0) == {
        "weights_bytes": 400,
        "gradients_bytes": 120,
        "master_bytes": 0,
        "saved_bytes": 0,
        "accounted_bytes": 520,
    }


def test_of_a_tensor_that_is_cut_over_ranks_the_local_part_counts() -> None:
    """A mesh of one rank: what is saved, and held, is the DTensor's own memory, and its mesh is no tensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    from llmsys.comm.group import group
    from llmsys.comm.place import LOOPBACK, Place, listen

    listener, port = listen(LOOPBACK)
    with group(Place(rank=0, world=1, store=(LOOPBACK, port), listener=listener), torch.device("cpu")):
        mesh = init_device_mesh("cpu", (1,))
        model = distribute_module(two_layers(), mesh)
        x = distribute_tensor(torch.randn(5, 8), mesh, [Shard(0)])
        assert memory.saved_tensors(model, lambda: model(x).sum()) == 4 * (5 * 8 + 5 * 16)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        model(x).sum().backward()
        optimizer.step()
        found = memory.accounted(memory.held_locally(model, optimizer), 0)
    assert found["weights_bytes"] == found["gradients_bytes"] == 4 * (128 + 64)
    assert found["optimizer_bytes"] == 2 * 4 * (128 + 64) + 2 * 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
def test_paused_memory_does_not_count() -> None:
    """200 MB during a pause leave the peak alone; 200 MB before the next pause do not. Where the mark can be reset."""
    peak = memory.Peak(torch.device("cpu"))
    peak.resume()
    peak.pause()
    torch.ones(50_000_000)
    peak.resume()
    peak.pause()
    quiet = peak.summary
    peak.resume()
    torch.ones(50_000_000)
    peak.pause()
    if quiet["host_peak_reset"]:
        assert peak.summary["host_peak_gib"] > quiet["host_peak_gib"] + 0.15
    else:
        assert peak.summary["host_peak_gib"] * memory.GIB == pytest.approx(memory.maxrss_bytes())


def test_without_a_reset_the_record_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "reset_host_peak", lambda: False)
    peak = memory.Peak(torch.device("cpu"))
    peak.resume()
    peak.pause()
    assert peak.summary["host_peak_reset"] == 0
    assert peak.summary["host_peak_gib"] * memory.GIB == memory.maxrss_bytes()


class Allocator:
    """What `Peak` asks torch.cuda, of a device of 80 GiB of which the driver itself needs 1: GiB allocated and reserved
    now and at most since the last reset, and retries."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated = self.most_allocated = 3.0
        self.reserved = self.most_reserved = 40.0  # loading has left 37 of cache behind
        self.retries = 2
        for name, found in (
            ("max_memory_allocated", lambda _: self.most_allocated * memory.GIB),
            ("max_memory_reserved", lambda _: self.most_reserved * memory.GIB),
            ("memory_reserved", lambda _: self.reserved * memory.GIB),
            ("mem_get_info", lambda _: ((79 - self.reserved) * memory.GIB, 80 * memory.GIB)),
            ("memory_stats", lambda _: {"num_alloc_retries": self.retries}),
            ("reset_peak_memory_stats", self._reset),
            ("empty_cache", self._empty),
        ):
            monkeypatch.setattr(torch.cuda, name, found)

    def _reset(self, _: torch.device) -> None:
        self.most_allocated, self.most_reserved = self.allocated, self.reserved

    def _empty(self) -> None:
        self.reserved = self.allocated

    def rise(self, most: float, reserved: float, now: float) -> None:
        """Allocates up to `most` in `reserved`, of which `now` is there in the end."""
        self.most_allocated, self.most_reserved = most, max(reserved, self.most_reserved)
        self.reserved = now


def test_a_gpu_s_peak_is_of_the_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of loading, whose cache is given back before the first step and only then, nor of an evaluation; what was
    reserved at the peak and has been given back since counts as in use. Retries are those of the steps."""
    made = Allocator(monkeypatch)
    peak = memory.Peak(torch.device("cuda"))
    peak.resume()
    made.rise(10.0, 12.0, now=11.0)
    made.retries += 1
    peak.pause()
    first = {key: value for key, value in peak.summary.items() if not key.startswith("host")}
    assert first == {"peak_gib": 10.0, "reserved_gib": 12.0, "device_gib": 13.0, "alloc_retries": 1}
    made.rise(30.0, 35.0, now=35.0)  # an evaluation
    peak.resume()
    assert made.reserved == 35.0, "a cache that steps have made is theirs"
    peak.pause()
    assert peak.summary["peak_gib"] == 10.0
    assert peak.summary["reserved_gib"] == 35.0
    assert peak.summary["alloc_retries"] == 1
