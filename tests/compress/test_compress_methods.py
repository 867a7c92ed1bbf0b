"""Compressed means are what the papers say, nothing is lost on the way, and wires carry the bytes they should."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from simulated import CONFIGS, SHAPES, Ranks, distance, random_grads

from llmsys.compress import bits
from llmsys.compress.config import CompressConfig
from llmsys.compress.memory import generator
from llmsys.compress.methods.method import AllGather, AllReduce, AllToAll
from llmsys.compress.methods.sparse import PIECE, above, largest, strata
from llmsys.compress.orthogonal import orthonormal_
from llmsys.compress.reference import Reference
from llmsys.compress.transfer import Transfer
from llmsys.cost import compressed
from llmsys.profile.live import Live
from llmsys.schema.compress import ERROR_FEEDBACK, METHODS

LINEAR = ("powersgd", "acpsgd", "randomk")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_rank_has_what_the_reference_has(name: str, world: int) -> None:
    ranks, reference = Ranks(CONFIGS[name], world), Reference(CONFIGS[name], world)
    for step in range(9):
        grads = random_grads(world, step)
        assert distance(ranks.step(grads), reference.step(grads)) < 1e-11


@pytest.mark.parametrize("method", [name for name in METHODS if name != "sign"])
def test_how_buckets_are_cut_does_not_matter(method: str) -> None:
    config = CompressConfig(method=method, r=2, density=0.1, min_rate=1)
    one, three = Ranks(config, 2), Ranks(config, 2)
    for step in range(5):
        grads = random_grads(2, step)
        assert distance(one.step(grads), three.step(grads, cuts=3)[0]) < 1e-12


@pytest.mark.parametrize("method", ERROR_FEEDBACK)
def test_what_is_not_sent_is_kept(method: str) -> None:
    """sum of outputs + mean of errors = sum of the mean gradients, whatever the compressor."""
    ranks = Ranks(CompressConfig(method=method, r=2, density=0.05, min_rate=1), 3)
    sent, given = ({name: torch.zeros(*shape, dtype=torch.float64) for name, shape in SHAPES.items()} for _ in range(2))
    for step in range(20):
        grads = random_grads(3, step)
        found = ranks.step(grads)[0]
        for name in SHAPES:
            sent[name] += found[name]
            given[name] += sum(rank[name] for rank in grads) / 3
    for name in SHAPES:
        kept = [state.memory(name).error for state in ranks.states]
        mean = sum(error for error in kept if error is not None) / 3
        torch.testing.assert_close(sent[name] + mean, given[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["powersgd", "acpsgd"])
def test_local_and_global_error_feedback_have_one_trajectory(method: str) -> None:
    """Gradients have a part that stays: of noise alone rounding errors grow, as no direction is better than another."""
    config, shape = CompressConfig(method=method, r=4), {"w": (64, 48), "b": (48,)}
    ranks, reference = Ranks(config, 4, shape), Reference(config, 4, global_feedback=True)
    (base,) = random_grads(1, 1000, shape)
    for step in range(50):
        grads = [{name: base[name] + 0.5 * g for name, g in rank.items()} for rank in random_grads(4, step, shape)]
        assert distance(ranks.step(grads), reference.step(grads)) < 1e-10


@pytest.mark.parametrize("method", LINEAR)
def test_the_mean_of_ranks_is_the_rank_of_the_mean(method: str) -> None:
    """Linear: what comes out depends on the mean gradient alone."""
    config = CompressConfig(method=method, r=2, density=0.1, min_rate=1)
    many, one = Ranks(config, 3), Ranks(config, 1)
    for step in range(10):
        grads = random_grads(3, step)
        mean = {name: sum(rank[name] for rank in grads) / 3 for name in SHAPES}
        assert distance(many.step(grads), one.step([mean])[0]) < 1e-11


@pytest.mark.parametrize("settings", [{"method": "powersgd", "r": 99}, {"r": 99}, {"method": "topk", "density": 1.0}])
def test_at_full_width_the_mean_is_exact(settings: dict[str, object]) -> None:
    """Also where r is larger than the matrix, whose factors have as many rows as it has directions. (ACP-SGD of one
    that is not square is so in every other step only: p then has min(N, M) of N directions.)"""
    config = CompressConfig(**settings, min_rate=0)  # type: ignore[arg-type]
    shape = {"w": (12, 12), "b": (5,)} if config.method == "acpsgd" else SHAPES
    ranks = Ranks(config, 2, shape)
    for step in range(4):
        grads = random_grads(2, step, shape)
        mean = {name: (grads[0][name] + grads[1][name]) / 2 for name in shape}
        assert distance(ranks.step(grads), mean) < 1e-11


def test_a_constant_low_rank_gradient_is_exact_from_the_second_step() -> None:
    """One half step finds the columns' space, the next the rows'."""
    left, right = torch.randn(30, 2, dtype=torch.float64), torch.randn(2, 20, dtype=torch.float64)
    ranks = Ranks(CompressConfig(r=2, min_rate=1, error_feedback=False), 2, {"w": (30, 20)})
    grads = [{"w": left @ right}, {"w": 3 * left @ right}]
    errors = [distance(ranks.step(grads), {"w": 2 * left @ right}) for _ in range(3)]
    assert errors[0] > 0.1
    assert max(errors[1:]) < 1e-12


def test_one_factor_changes_a_step_and_in_turn() -> None:
    """The other one is only made orthonormal, so it spans what it did."""
    ranks = Ranks(CompressConfig(r=2, min_rate=1), 2)
    memory = ranks.states[0].memory("a")
    for step in range(6):
        before = [None if factor is None else factor.clone() for factor in (memory.p, memory.q)]
        ranks.step(random_grads(2, step))
        for factor, old, moves in zip((memory.p, memory.q), before, (step % 2 == 0, step % 2 == 1), strict=True):
            assert factor is not None
            if old is not None:
                orthonormal_(old)
                again = factor.clone()
                orthonormal_(again)
                same = torch.allclose(old.T @ old, again.T @ again)
                assert same is not moves, step


@pytest.mark.parametrize("method", METHODS)
def test_zero_gradients_stay_zero(method: str) -> None:
    """No NaN of a QR of zeros. Sign-SGD has no zero: there votes alternate, so nothing drifts."""
    ranks = Ranks(CompressConfig(method=method, r=2, density=0.1, min_rate=1), 2)
    zero = [{name: torch.zeros(*shape) for name, shape in SHAPES.items()} for _ in range(2)]
    total = sum(ranks.step(zero)[0]["a"] for _ in range(4))
    assert torch.equal(total, torch.zeros(12, 10))  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_on_the_wire(world: int) -> None:
    """What is asked for, to the byte; a model of 100,100 elements in fp32, r = 4, density 0.001."""
    shape = {"w": (500, 200), "b": (100,)}
    numel, padded = 100_100, -(-12_513 // world) * world  # bits, in as many parts as there are ranks
    expected = {
        "none": [(AllReduce, 4 * numel)],
        "fp16": [(AllReduce, 2 * numel)],
        "bf16": [(AllReduce, 2 * numel)],
        "sign": [(AllToAll, padded + world), (AllGather, padded // world + 1)],  # a byte each says if it is finite
        "efsign": [(AllGather, 12_500 + 13 + 2 * 4)],
        "topk": [(AllGather, 8 * (100 + 1))],
        "randomk": [(AllReduce, 4 * (100 + 1))],
        "powersgd": [(AllReduce, 4 * (4 * 500 + 100)), (AllReduce, 4 * 4 * 200)],
        "acpsgd": [(AllReduce, 4 * (4 * 500 + 100))],
    }
    for method, wanted in expected.items():
        ranks = Ranks(CompressConfig(method=method), world, shape)
        ranks.step(random_grads(world, 0, shape, torch.float32))
        assert [(type(each), each.buffer.nbytes) for each in ranks.asked] == wanted, method
    ranks = Ranks(CompressConfig(wire="bf16"), world, shape)
    sizes = []
    for step in range(2):
        ranks.step(random_grads(world, step, shape, torch.float32))
        sizes += [each.buffer.nbytes for each in ranks.asked]
    assert sizes == [2 * (4 * 500 + 100), 2 * (4 * 200 + 100)]


@pytest.mark.parametrize("settings", [{"method": "powersgd"}, {"r": 4}, {"method": "randomk", "skip": ["*"]}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_travels_whole_alone_travels_as_it_is(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """LoRA's adapters in half precision take as many bytes as under DDP, as is predicted; next to factors, fp32."""
    config, shape = CompressConfig(**settings), {"a": (8, 64), "b": (64, 8), "c": (64,)}
    named = [(name, size, 2) for name, size in shape.items()]
    ranks, elements = Ranks(config, 2, shape), 2 * 8 * 64 + 64
    for step in range(3):
        grads = random_grads(2, step, shape, dtype)
        found = ranks.step(grads)
        assert [each.buffer.nbytes for each in ranks.asked] == [2 * elements]
        assert sum(compressed.step_bytes(named, config, 2, step).values()) == 2 * elements
        wanted = {name: (grads[0][name].double() + grads[1][name].double()) / 2 for name in shape}
        assert distance([{n: g.double() for n, g in rank.items()} for rank in found], wanted) < 0.02
    large = {**shape, "d": (64, 64)}
    if "skip" not in settings:
        ranks = Ranks(config, 2, large)
        ranks.step(random_grads(2, 0, large, dtype))
        predicted = compressed.step_bytes([(name, size, 2) for name, size in large.items()], config, 2, 0)
        assert sum(each.buffer.nbytes for each in ranks.asked) == sum(predicted.values())
        assert ranks.asked[0].buffer.nbytes == 4 * (elements + 4 * 64)


