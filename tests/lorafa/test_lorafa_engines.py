"""Claims about our own adapters on two real gloo ranks: whatever shares the work, and whatever a block computes again,
the numbers are those of one rank; A is what was drawn, before and after; and an engine adds nothing to what is saved.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rank_runs as base
from llmsys import compose, models, schema
from llmsys.comm.group import group
from llmsys.comm.place import Place
from llmsys.context import Context
from llmsys.lorafa import basis, load_adapter, store
from llmsys.lorafa.targets import adapted, shape
from llmsys.models import weights
from rank_pool import ENGINES, Pool, briefly

HERE = "test_lorafa_engines"
LAYERS = 4
MIXED = "train.recompute='none:1,mlp:1,attn+mlp:1,block:1'"
"""Every policy beside every other in one model."""
TINY = [f"model.num_layers={LAYERS}", "train.lr_by_method.lorafa=1e-2", "train.save_final=false"]
TINY += ["train.lr_by_method.lora=1e-2", "method.r=4", "train.length=16", "train.generate_max=2"]
HEAD = 2 * 16 * 64
"""Elements of the head's input: micro-batch x length x width."""
SHARED = [name for name in ENGINES if name != "tp"]
QUICK = ("zero3", "fsdp2")
IDS = torch.arange(16)[None] * 7
BF16 = ["model.dtype=bf16", "train.precision=bf16"]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Two ranks."""
    made = Pool()
    yield made
    made.close()


def run(place: Place, results: str, overrides: list[str], stop_after: int | None = None) -> dict[str, Any]:
    """`rank_runs.run`, and of the model that it leaves: each A's hash, and that of what the seed draws; and some logits
    of one that was saved, computed as the engine has cut it."""
    torch.nn.functional.linear = torch._C._nn.linear  # an earlier ZeRO-3 run has left its own in this process
    contexts: list[Context] = []
    found = base.run(place, results, [*TINY, *overrides], stop_after, contexts)
    model = contexts[0].engine.model if hasattr(contexts[0].engine, "model") else torch.nn.Module()
    found["drawn"], found["a"] = {}, {}
    for path, layer in adapted(model):
        a, config = layer.adapter.a, layer.adapter.config
        assert config.train_a or (a.grad is None and not a.requires_grad)
        found["a"][path] = basis.fingerprint(a) if not config.train_a else ""
        if config.init == "orthonormal" and not config.train_a:
            drawn = basis.draw(config.init, config.r, shape(layer)[1], config.seed, path)
            found["drawn"][path] = basis.fingerprint(drawn)
    found["logits"] = None
    if (Path(found["out"]) / "weights").exists():
        with torch.no_grad():
            found["logits"] = model.eval()(input_ids=IDS).logits[0].tolist()
    return found


def shared(pool: Pool, results: Path, *overrides: str, stop_after: int | None = None) -> dict[str, Any]:
    """What rank 0 says of a run in `pool`; that both ranks have the same A, and a seeded one still, is asserted."""
    ranks = pool.call(f"{HERE}:run", str(results), list(overrides), stop_after)
    for found in ranks:
        assert found["status"] in ("ok", "interrupted"), found["error"]
        assert found["a"] == ranks[0]["a"]
        assert found["a"] == found["drawn"] or not found["drawn"]
    first: dict[str, Any] = ranks[0]
    return first


def alone(results: Path, *overrides: str, stop_after: int | None = None) -> dict[str, Any]:
    """The same run on one rank, in this process."""
    found = run(Place(), str(results), ["dispatch.kind=inline", *overrides], stop_after)
    assert found["status"] in ("ok", "interrupted"), found["error"]
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank, nothing computed again."""
    found = alone(tmp_path_factory.mktemp("reference"), "method=lorafa")
    assert found["losses"][-1] < found["losses"][0]
    assert len(found["a"]) == 7 * LAYERS
    return found


