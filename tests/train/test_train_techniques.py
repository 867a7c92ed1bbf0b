"""What the cells of the bench's grids need: a frozen 4-bit base under every engine, AdamW and linears in 8 bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import train_harness as harness
from torch import nn

from llmsys import compose, cost, schema
from llmsys.bench.techniques import Techniques
from llmsys.comm.place import Place
from llmsys.models import float8
from rank_pool import ENGINES, Pool
from rank_runs import TINY, weights

HERE = "test_train_techniques"
BOTH = ["train.steps=2", "train.save_final=false", "data.num_examples=12"]


def of(pool: Pool, results: Path, *overrides: str, stop_after: int | None = None) -> dict[str, Any]:
    """What rank 0 has to say of a run in `pool`."""
    found: dict[str, Any] = pool.call("rank_runs:run", str(results), list(overrides), stop_after)[0]
    return found


def estimated(overrides: list[str]) -> dict[str, int]:
    """Bytes by kind of one of two ranks of the tiny run."""
    typed = schema.build(compose.compose([*TINY, "train.world=2", *overrides]))
    return cost.estimate(typed.model, typed.train, typed.method, typed.engine)


# Q: a quantised base without an adapter


def test_over_a_quantised_base_everything_but_its_layers_is_trained(tmp_path: Path) -> None:
    """The record says that no linear weight is, and how many parameters are; nothing else of a block has changed."""
    config = harness.config("full", model__quant="nf4", train__steps=20, train__schedule="constant")
    result = harness.run(tmp_path, config)
    losses = [row["loss"] for row in harness.curve(tmp_path) if "loss" in row]
    assert losses[0] - losses[-1] > 0.3
    summary, model = result["summary"], config.model
    assert isinstance(model, schema.Transformer)
    ends = 2 * model.vocab_size * model.hidden_size
    norms = (2 * model.num_layers + 1) * model.hidden_size
    assert summary["trainable_params"] == ends + norms
    assert summary["linear_weights_trained"] == 0
    assert summary["total_params"] == cost.num_params(model)
    left = weights({"out": str(tmp_path)})
    assert sum(tensor.numel() for tensor in left.values()) == ends + norms
    assert not any("proj" in name for name in left)


def test_it_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop_after_5(progress: dict[str, float]) -> None:
        if progress.get("step") == 5:
            raise Stop

    config = harness.config("full", model__quant="nf4", train__steps=8, train__checkpoint_every=2)
    harness.run(tmp_path / "whole", config)
    with pytest.raises(Stop):
        harness.run(tmp_path / "cut", config, listener=stop_after_5)
    harness.run(tmp_path / "cut", config)
    assert harness.curve(tmp_path / "cut") == harness.curve(tmp_path / "whole")


@pytest.fixture(scope="module")
def quantised(alone: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return of(alone, tmp_path_factory.mktemp("quantised"), "model.quant=nf4")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero3", "ddp", "zero1", "zero2", "fsdp2", "zero2-offload", "zero3-offload"])
def test_a_quantised_base_is_cut_and_gathered_whole(
    pool: Pool, quantised: dict[str, Any], engine: str, tmp_path: Path
) -> None:
    """Packed weights travel as they are: two ranks compute what one does. ZeRO-3 and FSDP2 hold half of each."""
    found = of(pool, tmp_path, *ENGINES[engine], "model.quant=nf4")
    assert found["status"] == "ok", found["error"]
    assert found["losses"] == pytest.approx(quantised["losses"], rel=1e-5)
    assert found["val_loss"] == pytest.approx(quantised["val_loss"], rel=1e-5)
    whole, half = quantised["summary"]["weights_bytes"], engine in ("zero3", "zero3-offload", "fsdp2")
    parts = estimated([*ENGINES[engine], "model.quant=nf4"])
    for kind in ("weights", "gradients", "optimizer"):
        assert found["summary"][f"{kind}_bytes"] == parts[kind]
    assert (parts["weights"] < 0.52 * whole) == half  # the scales are whole on each rank


def test_what_cannot_hold_a_quantised_base_says_so() -> None:
    for changes, words in (
        ({"engine": schema.FSDP2(kind="fsdp2"), "model__quant": "int8"}, "model.quant=int8: its kernel reads whole"),
        ({"engine": schema.Engine(kind="tp"), "model__quant": "nf4"}, "model.quant=nf4: engine=tp"),
    ):
        with pytest.raises(ValueError, match=words):
            harness.config("full", **changes)


# O8: AdamW with moments of 8 bits


def gradients(parameters: list[nn.Parameter], step: int) -> None:
    """Of sizes that differ by 10**4, some of them always 0."""
    torch.manual_seed(step)
    for number, p in enumerate(parameters):
        p.grad = torch.randn_like(p) * 10.0 ** (-number) * (torch.rand_like(p) > 0.3)


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    shapes = [(100, 64), (64,), (3, 4099), (4096,), (5000,)]
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def test_8_bit_adamw_is_bitsandbytes_own(tmp_path: Path) -> None:
    import bitsandbytes

    from llmsys.train.adamw_8bit import AdamW8bit

    mine, theirs = parameters(), parameters()
    ours, own = AdamW8bit(mine, lr=1e-2), bitsandbytes.optim.AdamW8bit(theirs, lr=1e-2)
    for step in range(5):
        for members, optimizer in ((mine, ours), (theirs, own)):
            gradients(members, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_its_state_is_read_as_adamws_and_goes_on_with_the_same_bits() -> None:
    """Through fp32 moments and back, as a checkpoint has them, at every step: as if nothing had happened."""
    from llmsys.train.adamw_8bit import AdamW8bit

    plain, packed = parameters(), parameters()
    one, two = AdamW8bit(plain, lr=1e-2), AdamW8bit(packed, lr=1e-2)
    for step in range(6):
        for members, optimizer in ((plain, one), (packed, two)):
            gradients(members, step)
            optimizer.step()
        for p, q in zip(plain, packed, strict=True):
            before = one.unpacked(p)
            assert all(torch.equal(value, two.unpacked(q)[key]) for key, value in before.items())
            two.state[q] = copy.deepcopy(two.unpacked(q))
            two.pack(q)
            assert two.piece(q, "exp_avg", 17, 40).equal(before["exp_avg"].flatten()[17:57])
    assert all(torch.equal(a, b) for a, b in zip(plain, packed, strict=True))


def test_moments_of_another_optimizer_are_rounded_by_less_than_a_hundredth_of_their_run() -> None:
    from llmsys.train.adamw_8bit import RUN, AdamW8bit

    (p,) = members = [nn.Parameter(torch.zeros(5000))]
    optimizer = AdamW8bit(members, lr=1e-2)
    torch.manual_seed(0)
    moments = {"exp_avg": torch.randn(5000), "exp_avg_sq": torch.rand(5000), "step": torch.tensor(3.0)}
    optimizer.state[p] = dict(moments)
    optimizer.pack(p)
    for key in ("exp_avg", "exp_avg_sq"):
        error = (optimizer.unpacked(p)[key] - moments[key]).abs()
        for begin in range(0, 5000, RUN):
            largest = moments[key][begin : begin + RUN].abs().max()
            assert error[begin : begin + RUN].max() < 0.01 * largest


def test_it_trains_as_adamw_does_with_a_quarter_of_its_state(tmp_path: Path) -> None:
    losses, state = {}, {}
    for kind in ("adamw", "adamw_8bit"):
        config = harness.config("full", train__steps=20, train__schedule="constant", train__optimizer=kind)
        result = harness.run(tmp_path / kind, config)
        losses[kind] = [row["loss"] for row in harness.curve(tmp_path / kind) if "loss" in row]
        state[kind] = result["summary"]["optimizer_bytes"]
        parts = cost.estimate(config.model, config.train, config.method, config.engine)
        assert state[kind] == parts["optimizer"]
    assert losses["adamw_8bit"] == pytest.approx(losses["adamw"], rel=0.01)
    assert losses["adamw_8bit"] != losses["adamw"]
    assert state["adamw_8bit"] < 0.3 * state["adamw"]


@pytest.mark.parametrize(
    "engine", ["zero2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero3", "fsdp2", "tp"))]
)
def test_8_bit_moments_are_cut_saved_and_read_back_exactly(pool: Pool, engine: str, tmp_path: Path) -> None:
    """A stopped run goes on with the same bits, and the estimate is what a rank holds."""
    overrides = [*ENGINES[engine], "train.optimizer=adamw_8bit"]
    whole = of(pool, tmp_path / "whole", *overrides)
    assert whole["status"] == "ok", whole["error"]
    first = of(pool, tmp_path / "cut", *overrides, stop_after=3)
    assert first["status"] == "interrupted", first["error"]
    again = of(pool, tmp_path / "cut", *overrides)
    assert again["status"] == "ok", again["error"]
    assert again["resumed"] in (3, 4)
    assert again["losses"] == whole["losses"]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[name]), name
    assert whole["summary"]["optimizer_bytes"] == estimated(overrides)["optimizer"]


def test_a_checkpoint_of_one_optimizer_is_read_by_the_other(alone: Pool, pool: Pool, tmp_path: Path) -> None:
    """Moments are stored as they are worth: 8 bits of ZeRO-2's slices become fp32 ones of whole tensors."""
    first = of(pool, tmp_path / "two", *ENGINES["zero2"], "train.optimizer=adamw_8bit", stop_after=2)
    assert first["status"] == "interrupted", first["error"]
    plain = of(alone, tmp_path / "one")
    back = of(alone, tmp_path / "back", f"train.resume={first['out']}")
    assert back["status"] == "ok", back["error"]
    assert back["losses"] == pytest.approx(plain["losses"][-len(back["losses"]) :], rel=5e-3)


