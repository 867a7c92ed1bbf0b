"""Under DDP, on real ranks: the reference's gradients, replicas that stay equal, faults that all ranks notice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rank_pool import Pool

METHODS = ("none", "fp16", "bf16", "sign", "efsign", "topk", "randomk", "powersgd", "acpsgd")
FEW = [
    method if method in ("none", "sign", "topk", "powersgd", "acpsgd") else pytest.param(method, marks=pytest.mark.slow)
    for method in METHODS
]
"""One of each kind of exchange; what the others compute is tested without processes."""
COLLECTIVES = {
    "sign": {"all_to_all": 1, "all_gather": 1},
    "efsign": {"all_gather": 1},
    "topk": {"all_gather": 1},
    "powersgd": {"all_reduce": 2},
}
"""Of a bucket and step; of the others one all-reduce."""
BUCKETS = 4


@pytest.fixture(scope="module")
def four() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()


def check(found: list[dict[str, float]], method: str, within: float = 1e-10) -> None:
    for rank in found:
        assert rank.pop("worst") < within
        assert rank.pop("apart") == 0.0
        assert rank == {kind: BUCKETS * n for kind, n in COLLECTIVES.get(method, {"all_reduce": 1}).items()}


@pytest.mark.parametrize("method", FEW)
def test_gradients_are_the_references_in_one_collective_a_bucket(pool: Pool, method: str) -> None:
    """Sign-SGD and Power-SGD have two rounds. Four buckets, which DDP cuts anew after the first step."""
    check(pool.call("hook_harness:against_reference", {"method": method}, {}), method)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_on_four_ranks_too(four: Pool, method: str) -> None:
    """Of four numbers in 16 bits gloo rounds the sums on the way, the reference only the last."""
    within = {"fp16": 1e-3, "bf16": 1e-2}.get(method, 1e-10)
    check(four.call("hook_harness:against_reference", {"method": method}, {}), method, within)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, 4),
        ({"find_unused_parameters": True}, 1),
        ({"static_graph": True}, 1),
        ({"static_graph": True, "gradient_as_bucket_view": False}, 1),
        ({"set_to_none": False}, 1),
        ({"gradient_as_bucket_view": False}, 1),
        pytest.param({"compile": "aot_eager"}, 1, marks=pytest.mark.slow),
    ],
)
def test_whatever_ddp_does_beside(pool: Pool, options: dict[str, Any], parts: int) -> None:
    """Accumulation, unused parameters, a graph said to be static, gradients that stay, copies of them, compilation."""
    for rank in pool.call("hook_harness:against_reference", {"method": "acpsgd"}, options, 5, parts):
        assert rank["all_reduce"] > 1, "several buckets"
        assert rank["worst"] < 1e-10
        assert rank["apart"] == 0.0


@pytest.mark.parametrize(
    ("method", "options", "to_none"),
    [
        ("acpsgd", {}, True),
        ("acpsgd", {"refresh_every": 3}, True),
        ("topk", {"gradient_as_bucket_view": False}, True),
        ("topk", {"gradient_as_bucket_view": False}, False),
        ("efsign", {}, False),
    ],
)
def test_what_ddp_throws_away_is_sent_later(pool: Pool, method: str, options: dict[str, Any], to_none: bool) -> None:
    """Of a layer that no rank has used DDP keeps `.grad` as it was: what was sent for it is not lost. (Where gradients
    are zeros that lie in the bucket, and not None, they become what was sent, on every rank.)"""
    options = dict(options)
    settings = {"method": method, "refresh_every": options.pop("refresh_every", 0)}
    for rank in pool.call("hook_harness:sometimes_unused", settings, options, to_none):
        assert rank["far"] < 1e-12
        assert rank["apart"] == 0.0
        assert (rank["stray"] > 0) == (not to_none and not options), "what DDP does beside"


@pytest.mark.parametrize("method", ["powersgd", "acpsgd"])
def test_replicas_stay_equal_to_the_bit(pool: Pool, method: str) -> None:
    """Ranks seeded differently, four buckets, 50 steps: a Q of Power-SGD that was started from a callback, on gloo, met
    that of another bucket sooner or later."""
    assert pool.call("hook_harness:replicas", {"method": method}, 50) == [0.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["powersgd", "acpsgd", "sign", "topk"])
def test_replicas_of_four_stay_equal(four: Pool, method: str) -> None:
    assert four.call("hook_harness:replicas", {"method": method}, 50) == [0.0] * 4


@pytest.mark.parametrize("method", ["none", "topk", "powersgd", "acpsgd"])
def test_the_aggregator_does_what_the_hook_does(pool: Pool, method: str) -> None:
    assert max(pool.call("hook_harness:aggregated", {"method": method})) < 1e-10


@pytest.mark.parametrize("method", ["topk", "acpsgd"])
def test_a_gradient_that_is_missing_is_zeros(pool: Pool, method: str) -> None:
    """Of what is frozen, or was not used, also on one rank alone, for which the others would wait."""
    expected = {"worst": 0.0, "apart": 0.0}
    assert pool.call("hook_harness:without_gradients", {"method": method}) == [expected, expected]


@pytest.mark.parametrize("value", [math.inf, pytest.param(math.nan, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["sign", "topk", "powersgd", "acpsgd"])
def test_one_ranks_overflow_is_noticed_by_all_and_forgotten(pool: Pool, method: str, value: float) -> None:
    expected = {"bad": [3], "apart": 0.0, "finite": True}
    assert pool.call("hook_harness:poisoned", {"method": method}, value) == [expected, expected]


def test_a_grad_scaler_skips_and_goes_on(pool: Pool) -> None:
    """A scale that is a power of two changes no bit, before and after it was halved, and a step that was left out
    nothing but for rounding, in fp32."""
    for found in pool.call("hook_harness:scaled", {"method": "acpsgd"}):
        assert found["scales"] == [2.0**16] * 3 + [2.0**15] * 5
        assert found["left_out"] == 0.0
        assert found["never"] < 1e-7


@pytest.mark.parametrize("parts", [1, 3])
def test_a_loss_scale_is_read_before_the_pass_whose_gradients_travel(pool: Pool, parts: int) -> None:
    """On a GPU to read it waits for all that was asked for: amid the backward pass, that is half a step."""
    step = ["backward"] * (parts - 1) + ["read", "backward"]
    assert pool.call("hook_harness:scale_read", parts) == [[step] * 4] * 2


@pytest.mark.parametrize("cap", [0.002, 25.0])
@pytest.mark.parametrize("method", ["acpsgd", *(pytest.param(x, marks=pytest.mark.slow) for x in ("powersgd", "topk"))])
def test_a_saved_state_goes_on_with_the_same_bits(pool: Pool, method: str, cap: float, tmp_path: Path) -> None:
    """Saved between ACP-SGD's two factors, and read with buckets as they were and with one."""
    assert pool.call("hook_harness:resumed", {"method": method}, str(tmp_path), cap) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("config", "the same config"),
        ("model", "the same model"),
        ("shapes", "the same model"),
        ("types", "the same model"),
        ("buckets", "the same bucket_mib"),
        ("scaler", "the same loss_scale"),
        ("sparse", "sparse=False"),
        ("bare", "not wrapped in DistributedDataParallel"),
    ],
)
def test_what_ranks_must_have_alike_is_checked_at_once(pool: Pool, case: str, words: str) -> None:
    """Before anything is exchanged: with other types or buckets gloo ended the process, or waited for ever."""
    assert all(words in told for told in pool.call("hook_harness:refused", case))


@pytest.mark.parametrize(
    ("case", "fine", "wrong"),
    [
        ("sparse on one", "another rank refuses", "sparse=False"),
        ("empty on one", "another rank refuses", "no parameters"),
    ],
)
def test_what_one_rank_refuses_is_refused_by_all(pool: Pool, case: str, fine: str, wrong: str) -> None:
    """Each with what it knows; nobody waits for the one that has gone."""
    told = pool.call("hook_harness:refused", case)
    assert fine in told[0]
    assert wrong in told[1]


@pytest.mark.parametrize(
    ("case", "fine", "wrong"),
    [("of another step", "the same state", "the same state"), ("cut off", "another rank refuses", "damaged")],
)
def test_ranks_that_load_different_states_are_told_so(
    pool: Pool, case: str, fine: str, wrong: str, tmp_path: Path
) -> None:
    """One sent P and the other Q, in messages of one size; or one was gone, and the other blamed the network."""
    told = pool.call("hook_harness:loaded", str(tmp_path), case)
    assert fine in told[0]
    assert wrong in told[1]


def test_a_model_of_vectors_only(pool: Pool) -> None:
    assert max(pool.call("hook_harness:vectors")) < 1e-7