@pytest.fixture(scope="module")
def finished(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Engine -> the run of `reference` on two ranks, with every policy in the model; saved."""

    @functools.cache
    def of(engine: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(engine)
        return shared(pool, folder, "method=lorafa", MIXED, *ENGINES[engine], "train.save_final=true")

    return of


@pytest.fixture(scope="module")
def mixed(reference: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank, every policy: the losses are equal, bit for bit."""
    found = alone(tmp_path_factory.mktemp("mixed"), "method=lorafa", MIXED, "train.save_final=true")
    assert found["losses"] == reference["losses"]
    return found


@pytest.mark.parametrize("engine", briefly(SHARED, "fsdp2"))
def test_two_ranks_compute_what_one_computes(
    finished: Callable[[str], dict[str, Any]], reference: dict[str, Any], mixed: dict[str, Any], engine: str
) -> None:
    """Losses to 1e-5 (1e-4 with offload) of one rank that computes nothing again, with every policy in the model.

    And the bytes that are saved: DeepSpeed replaces `torch.nn.functional.linear` by one that keeps the input of a
    frozen layer too, for which peft's LoRA-FA saves nothing under ZeRO-3. Here it is at work in the head alone.
    """
    found = finished(engine)
    tolerance = 1e-4 if "offload" in engine else 1e-5
    assert found["losses"] == pytest.approx(reference["losses"], rel=tolerance)
    assert found["norms"] == pytest.approx(reference["norms"], rel=10 * tolerance)
    assert found["val_loss"] == pytest.approx(reference["val_loss"], rel=tolerance)
    assert found["a"] == reference["a"]
    for key in ("trainable_params", "total_params"):
        assert found["summary"][key] == reference["summary"][key]
    assert found["summary"]["saved_bytes"] == mixed["summary"]["saved_bytes"] + (4 * HEAD if "zero3" in engine else 0)


@pytest.mark.parametrize("engine", ["local", *briefly(SHARED, *QUICK)])
def test_what_a_run_leaves_is_its_model(
    finished: Callable[[str], dict[str, Any]], mixed: dict[str, Any], engine: str
) -> None:
    """`load_adapter` on the base model, in a process without ranks, gives the logits that the engine's own model has at
    the end. A is not in the file, and a run cannot begin from adapters as from a whole model."""
    found = mixed if engine == "local" else finished(engine)
    folder = Path(found["out"]) / "weights"
    torch.nn.functional.linear = torch._C._nn.linear
    cfg = schema.build(compose.compose(["method=lorafa", *base.TINY, *TINY])).model
    model = models.load(cfg, objective="causal_lm", num_labels=0, device=torch.device("cpu"), seed=0, folder=None)
    with torch.no_grad():
        assert not torch.allclose(model.eval()(input_ids=IDS).logits[0], torch.tensor(found["logits"]), atol=1e-3)
        logits = load_adapter(model, folder).eval()(input_ids=IDS).logits[0]
    torch.testing.assert_close(logits, torch.tensor(found["logits"]), rtol=1e-5, atol=1e-5)
    assert {path: basis.fingerprint(layer.adapter.a) for path, layer in adapted(model)} == found["a"]
    assert not any(name.endswith(".A") for name in store.read(folder / store.FILE)[1])
    again = dataclasses.replace(cfg, weights="run:tuned")
    with pytest.raises(ValueError, match=r"^model.weights=run:tuned: that run left adapters, not a whole model; .*$"):
        weights.find(again, "results", lambda name: Path(found["out"]))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "lorafa"])
@pytest.mark.parametrize("policy", ["none", "mlp", "attn+mlp", "block"])
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_no_engine_adds_to_what_a_block_saves(
    pool: Pool, precision: str, policy: str, method: str, tmp_path: Path
) -> None:
    """As above, one policy at a time."""
    overrides = [f"method={method}", f"train.recompute={policy}", "train.steps=2"]
    overrides += {"fp32": [], "autocast": BF16[1:], "bf16": BF16}[precision]
    one = alone(tmp_path / "1", *overrides)["summary"]["saved_bytes"]
    width = 2 if precision == "bf16" else 4
    for engine in ("zero3", "fsdp2"):
        two = shared(pool, tmp_path / engine, *overrides, *ENGINES[engine])
        if precision == "autocast" and engine == "zero3":  # of the head's weight no bf16 copy is kept: gathered again
            one -= 320 * 64 * 2
        assert two["summary"]["saved_bytes"] == one + (HEAD * width if engine == "zero3" else 0), engine