# Q8: linear layers in 8-bit floats


def test_its_products_are_those_of_rounded_operands() -> None:
    """y, dx and dW by torch's own fp8 product against fp32 products of the rounded operands; any number of rows."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    layer.__class__ = float8.Float8Linear
    x, dy = torch.randn(3, 7, 64, requires_grad=True), torch.randn(3, 7, 48)
    y = layer(x)
    y.backward(dy)

    def seen(tensor: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
        eight, scale = float8.rounded(tensor.detach(), kind)
        return eight.float() * scale

    forward, backward = float8.FORWARD, float8.BACKWARD
    a, w, g = seen(x, forward).view(-1, 64), seen(layer.weight, forward), seen(dy, backward).view(-1, 48)
    assert torch.allclose(y.view(-1, 48), a @ w.t() + layer.bias, rtol=1e-4, atol=1e-4)
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert torch.allclose(x.grad.view(-1, 64), g @ w, rtol=1e-4, atol=1e-4)
    assert torch.allclose(layer.weight.grad, g.t() @ a, rtol=1e-4, atol=1e-4)
    exact = nn.functional.linear(x, layer.weight, layer.bias)
    assert 0 < (y - exact).norm() / exact.norm() < 0.05


@pytest.mark.gpu
def test_a_gpu_s_products_are_the_cpu_s() -> None:
    """The kernel of Ada and Hopper GPUs, on rows that are no multiple of 16 too."""
    if torch.cuda.get_device_capability() < float8.LEAST:
        pytest.skip("this GPU has no 8-bit floats")
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        layer = nn.Linear(64, 48).bfloat16()
        x, dy = torch.randn(3, 7, 64).bfloat16(), torch.randn(3, 7, 48).bfloat16()
        layer.__class__ = float8.Float8Linear
        layer, x = layer.to(device), x.to(device).requires_grad_(True)
        y = layer(x)
        y.backward(dy.to(device))
        assert x.grad is not None
        found.append([tensor.float().cpu() for tensor in (y, x.grad, layer.weight.grad)])
    for there, here in zip(*found, strict=True):
        assert torch.allclose(there, here, rtol=2e-2, atol=2e-2)


def test_the_largest_number_of_a_tensor_is_exact_and_what_is_not_finite_stays_so() -> None:
    x = torch.tensor([0.1, -3.0, 1e-9])
    eight, scale = float8.rounded(x, float8.FORWARD)
    assert eight.float()[1] * scale == -3.0
    for bad in (float("nan"), float("inf")):
        eight, scale = float8.rounded(torch.tensor([1.0, bad]), float8.FORWARD)
        assert not (eight.float() * scale).isfinite().all()
    assert float8.rounded(torch.zeros(4), float8.FORWARD)[0].float().eq(0).all()


def test_without_such_a_gpu_it_is_unsupported_before_anything_loads(alone: Pool, tmp_path: Path) -> None:
    found = of(alone, tmp_path, "techniques=F+Q8")
    assert found["status"] == "unsupported"
    assert "train.fp8=true (techniques: Q8): needs a GPU of compute capability 8.9" in found["error"]
    assert "on a CPU" in found["error"]
    assert found["summary"] == {}


def eight(place: Place, results: str, overrides: list[str]) -> dict[str, Any]:
    """A run whose linear layers are in 8-bit floats, on a CPU, whose kernel for them is slow but there."""
    import rank_runs
    from llmsys.train import checks

    allowed, checks.formats = checks.formats, lambda config, device: None
    try:
        return rank_runs.run(place, results, ["train.fp8=true", *overrides])
    finally:
        checks.formats = allowed


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero3", "ddp", "fsdp2"])
def test_8_bit_layers_train_and_every_engine_cuts_their_weights(
    alone: Pool, pool: Pool, engine: str, tmp_path: Path
) -> None:
    """About as plain layers do, since the weights themselves are not rounded; what is saved is what is predicted."""
    plain = of(alone, tmp_path / "plain")
    one = alone.call(f"{HERE}:eight", str(tmp_path / "one"), [])[0]
    two = pool.call(f"{HERE}:eight", str(tmp_path / "two"), [*ENGINES[engine]])[0]
    for found in (one, two):
        assert found["status"] == "ok", found["error"]
        assert found["losses"] == pytest.approx(plain["losses"], rel=0.02)
        assert found["losses"] != plain["losses"]
        assert found["summary"]["linear_weights_trained"] == 1
    assert one["summary"]["saved_bytes"] == plain["summary"]["saved_bytes"]


# the grids of `bench_pretrain_grid` and `bench_finetune_grid`

PRETRAIN = Techniques.combinations(["F", "R", "Z2", "Z3", "O", "Q"])
FINETUNE = [each for each in Techniques.combinations(["F", "R", "Z2", "Z3", "L", "QL", "LFA", "QLFA"]) if each.adapter]


@pytest.mark.slow
def test_every_cell_of_the_paper_s_grids_trains(tmp_path: Path) -> None:
    """Two ranks, two steps; the first loss is that of one rank without Z and R: they change where things are computed,
    not what. None of these cells is refused."""
    assert (len(PRETRAIN), len(FINETUNE)) == (40, 48)
    zero_3, others = Pool(), Pool()
    wrong: dict[str, str] = {}
    losses: dict[tuple[bool, str], list[float]] = {}
    try:
        for each in [*PRETRAIN, *FINETUNE]:
            pool = zero_3 if each.zero == 3 else others
            engine = [] if each.zero else ["engine=ddp"]
            found = of(pool, tmp_path / str(each), f"techniques={each}", *engine, *BOTH)
            if found["status"] != "ok":
                wrong[str(each)] = f"{found['status']}: {found['error']}"
                continue
            expected = losses.setdefault((each.quantised, each.adapter), found["losses"])
            if found["losses"] != pytest.approx(expected, rel=1e-4):
                wrong[str(each)] = f"losses {found['losses']}, elsewhere {expected}"
            if found["summary"]["linear_weights_trained"] != (not each.quantised and not each.adapter):
                wrong[str(each)] = "linear_weights_trained"
    finally:
        zero_3.close()
        others.close()
    assert not wrong


def test_the_estimate_of_a_cell_takes_frozen_layers_and_8_bit_products_for_what_they_are() -> None:
    """A frozen layer has no dW, and all else is computed."""
    parts = (schema.Train(steps=1, global_batch=2, micro_batch=2, length=64), schema.Method(), schema.Engine())
    plain = schema.Transformer(num_layers=3)
    frozen = schema.Transformer(num_layers=3, quant="nf4")
    d, f, tokens = plain.hidden_size, plain.intermediate_size, 128
    layers = 3 * 2.0 * tokens * (4 * d * d + 3 * d * f)
    assert cost.step_flops(plain, *parts) - cost.step_flops(frozen, *parts) == layers
