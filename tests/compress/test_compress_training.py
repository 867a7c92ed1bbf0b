"""Claims about compressed gradients in the shared loop, on two real gloo ranks: they are exchanged once, whatever
engine runs; an exact method is plain training; a run that stops goes on with the same bits, on another number of ranks
with the same average; and a gradient that is not finite leaves nothing behind.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsys import compose, schema, wiring
from llmsys.comm.group import group
from llmsys.comm.place import Place
from llmsys.comm.traffic import Traffic
from rank_pool import ENGINES, Pool, briefly
from rank_runs import TINY, weights

HERE = "test_compress_training"
CARRIERS = ("ddp", "zero0", "zero1")
METHODS: dict[str, list[str]] = {
    "none": [],
    "bf16": ["compress=bf16"],
    "sign": ["compress=sign"],
    "efsign": ["compress=efsign"],
    "topk": ["compress=topk", "compress.density=0.1"],
    "randomk": ["compress=randomk", "compress.density=0.1"],
    "powersgd": ["compress=powersgd"],
    "acpsgd": ["compress=acpsgd"],
    "acpsgd refreshed": ["compress=acpsgd", "compress.refresh_every=2", "compress.skip=[lm_head.*]"],
}


def of(pool: Pool, results: Path, *overrides: str, stop_after: int | None = None) -> dict[str, Any]:
    """What rank 0 has to say of a run in `pool`, which must not have failed."""
    found: dict[str, Any] = pool.call("rank_runs:run", str(results), list(overrides), stop_after)[0]
    assert found["status"] == ("ok" if stop_after is None else "interrupted"), found["error"]
    return found


def stepped(place: Place, overrides: list[str], poison: int | None = None) -> dict[str, Any]:
    """Four steps of two micro-batches on a tiny model, as the loop has them: what travels and what is kept. In step
    `poison` rank 1's loss is infinite."""
    from llmsys.models import load
    from llmsys.profile.memory import num_bytes
    from llmsys.train import optimizer

    wanted = [*TINY, "model.num_kv_heads=4", f"train.world={place.world}", "train.global_batch=8", *overrides]
    config = schema.build(compose.compose(wanted))
    device = torch.device("cpu")
    found: dict[str, Any] = {"traffic": [], "calls": [], "norms": [], "weights": [], "steps": []}
    with group(place, device):
        model = load(config.model, objective="causal_lm", num_labels=0, device=device, seed=0, folder=None)
        torch.manual_seed(0)  # adapters are drawn
        model = wiring.method(config.method).prepare(model, [])
        engine, sync = wiring.engine(config, place, device), wiring.grad_sync(config)
        wrapped = engine.wrap(model, lambda whole: optimizer.adamw(whole, config.train, 1e-3))
        sync.attach(wrapped)
        for step in range(4):
            with Traffic() as traffic:
                for micro in range(2):
                    with engine.accumulate(last=micro == 1):
                        ids = torch.arange(32).reshape(2, 16) + 7 * engine.data_rank + micro + step
                        loss = wrapped(input_ids=ids, labels=ids).loss / 4
                        if step == poison and micro == 1 and place.rank == 1:
                            loss = loss * math.inf
                        engine.backward(loss * engine.divisor)
                sync.aggregate(wrapped)
            for counts in (traffic.bytes, traffic.calls):
                counts.pop("broadcast", None)  # DDP's, once: in what order its buckets come from now on
            found["traffic"].append(dict(traffic.bytes))
            found["calls"].append(sum(traffic.calls.values()))
            (_,), norm = engine.step(loss.detach().reshape(1), 1.0)
            found["norms"].append(norm if math.isfinite(norm) else None)
            found["weights"].append(float(sum(p.detach().double().abs().sum() for p in model.parameters())))
            found["steps"].append(sync.state()[1].get("step"))
        found["finite"] = all(bool(t.isfinite().all()) for t in sync.held())
        found["kept"] = sum(num_bytes(tensor) for tensor in sync.held())
    return found