def cut(place: Place, overrides: list[str]) -> dict[str, Any]:
    """A step of two micro-batches under ZeRO-3, which here forgets gathered weights as soon as it may. How many of each
    block are gathered when a block begins, forward or computed again, and how many of all after both passes."""
    from llmsys import wiring
    from llmsys.models import blocks, load
    from llmsys.schema import recompute
    from llmsys.train import optimizer
    from llmsys.train.engines import zero

    class Forgetful(zero.DeepSpeed):
        """As with a large model, of which nothing is kept because it will be used again soon."""

        def _settings(self, trained: int) -> dict[str, Any]:
            found = super()._settings(trained)
            found["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
            return found

    wanted = [*base.TINY, *TINY, *ENGINES["zero3"], f"train.world={place.world}", *overrides]
    config = schema.build(compose.compose(wanted))
    device = torch.device("cpu")
    with group(place, device):
        model = load(config.model, objective="causal_lm", num_labels=0, device=device, seed=0, folder=None)
        method = wiring.method(config.method)
        method.prepare(model, [])
        method.recompute(model, recompute.policies(config.train.recompute, LAYERS))
        engine = Forgetful(config, place, device)
        wrapped = engine.wrap(model, lambda whole: optimizer.adamw(whole, config.train, 1e-2))

        def gathered(module: torch.nn.Module) -> int:
            return sum(p.ds_status.name == "AVAILABLE" for p in module.parameters())  # type: ignore[attr-defined]

        there: list[list[int]] = []
        whole = [block for _, block in blocks(model)]
        for block in whole:
            block.register_forward_pre_hook(lambda *_: there.append([gathered(b) for b in whole]))
        ids = torch.arange(32).reshape(2, 16) + engine.data_rank
        left = []
        before = [engine.full(p).clone() for p in engine.trained]
        for last in (False, True):
            with engine.accumulate(last):
                loss = wrapped(input_ids=ids, labels=ids).loss
                left.append(gathered(model))
                engine.backward(loss)
                left.append(gathered(model))
        engine.step(loss.reshape(1), 1.0)
        moved = [bool((engine.full(p) != b).any()) for p, b in zip(engine.trained, before, strict=True)]
        return {"there": there, "left": left, "moved": moved, "weights": sum(1 for _ in whole[0].parameters())}


@pytest.mark.parametrize("recompute", [MIXED, "train.recompute=block"])
def test_zero3_gathers_a_block_at_a_time_and_every_b_gets_its_gradient(pool: Pool, recompute: str) -> None:
    """A fused block reads the weights of layers that it never calls. The first block's too, whose input needs no
    gradient: what DeepSpeed does when a gradient of the input arrives does not happen there."""
    for found in pool.call(f"{HERE}:cut", ["method=lorafa", recompute]):
        passes = found["there"]
        assert len(passes) >= 2 * LAYERS
        for now in passes:
            assert sorted(now)[:-1] == [0] * (LAYERS - 1), "weights of another block are still there"
            assert max(now) == found["weights"]
        assert found["left"] == [0] * 4
        assert all(found["moved"])
        assert len(found["moved"]) == 7 * LAYERS


@pytest.mark.parametrize(
    ("quant", "method"),
    [
        ("nf4", "lorafa"),
        ("int8", "lora"),
        pytest.param("nf4", "lora", marks=pytest.mark.slow),
        pytest.param("int8", "lorafa", marks=pytest.mark.slow),
    ],
)
def test_over_a_quantised_base_two_ranks_compute_what_one_computes(
    pool: Pool, quant: str, method: str, tmp_path: Path
) -> None:
    """Under DDP, which must leave the few bits alone: they are no numbers that could be averaged."""
    overrides = [f"method={method}", f"model.quant={quant}"]
    one = alone(tmp_path / "1", *overrides)
    two = shared(pool, tmp_path / "2", *overrides, MIXED, *ENGINES["ddp"])
    assert one["losses"][-1] < one["losses"][0]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-4)
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5)
    assert two["a"] == one["a"]