@pytest.mark.parametrize("method", ERROR_FEEDBACK)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    """Factors, sums and errors are fp32, errors unless asked otherwise; gradients keep their type."""
    for kept in ("gradient", "half"):
        config = CompressConfig(method=method, r=2, density=0.1, min_rate=1, error_dtype=kept)
        ranks, reference = Ranks(config, 2), Reference(config, 2)
        for step in range(6):
            grads = random_grads(2, step, dtype=dtype)
            found = ranks.step(grads)
            wanted = reference.step([{name: g.double() for name, g in rank.items()} for rank in grads])
        assert found[0]["a"].dtype == dtype
        assert ranks.errors("a")[0].dtype == (dtype if kept == "half" else torch.float32)
        if method in ("powersgd", "acpsgd"):  # of the others a rounding may choose another element
            far = max(float((found[0][n].double() - wanted[n]).norm() / wanted[n].norm()) for n in SHAPES)
            assert far < (0.1 if dtype == torch.bfloat16 else 0.02)


def test_a_change_of_the_loss_scale_rescales_what_is_kept() -> None:
    """With gradients twice as large, what comes out is twice as large, and nothing else changes."""
    plain, scaled = Ranks(CompressConfig(r=2, min_rate=1), 2), Ranks(CompressConfig(r=2, min_rate=1), 2)
    factors = [1.0, 1.0, 2.0, 2.0, 0.5]
    for step, factor in enumerate(factors):
        for state in scaled.states:
            state.loss_scale = lambda factor=factor: factor  # type: ignore[misc]
        grads = random_grads(2, step)
        found = scaled.step([{name: g * factor for name, g in rank.items()} for rank in grads])
        wanted = plain.step(grads)[0]
        assert distance(found, {name: g * factor for name, g in wanted.items()}) < 1e-11