@pytest.mark.parametrize("method", briefly(METHODS, "sign", "acpsgd"))
def test_gradients_travel_once_as_predicted_and_alike_on_every_engine(pool: Pool, method: str) -> None:
    """Bytes of each step to the byte, by torch's own dispatcher: none are left of the engine's own exchange. Weights
    and norms of the engines agree, after accumulation and clipping; what is kept is what is estimated."""
    from llmsys import cost
    from llmsys.cost import compressed, shapes, traffic

    found = {}
    for engine in CARRIERS:
        overrides = [*ENGINES[engine], *METHODS[method]]
        found[engine] = pool.call(f"{HERE}:stepped", overrides)
        config = schema.build(compose.compose([*TINY, "model.num_kv_heads=4", "train.world=2", *overrides]))
        parts = (config.model, config.train, config.method, config.engine)
        trained = [p for p in shapes.held(cost.Case(*parts)) if p.trained]
        gradients = [(p.name, p.shape, p.width) for p in trained]
        for rank in found[engine]:
            for step, said in enumerate(rank["traffic"]):
                assert said == compressed.step_bytes(gradients, config.compress, 2, step), (engine, step)
            if method != "none":
                rounds = 2 if method in ("sign", "powersgd") else 1
                assert rank["calls"] == [rounds] * 4, "one bucket holds the model"
            assert rank["kept"] == cost.estimate(*parts, compress=config.compress).get("compress", 0)
        mean = traffic.step_payload(*parts, compress=config.compress)
        if engine == "zero1":
            mean["all_gather"] -= sum(p.nbytes for p in trained)  # of the updated weights, whatever gradients do
        steps = [compressed.step_bytes(gradients, config.compress, 2, step) for step in range(config.train.steps)]
        for kind in steps[0]:
            assert mean.pop(kind) == round(sum(said[kind] for said in steps) / len(steps))
        assert not any(mean.values())
        assert found[engine][0]["weights"] == found[engine][1]["weights"]
    for engine in CARRIERS[1:]:
        assert found[engine][0]["norms"] == pytest.approx(found["ddp"][0]["norms"], rel=1e-4)
        assert found[engine][0]["weights"] == pytest.approx(found["ddp"][0]["weights"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["model.dtype=bf16", "train.precision=bf16"],
        ["model.dtype=bf16", "train.precision=bf16", "compress.error_dtype=half"],
        ["train.precision=bf16"],
        ["method=lora_peft", "method.r=8", "compress.min_rate=0"],
    ],
    ids=["bf16", "bf16, bf16 errors", "autocast", "adapters"],
)
def test_other_dtypes_and_methods_are_exchanged_alike(pool: Pool, more: list[str]) -> None:
    """bf16 under ZeRO 1, whose optimizer has fp32 copies, starts from the norm that DDP has, as the optimizer on the
    host does. What is kept is what is estimated."""
    from llmsys import cost

    engines = {**ENGINES, "zero1-offload": [*ENGINES["zero1"], "engine.offload=optimizer"]}
    found = {}
    for engine in (*CARRIERS, "zero1-offload"):
        overrides = [*engines[engine], "compress=acpsgd", *more]
        found[engine] = pool.call(f"{HERE}:stepped", overrides)
        config = schema.build(compose.compose([*TINY, "model.num_kv_heads=4", "train.world=2", *overrides]))
        parts = (config.model, config.train, config.method, config.engine)
        assert found[engine][0]["kept"] == cost.estimate(*parts, compress=config.compress)["compress"]
        assert found[engine][0]["norms"][0] == pytest.approx(found["ddp"][0]["norms"][0], rel=5e-3)
        assert found[engine][0]["calls"] == [1] * 4


@pytest.mark.parametrize("engine", CARRIERS)
@pytest.mark.parametrize("method", briefly(["acpsgd", "topk", "powersgd"], "acpsgd"))
def test_a_gradient_that_is_not_finite_leaves_nothing_behind(pool: Pool, engine: str, method: str) -> None:
    """One rank's infinite loss: no rank's weights change in that step, and all change in the next one, healthy."""
    for found in pool.call(f"{HERE}:stepped", [*ENGINES[engine], *METHODS[method]], 1):
        first, second, third, fourth = found["weights"]
        assert first == second != third != fourth
        assert [norm is None for norm in found["norms"]] == [False, True, False, False]
        assert found["finite"]


