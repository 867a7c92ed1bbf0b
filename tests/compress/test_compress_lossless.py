"""Nothing is lost and nothing is poisoned: what overflows, in whatever type, leaves healthy memories behind, and what a
step has sent that is left out stands in the memories again.
"""

from __future__ import annotations

import math

import pytest
import torch
from simulated import CONFIGS as SETTINGS
from simulated import SHAPES, Ranks, distance, random_grads
from torch import Tensor

from llmsys.compress import Aggregator
from llmsys.compress.config import CompressConfig
from llmsys.schema.compress import ERROR_FEEDBACK

ALL = [*({"method": method} for method in ERROR_FEEDBACK), {"method": "topk", "select": "threshold"}]


CONFIGS = {name: each for name, each in SETTINGS.items() if each.method != "none"}


def config(**settings: object) -> CompressConfig:
    return CompressConfig(**{"r": 2, "density": 0.1, "min_rate": 1, **settings})  # type: ignore[arg-type]


def finite(ranks: list[dict[str, Tensor]]) -> list[bool]:
    return [all(bool(g.isfinite().all()) for g in rank.values()) for rank in ranks]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_a_step_with_a_gradient_that_is_not_finite_has_never_been(name: str, poison: float) -> None:
    """It comes out not finite on every rank, and all later steps are what they are where there was no such step."""
    ranks, without = Ranks(CONFIGS[name], 3), Ranks(CONFIGS[name], 3)
    for step in range(8):
        grads = random_grads(3, step)
        if step in (3, 4):
            grads[1]["a"][3, 5] = poison
            assert finite(ranks.step(grads)) == [False] * 3
        else:
            assert distance(ranks.step(grads), without.step(grads)[0]) < 1e-11, step


@pytest.mark.parametrize("method", ERROR_FEEDBACK)
def test_in_buckets_that_were_finite_a_step_that_is_left_out_comes_late(method: str) -> None:
    """Under a hook nobody has their gradients any more: with what was sent of them they stay in the memory."""
    ranks = Ranks(config(method=method), 3)
    given, applied = (torch.zeros(40, 8, dtype=torch.float64) for _ in range(2))
    for step in range(8):
        grads = random_grads(3, step)
        given += sum(rank["d"] for rank in grads) / 3
        if step == 4:
            grads[1]["a"][3, 5] = math.inf
        found = ranks.step(grads, cuts=2)
        if finite(found) == [True] * 3:
            applied += found[0]["d"]
    torch.testing.assert_close(applied + sum(ranks.errors("d")) / 3, given, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_aggregator_leaves_out_all_of_a_step(name: str) -> None:
    """It has the gradients of all buckets until it is known."""
    named = [(each, torch.zeros(shape, dtype=torch.float64)) for each, shape in SHAPES.items()]
    one, without = (Aggregator(named, CONFIGS[name], bucket_mib=1e-3) for _ in range(2))
    assert len(one.buckets) > 1
    for step in range(8):
        grads = list(random_grads(1, step)[0].values())
        wanted = grads
        if step in (3, 4):
            grads[0][3, 5] = math.inf
        else:
            wanted = list(without.aggregate([g.clone() for g in grads]))
        found = one.aggregate([g.clone() for g in grads])
        if step not in (3, 4):
            assert max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) < 1e-11, step


@pytest.mark.parametrize("settings", ALL, ids=str)
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_an_error_that_is_not_finite_is_dropped(settings: dict[str, object], poison: float) -> None:
    """All ranks notice it in what is sent; the step is left out, and the next ones are healthy. A threshold is not
    looked for below zero for ever."""
    ranks = Ranks(config(**settings), 3)
    ranks.step(random_grads(3, 0))
    ranks.errors("a")[1].fill_(poison)
    assert finite(ranks.step(random_grads(3, 1))) == [False] * 3
    for step in range(2, 6):
        assert finite(ranks.step(random_grads(3, step))) == [True] * 3, step


@pytest.mark.parametrize("method", ERROR_FEEDBACK)
def test_fp16_is_healthy_again_after_gradients_at_its_edge(method: str) -> None:
    """Finite each, but not what is kept of them and the next one together: steps are left out, until the loss scale has
    fallen far enough."""
    ranks, scale, left_out = Ranks(config(method=method, error_dtype="half"), 2), 2.0**14, []
    for state in ranks.states:
        state.loss_scale = lambda: scale
    for step in range(30):
        grads = random_grads(2, step)
        half = [{name: (g.clamp(-3, 3) * scale).half() for name, g in rank.items()} for rank in grads]
        if finite(ranks.step(half)) != [True, True]:
            left_out.append(step)
            scale /= 2
    assert left_out
    assert left_out[-1] < 20


