"""What a method holds beside the gradients, by the bytes of live tensors, on a rank alone and among four."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated import extra_copies

from llmsys.comm.place import Place
from llmsys.compress import bits
from llmsys.compress.config import CompressConfig
from llmsys.compress.methods import sparse
from llmsys.schema.compress import METHODS
from rank_pool import Pool

THREE = {"a": (400, 400), "b": (400, 400), "c": (400, 400), "d": (400,)}
ONE = {"w": (400, 1000)}
KEPT = {"none": 0.001, "fp16": 0.51, "bf16": 0.51, "sign": 0.25}
"""Copies of the gradients, of those that keep no errors; of the others 1.1."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there at a time is as much smaller than it is as 400,000 elements are than 100 million."""
    for module, name in ((sparse, "PIECE"), (sparse, "ROOM"), (bits, "AT_ONCE")):
        monkeypatch.setattr(module, name, getattr(module, name) // (16 if module is bits else 256))


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_takes_at_most_one_copy_and_a_tenth(method: str, world: int) -> None:
    """In fp32. Scaled sign has beside it the bits that all ranks send, each 1 / 32 of a copy."""
    most = KEPT.get(method, 1.1) + (world / 32 if method == "efsign" else 0)
    assert extra_copies(CompressConfig(method=method), world, THREE) <= most


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("density", [0.001, 0.01])
@pytest.mark.parametrize("select", ["exact", "threshold"])
def test_one_large_tensor_takes_no_more(select: str, density: float, world: int) -> None:
    """All pieces' k largest were 1.3 and 6 copies. What the other ranks send is 8 k bytes each."""
    config = CompressConfig(method="topk", density=density, select=select)
    assert extra_copies(config, world, ONE) <= 1.1 + 2 * density * (world - 1)


@pytest.mark.parametrize("method", ["powersgd", "acpsgd"])
def test_a_step_that_refreshes_takes_one_more(method: str) -> None:
    """The gradients travel whole, and what they were is kept until it is known that they have arrived."""
    assert 1.9 < extra_copies(CompressConfig(method=method, refresh_every=2), 4, THREE) <= 2.05


@pytest.mark.parametrize("errors", ["half", "gradient"])
@pytest.mark.parametrize("method", ["efsign", "topk", "randomk", "powersgd", "acpsgd"])
def test_in_half_precision_errors_are_what_they_are_kept_in(method: str, errors: str) -> None:
    """One copy of the gradients, or, in fp32, two; low rank has, for a moment, a matrix in fp32, here a third of two
    copies, and scaled sign bits of four ranks, each 1 / 16 of a copy, and what it sends."""
    more = {"powersgd": 0.7, "acpsgd": 0.7, "efsign": 5 / 16}.get(method, 0)
    config = CompressConfig(method=method, error_dtype=errors)
    assert extra_copies(config, 4, THREE, torch.bfloat16) <= (1 if errors == "half" else 2) + 0.1 + more


def under_ddp(place: Place, settings: Sequence[dict[str, Any] | None]) -> list[float]:
    """The most that is alive in five steps under DDP, in copies of the gradients, which are 1 MiB; None: DDP alone."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from compress_memory import Stack, Subject, peak

    found = [peak(Subject(each), Stack(layers=4, width=256)) for each in settings]
    return [most / gradients for most, gradients in found]


def test_what_ddp_throws_away_is_not_kept(pool: Pool) -> None:
    """Its first buckets, in the pass after the first step, where a reference to them was a copy of the gradients."""
    settings = [None, {"method": "acpsgd"}, {"method": "powersgd"}, {"method": "randomk"}]
    for plain, *others in pool.call("test_compress_memory:under_ddp", settings):
        assert max(others) - plain < 1.5


def all_at_once(x: torch.Tensor, k: int) -> torch.Tensor:
    """The largest of all pieces' largest."""
    pieces = [x[start : start + sparse.PIECE].abs() for start in range(0, len(x), sparse.PIECE)]
    found = [torch.topk(piece, min(k, len(piece)), sorted=False).indices for piece in pieces]
    places = torch.cat([places + start for places, start in zip(found, range(0, len(x), sparse.PIECE), strict=True)])
    return places[torch.topk(x[places].abs(), k, sorted=False).indices]


CASES = {
    "normal": lambda x: x,
    "bf16": lambda x: x.bfloat16(),
    "few are large": lambda x: torch.where(torch.arange(len(x)) < 900, x, 1e-6 * x),
    "zeros": lambda x: torch.where(x.abs() > 2, x, 0.0),
    "equal": lambda x: x.sign(),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [1, 700, 5000, 30_000])
def test_the_best_so_far_are_the_best_in_the_end(case: str, k: int) -> None:
    """Of 60 pieces, chosen among up to twenty times. Where there is room for all candidates it is one choice, which is
    the same of equal ones too."""
    x = CASES[case](torch.randn(60_000, generator=torch.Generator().manual_seed(0)))
    wanted = x.abs().sort(descending=True).values[:k]
    for places in (sparse.largest(x, k), sparse.above(x, k, torch.Generator().manual_seed(0))):
        assert len(set(places.tolist())) == k
        assert torch.equal(x[places].abs().sort(descending=True).values, wanted)
    few = x[: sparse.ROOM]
    chosen = min(k, len(few))
    assert sorted(sparse.largest(few, chosen).tolist()) == sorted(all_at_once(few, chosen).tolist())