@pytest.mark.parametrize("engine", briefly(CARRIERS, "zero1"))
def test_an_exact_method_is_plain_training(pool: Pool, engine: str, tmp_path: Path) -> None:
    """Power-SGD with as many directions as a matrix has, and a Top-k of everything, through the whole loop."""
    plain = of(pool, tmp_path / "plain", "engine=ddp")
    for exact in (["powersgd", "compress.r=999", "compress.min_rate=0"], ["topk", "compress.density=1"]):
        found = of(pool, tmp_path / exact[0], *ENGINES[engine], f"compress={exact[0]}", *exact[1:])
        assert found["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        assert found["norms"] == pytest.approx(plain["norms"], rel=1e-4)
        assert found["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-5)
    assert plain["losses"][-1] < plain["losses"][0]


def test_a_step_skipped_by_the_loop_gives_back_what_was_sent(pool: Pool, tmp_path: Path) -> None:
    """`train.on_nan=skip` through the whole loop: rank 1's gradient is infinite in step 3, and the run ends well."""
    found = pool.call(f"{HERE}:with_a_fault", str(tmp_path), ["engine=ddp", "compress=acpsgd"])
    losses = found[0]["losses"]
    assert losses[-1] < losses[0]
    assert found[0]["skipped"] == [False, False, True, False, False, False]
    assert found[0]["finite"]
    assert found[1]["finite"]


def with_a_fault(place: Place, results: str, overrides: list[str]) -> dict[str, Any]:
    """A run in which rank 1's gradients are infinite in step 3."""
    from llmsys.context import Context
    from llmsys.track.jsonl import read
    from llmsys.train.engines.ddp import DDP
    from rank_runs import run

    seen: list[Context] = []
    backward, calls = DDP.backward, 0

    def faulty(self: DDP, loss: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        step = (calls + 1) // 2  # of two micro-batches
        backward(self, loss * math.inf if step == 3 and place.rank == 1 else loss)

    DDP.backward = faulty  # type: ignore[method-assign]
    try:
        found = run(place, results, ["train.on_nan=skip", *overrides], None, seen)
    finally:
        DDP.backward = backward  # type: ignore[method-assign]
    assert found["status"] == "ok", found["error"]
    rows = [row for row in read(Path(found["out"]) / "metrics.jsonl") if "grad_norm" in row]
    tensors, _ = seen[0].grad_sync.state()
    return {
        "losses": found["losses"],
        "skipped": [row["grad_norm"] is None for row in rows],
        "finite": bool(tensors) and all(bool(t.isfinite().all()) for t in tensors.values()),
    }


@pytest.mark.parametrize("engine", briefly(CARRIERS, "zero1"))
def test_a_stopped_run_goes_on_with_the_same_bits(pool: Pool, engine: str, tmp_path: Path) -> None:
    """After an odd number of steps: ACP-SGD has done the first half of a power iteration, and the second is next."""
    overrides = [*ENGINES[engine], "compress=acpsgd", "model.dropout=0.1"]
    whole = of(pool, tmp_path / "whole", *overrides)
    first = of(pool, tmp_path / "cut", *overrides, stop_after=3)
    checkpoint = next((Path(first["out"]) / "checkpoint").glob("step-*"))
    step = int(checkpoint.name.removeprefix("step-"))
    from safetensors import safe_open

    for rank in (0, 1):
        with safe_open(checkpoint / f"rank-{rank}.safetensors", "pt") as file:
            names = [name for name in file.keys() if name.startswith("compress/")]  # noqa: SIM118 - no mapping
        assert any(name.endswith("/error") for name in names)
        assert all(name.startswith(f"compress/{rank}/") for name in names)
    again = of(pool, tmp_path / "cut", *overrides)
    assert again["resumed"] == step in (3, 4)  # the ranks agree at the next step, at the latest
    assert again["losses"] == whole["losses"]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[name]), name


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_with_the_average(pool: Pool, alone: Pool, tmp_path: Path) -> None:
    """Two ranks go on as one, of the same global batch, and back: what all of them send together is what it would have
    been, as it depends on the mean of their errors alone."""
    overrides = ["engine=ddp", "compress=acpsgd"]
    whole = of(pool, tmp_path / "whole", *overrides)
    two = of(pool, tmp_path / "two", *overrides, stop_after=2)
    one = of(alone, tmp_path / "one", *overrides, f"train.resume={two['out']}", stop_after=4)
    back = of(pool, tmp_path / "back", *overrides, f"train.resume={one['out']}")
    for part, start in ((one, back["resumed"] - len(one["losses"])), (back, back["resumed"])):
        assert part["losses"] == pytest.approx(whole["losses"][start : start + len(part["losses"])], rel=1e-5)
    assert back["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-5)


def test_a_run_may_begin_to_compress_and_stop_to(pool: Pool, tmp_path: Path) -> None:
    """From a checkpoint without memories, and without a use for them; the log says so."""
    acp = ["engine=ddp", "compress=acpsgd"]
    plain = of(pool, tmp_path / "plain", "engine=ddp", stop_after=2)
    begun = of(pool, tmp_path / "begun", *acp, f"train.resume={plain['out']}")
    assert "made without gradient compression, whose memories begin empty" in log(begun)
    compressed = of(pool, tmp_path / "compressed", *acp, stop_after=2)
    ended = of(pool, tmp_path / "ended", "engine=ddp", f"train.resume={compressed['out']}")
    assert "what was not sent yet is left out" in log(ended)


def log(run: dict[str, Any]) -> str:
    return (Path(run["out"]) / "log.txt").read_text()


def test_the_record_has_what_compression_keeps(pool: Pool, tmp_path: Path) -> None:
    """`compress_bytes` of one copy of the matrices and their factors, and far fewer bytes on the wire."""
    plain, acp = (of(pool, tmp_path, "engine=ddp", f"compress={kind}")["summary"] for kind in ("none", "acpsgd"))
    assert acp["compress_bytes"] / acp["gradients_bytes"] == pytest.approx(1.1, abs=0.15)
    assert acp["accounted_bytes"] - plain["accounted_bytes"] == acp["compress_bytes"]
    assert "compress_bytes" not in plain
    assert acp["comm_bytes"] < plain["comm_bytes"] / 5
    assert acp["predicted_peak_gib"] > plain["predicted_peak_gib"]