@pytest.mark.parametrize("method", ["powersgd", "acpsgd"])
def test_a_mean_too_large_for_fp16_is_known_to_be_left_out(method: str) -> None:
    """Finite on the wire, and infinite once it is written: who applies gradients leaves the step out."""
    ranks = Ranks(config(method=method), 2, {"w": (12, 12)})
    small = [{"w": torch.full((12, 12), 2.0**-10).half()} for _ in range(2)]
    for _ in range(2):
        ranks.step(small)
    for state in ranks.states:
        error = state.memory("w").error
        assert error is not None
        error.fill_(1e5)
    assert finite(ranks.step(small)) == [False, False]
    assert [state.left_out() for state in ranks.states] == [True, True]
    for state in ranks.states:
        state.tensors()  # as it is saved
    assert all(float((error - 1e5).abs().max()) < 1 for error in ranks.errors("w"))


@pytest.mark.parametrize("method", ["topk", "randomk"])
def test_what_has_waited_too_long_for_fp16_is_sent_in_parts(method: str) -> None:
    """One element in a hundred is sent in a step, so each waits until it is far beyond fp16. No step is left out, and
    what is applied and kept is all that was given."""
    ranks = Ranks(config(method=method, density=0.01), 3, {"w": (200,)})
    given, applied = 0.0, torch.zeros(200, dtype=torch.float64)
    for step in range(40):
        found = ranks.step([{"w": torch.full((200,), 2e4).half()} for _ in range(3)])
        assert finite(found) == [True] * 3, step
        given += 2e4
        applied += found[0]["w"].double()
    kept = sum(error.double() for error in ranks.errors("w")) / 3
    assert float((applied + kept - given).abs().max()) < 1e-3 * given


@pytest.mark.parametrize("method", ["powersgd", "acpsgd"])
@pytest.mark.parametrize("bad", [3, 4, 5])
def test_a_refresh_that_is_left_out_keeps_every_buckets_errors(method: str, bad: int) -> None:
    """Of the bucket that was not finite, and of the others, which have sent all that they had."""
    ranks = Ranks(config(method=method, refresh_every=4), 2)
    given, applied = (torch.zeros(40, 8, dtype=torch.float64) for _ in range(2))
    for step in range(9):
        grads = random_grads(2, step)
        given += (grads[0]["d"] + grads[1]["d"]) / 2
        if step == bad:
            grads[0]["a"][0, 0] = math.inf
        found = ranks.step(grads, cuts=2)
        assert finite(found) == [step != bad] * 2
        if step != bad:
            applied += found[0]["d"]
    for state in ranks.states:
        state.tensors()  # as it is saved
    torch.testing.assert_close(applied + sum(ranks.errors("d")) / 2, given, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["topk", "randomk"])
def test_bf16_gradients_add_up_over_many_steps(method: str) -> None:
    """A sum of hundreds of them does not fit into their own eight bits, from which half of all was lost; errors are
    kept in fp32, unless that is asked for."""
    ranks, shape = Ranks(config(method=method, density=0.005), 2, {"w": (400,)}), (400,)
    base = (0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(0))).bfloat16()
    applied, steps = torch.zeros(shape, dtype=torch.float64), 600
    for _ in range(steps):
        found = ranks.step([{"w": base.clone()} for _ in range(2)])
        applied += found[0]["w"].double()
    kept = sum(error.double() for error in ranks.errors("w")) / 2
    assert abs(float((applied + kept).sum() / (steps * base.double().sum())) - 1) < 0.005


@pytest.mark.parametrize(
    ("method", "refresh_every"), [("powersgd", 0), ("powersgd", 4), ("acpsgd", 0), ("acpsgd", 4), ("randomk", 0)]
)
def test_what_a_wire_in_bf16_rounds_off_is_kept(method: str, refresh_every: int) -> None:
    """On one rank, where nothing is rounded on the way: of all that was given nothing is missing."""
    ranks = Ranks(config(method=method, wire="bf16", refresh_every=refresh_every), 1)
    given, applied = (torch.zeros(40, 8, dtype=torch.float64) for _ in range(2))
    for step in range(10):
        (grads,) = random_grads(1, step)
        given += grads["d"]
        applied += ranks.step([grads])[0]["d"]
    ranks.states[0].tensors()  # as it is saved
    torch.testing.assert_close(applied + ranks.errors("d")[0], given, rtol=0, atol=1e-11)


def test_errors_saved_in_bf16_go_on_in_fp32() -> None:
    """As states were saved before, or with other settings."""
    made = {dtype: Ranks(config(method="topk", error_dtype=dtype), 1) for dtype in ("half", "gradient")}
    for each in made.values():
        for step in range(2):
            each.step(random_grads(1, step, dtype=torch.bfloat16))
    for before, after, dtype in (("half", "gradient", torch.float32), ("gradient", "half", torch.bfloat16)):
        (saved,), ranks = made[before].states, Ranks(config(method="topk", error_dtype=after), 1)
        ranks.states[0].load([(saved.tensors(), saved.plain())])
        ranks.step(random_grads(1, 2, dtype=torch.bfloat16))
        assert ranks.errors("a")[0].dtype == dtype