def test_bits_go_there_and_back() -> None:
    for numel in (1, 7, 8, 9, 1003, 8 * bits.AT_ONCE + 5):  # the last in two pieces
        x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
        packed, signs = bits.pack(x), x > 0
        assert packed.nbytes == math.ceil(numel / 8)
        assert torch.equal(bits.unpack(packed, numel), signs)
        target = torch.zeros(numel)
        bits.add_signs(target, packed, 0.5)
        assert torch.equal(target, torch.where(signs, 0.5, -0.5))


def test_the_majority_wins_and_ties_have_a_rule() -> None:
    """Of two ranks, that of rank `step mod 2`; so over the steps no direction is preferred."""
    ranks = Ranks(CompressConfig(method="sign"), 2, {"w": (4, 4)})
    apart = [{"w": torch.ones(4, 4)}, {"w": -torch.ones(4, 4)}]
    assert [float(ranks.step(apart)[0]["w"].mean()) for _ in range(4)] == [1.0, -1.0, 1.0, -1.0]
    three = Ranks(CompressConfig(method="sign"), 3, {"w": (4, 4)})
    assert torch.equal(three.step([*apart, apart[1]])[2]["w"], -torch.ones(4, 4))


def test_strata_are_different_places_and_all_as_likely() -> None:
    counts = torch.zeros(50)
    for step in range(4000):
        places = strata(50, 7, "w", 0, step)
        assert len(set(places.tolist())) == 7
        counts[places] += 1
    assert (counts / 4000 - 7 / 50).abs().max() < 5 * math.sqrt(0.14 * 0.86 / 4000)