@pytest.mark.parametrize("engine", briefly(SHARED, "fsdp2"))
def test_a_stopped_run_goes_on_with_the_same_bits(pool: Pool, engine: str, tmp_path: Path) -> None:
    """With dropout, whose masks are drawn again from seeds that come of the run's random stream."""
    overrides = ["method=lorafa", MIXED, "method.dropout=0.1", *ENGINES[engine]]
    whole = shared(pool, tmp_path / "whole", *overrides)
    first = shared(pool, tmp_path / "cut", *overrides, stop_after=3)
    assert first["status"] == "interrupted"
    again = shared(pool, tmp_path / "cut", *overrides)
    assert again["resumed"] in (3, 4)
    assert again["losses"] == whole["losses"]
    assert again["val_loss"] == whole["val_loss"]
    assert again["a"] == whole["a"]


@pytest.mark.parametrize("engine", briefly(SHARED))
@pytest.mark.parametrize("method", ["lora", "lorafa"])
def test_another_engine_and_another_number_of_ranks_go_on(
    pool: Pool, reference: dict[str, Any], engine: str, method: str, tmp_path: Path
) -> None:
    """Checkpoints are whole tensors by name: two ranks, then one, then two under another engine."""
    expected = reference if method == "lorafa" else alone(tmp_path / "0", f"method={method}")
    overrides = [f"method={method}", MIXED]
    two = shared(pool, tmp_path / "2", *overrides, *ENGINES[engine], stop_after=1)
    one = alone(tmp_path / "1", *overrides, f"train.resume={two['out']}", stop_after=3)
    other = "ddp" if engine == "fsdp2" else "fsdp2"
    back = shared(pool, tmp_path / "3", *overrides, *ENGINES[other], f"train.resume={one['out']}")
    assert back["status"] == "ok"
    tolerance = 1e-4 if "offload" in engine else 1e-5
    assert back["losses"] == pytest.approx(expected["losses"][-len(back["losses"]) :], rel=tolerance)
    assert back["val_loss"] == pytest.approx(expected["val_loss"], rel=tolerance)


@pytest.mark.parametrize("engine", briefly(SHARED))
@pytest.mark.parametrize("method", ["lora", "lorafa"])
def test_autocast_is_the_same_on_every_engine(pool: Pool, engine: str, method: str, tmp_path: Path) -> None:
    """fp32 weights, bf16 products: the order of sums differs by the rounding of bf16 only."""
    overrides = [f"method={method}", "train.precision=bf16"]
    one, two = alone(tmp_path / "1", *overrides), shared(pool, tmp_path / "2", *overrides, MIXED, *ENGINES[engine])
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-3)


@pytest.mark.parametrize("engine", briefly(SHARED))
@pytest.mark.parametrize("method", ["lora", "lorafa"])
def test_bf16_trains_alike_and_goes_on(pool: Pool, engine: str, method: str, tmp_path: Path) -> None:
    """fp32 adapters beside bf16 weights, of which ZeRO makes bf16 ones with fp32 copies: the entries of A are exact in
    bf16, so that it is the same A (`shared` compares with the draw), and resuming gives the same bits."""
    overrides = [f"method={method}", MIXED, *BF16]
    one, two = alone(tmp_path / "1", *overrides), shared(pool, tmp_path / "2", *overrides, *ENGINES[engine])
    assert two["losses"] == pytest.approx(one["losses"], rel=2e-3)
    shared(pool, tmp_path / "cut", *overrides, *ENGINES[engine], stop_after=3)
    again = shared(pool, tmp_path / "cut", *overrides, *ENGINES[engine])
    assert again["losses"] == two["losses"]
    assert again["a"] == one["a"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARED)
@pytest.mark.parametrize("setting", ["share_a=true", "dtype=model", "correction=closed_form"])
def test_every_setting_of_the_adapters_is_the_same_on_every_engine(
    pool: Pool, engine: str, setting: str, tmp_path: Path
) -> None:
    for method in ["lorafa"] if "correction" in setting else ["lora", "lorafa"]:
        overrides = [f"method={method}", MIXED, f"method.{setting}"]
        one = alone(tmp_path / f"1{method}", *overrides)
        two = shared(pool, tmp_path / f"2{method}", *overrides, *ENGINES[engine])
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-4 if "offload" in engine else 1e-5)
