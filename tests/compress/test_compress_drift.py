"""Replicas that drift apart are noticed where somebody has asked for it, and nobody pays for it who has not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hook_harness import Net, apart, batch, config_of, descend, loss, wrapped
from torch import Tensor

from llmsys.comm.place import Place
from llmsys.comm.traffic import Traffic
from llmsys.compress import Aggregator, drift, register
from llmsys.compress.methods import lowrank
from rank_pool import Pool


def trained(place: Place, settings: dict[str, Any], unequal: bool, aggregate: bool = False) -> dict[str, Any]:
    """Eight steps in fp32 from equal weights, where, if machines are `unequal`, rank 1 has a QR that rounds otherwise:
    how far it came, how far weights are apart, what it was told, and its collectives."""
    model, plain = Net().float(), lowrank.all_orthonormal_
    config = config_of(settings)
    ddp = model if aggregate else wrapped(model)
    state = Aggregator(model.named_parameters(), config) if aggregate else register(ddp, config)  # type: ignore[arg-type]

    def otherwise(factors: Sequence[Tensor]) -> None:
        for rows in factors:
            rows.copy_(torch.linalg.qr(rows.double().t()).Q.t())

    if unequal and place.rank == 1:
        lowrank.all_orthonormal_ = otherwise  # type: ignore[assignment]
    told, traffic = "", Traffic()
    try:
        with traffic:
            for step in range(8):
                loss(ddp(batch(place.rank, step).float())).backward()
                if isinstance(state, Aggregator):
                    state.aggregate([p.grad for p in model.parameters()])  # type: ignore[misc]
                descend(model)
    except ValueError as error:
        told = str(error)
    finally:
        lowrank.all_orthonormal_ = plain
    return {"step": state.step, "apart": apart(model), "told": told, "calls": traffic.calls["all_reduce"]}


@pytest.mark.parametrize("aggregate", [False, True])
def test_ranks_that_round_differently_are_told_at_the_next_check(pool: Pool, aggregate: bool) -> None:
    """All of them, and before their differences have become large; without the check nobody is."""
    for rank in pool.call("test_compress_drift:trained", {"check_every": 3}, True, aggregate):
        assert "the ranks do not have the same weights before step 3" in rank["told"]
        assert rank["step"] == 3
        assert 0 < rank["apart"] < 1e-6
    silent = pool.call("test_compress_drift:trained", {}, True, aggregate)
    assert all(rank["step"] == 8 and rank["apart"] > 0 and not rank["told"] for rank in silent)


def test_equal_ranks_hear_nothing_and_pay_one_small_message_a_check(pool: Pool) -> None:
    checked = pool.call("test_compress_drift:trained", {"check_every": 3}, False)
    plain = pool.call("test_compress_drift:trained", {}, False)
    for with_check, without in zip(checked, plain, strict=True):
        assert with_check == {**without, "calls": without["calls"] + 2}
        assert (without["step"], without["apart"], without["told"]) == (8, 0.0, "")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_checksum_sees_every_bit_and_its_place(dtype: torch.dtype) -> None:
    """Also two changes whose sum is zero, on both sides of where it is made of two pieces."""
    x = torch.randn(drift.PIECE + 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, found = x.clone(), {int(drift.checksum(x))}
    words = drift.WORDS[x.element_size()]
    for places in ([0], [drift.PIECE + 4], [7, drift.PIECE + 2], [1, 2]):
        other = x.clone()
        for place, change in zip(places, (1, -1), strict=False):
            other.view(words)[place] += change
        found.add(int(drift.checksum(other)))
    assert len(found) == 5
    assert int(drift.checksum(before)) in found
    assert torch.equal(x, before)