@pytest.mark.parametrize("case", ["normal", "few are large", "zeros", "equal"])
@pytest.mark.parametrize("k", [1, 1000, 100_000])
def test_a_threshold_finds_the_largest_too(case: str, k: int) -> None:
    """Also of more elements than are looked at together, and where a sample misleads."""
    x = torch.randn(PIECE + 400_000, generator=torch.Generator().manual_seed(0))
    if case == "few are large":
        x[10_000:] *= 1e-6
    elif case == "zeros":
        x[20:] = 0
    elif case == "equal":
        x = x.sign()
    wanted = x.abs().sort(descending=True).values[:k]
    for places in (largest(x, k), above(x, k, generator("x", 0))):
        assert len(set(places.tolist())) == k
        assert torch.equal(x[places].abs().sort(descending=True).values, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_memory_over_plain_ddp_is_one_copy_of_the_gradients(method: str) -> None:
    """At most 1.1, of a bucket of 48 MiB and one rank; without error feedback hardly anything but what is sent. The
    signs of a rank are 0.03 of a copy: what was sent, and what was gathered. `test_compress_memory` has four ranks."""
    shape = {"a": (2048, 2048), "b": (4096, 1024), "c": (1024,), "d": (1024, 4096)}
    (grads,) = random_grads(1, 0, shape, torch.float32)
    ranks, size = Ranks(CompressConfig(method=method), 1, shape), 48 * 2**20
    live = Live()
    part = ranks.part(ranks.states[0], grads, list(grads))
    with live:
        for _ in range(2):
            transfer = Transfer(ranks.states[0].method.exchange(part), None, world=1)
            while transfer.advance():
                pass
    kept = {"none": 1e-6, "fp16": 0.51, "bf16": 0.51, "sign": 0.25, "efsign": 1.12}.get(method, 1.1)
    assert live.peak <= kept * size


def test_draws_depend_on_name_seed_and_step_alone() -> None:
    torch.manual_seed(1)
    first = torch.randn(5, generator=generator("w", 0, 3))
    torch.manual_seed(2)
    assert torch.equal(first, torch.randn(5, generator=generator("w", 0, 3)))
    for other in (generator("v", 0, 3), generator("w", 1, 3), generator("w", 0, 4)):
        assert not torch.equal(first, torch.randn(5, generator=other))


@pytest.mark.parametrize(
    ("shape", "settings", "worth"),
    [
        ((100, 100), {"r": 4}, True),
        ((100,), {"r": 4}, False),
        ((17, 100), {"r": 4}, True),
        ((16, 100), {"r": 4}, False),
        ((4096, 8), {"r": 4}, False),  # an adapter of LoRA
        ((8, 8), {"r": 99, "min_rate": 0}, True),
        ((100, 100), {"r": 4, "min_rate": 25.0}, False),
        ((100, 100), {"r": 4, "ranks": {9: 25}}, False),
        ((100, 100), {"r": 4, "skip": ["emb*"]}, False),
        ((64, 3, 7, 7), {"r": 4}, True),
    ],
)
def test_what_is_worth_compressing(shape: tuple[int, ...], settings: dict[str, object], worth: bool) -> None:
    assert compressed.low_rank("embed.weight", shape, CompressConfig(**settings)) is worth  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "dgc"}, "dgc: must be one of none, fp16"),
        ({"r": 0}, "r=0: must be at least 1"),
        ({"method": "topk", "density": 0.0}, "density=0.0: must be above 0 and at most 1"),
        ({"method": "topk", "density": 1.5}, "density=1.5"),
        ({"method": "sign", "skip": ["a"]}, "not with sign"),
        ({"method": "sign", "error_feedback": True}, "error_feedback=True: not with sign"),
        ({"check_every": -1}, "check_every=-1: a number of steps"),
        ({"method": "topk", "refresh_every": 3}, "refresh_every=3: is for"),
        ({"method": "powersgd", "reuse": False}, "reuse=False: is for"),
        ({"ranks": {-1: 4}}, "ranks="),
        ({"skip": "embed"}, "a list of names"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CompressConfig(**settings)  # type: ignore[arg-type]
