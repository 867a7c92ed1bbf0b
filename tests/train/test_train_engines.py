"""Claims about the engines, on two real gloo ranks: whatever shares the work, the numbers are those of one rank; a run
that stops goes on with the same bits; and a gradient that is not finite changes nothing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsys import compose
from llmsys.comm import collectives
from llmsys.comm.group import group
from llmsys.comm.place import Place
from llmsys.train import checkpoint
from rank_pool import ENGINES, Pool, briefly
from rank_runs import TINY, weights

HERE = "test_train_engines"
"""The short suite claims of every kind of engine that it computes alike, and of what else is so one or two examples."""


def of(pool: Pool, results: Path, *overrides: str, stop_after: int | None = None) -> dict[str, Any]:
    """What rank 0 has to say of a run in `pool`."""
    found: dict[str, Any] = pool.call("rank_runs:run", str(results), list(overrides), stop_after)[0]
    return found


@pytest.fixture(scope="module")
def reference(alone: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run of one rank that all others are compared with."""
    found = of(alone, tmp_path_factory.mktemp("reference"))
    assert found["status"] == "ok", found["error"]
    assert found["losses"][-1] < found["losses"][0]
    return found


@pytest.mark.parametrize("engine", briefly(ENGINES, "ddp", "zero0", "zero3", "zero2-offload", "fsdp2", "tp"))
def test_two_ranks_compute_what_one_computes(
    pool: Pool, reference: dict[str, Any], engine: str, tmp_path: Path
) -> None:
    """Losses, norms and scores to 1e-5 (1e-4 with offload): the same global batch is the same step."""
    found = of(pool, tmp_path, *ENGINES[engine])
    assert found["status"] == "ok", found["error"]
    tolerance = 1e-4 if "offload" in engine else 1e-5
    assert found["losses"] == pytest.approx(reference["losses"], rel=tolerance)
    assert found["norms"] == pytest.approx(reference["norms"], rel=10 * tolerance)
    assert found["val_loss"] == pytest.approx(reference["val_loss"], rel=tolerance)
    for name, tensor in weights(found).items():
        assert torch.allclose(tensor, weights(reference)[name], rtol=1e-3, atol=1e-5), name
    summary, whole = found["summary"], reference["summary"]
    assert (summary["total_params"], summary["trainable_params"]) == (whole["total_params"], whole["trainable_params"])
    assert summary["comm_bytes"] > 0


@pytest.mark.parametrize("engine", briefly(ENGINES, "fsdp2"))
def test_a_stopped_run_goes_on_with_the_same_bits(pool: Pool, engine: str, tmp_path: Path) -> None:
    """Asked of one rank, between two steps: both write a checkpoint and end; the same command goes on from there."""
    overrides = [*ENGINES[engine], "model.dropout=0.1"]
    whole = of(pool, tmp_path / "whole", *overrides)
    first = of(pool, tmp_path / "cut", *overrides, stop_after=3)
    assert first["status"] == "interrupted", first["error"]
    assert "goes on from there" in first["error"]
    last = int(first["error"].split("after step ")[1].split(";")[0])
    assert last in (3, 4)  # the ranks agree at the next step, at the latest
    again = of(pool, tmp_path / "cut", *overrides)
    assert (again["status"], again["resumed"]) == ("ok", last), again["error"]
    assert again["losses"] == whole["losses"]
    assert again["val_loss"] == whole["val_loss"]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[name]), name
    assert not (Path(again["out"]) / "checkpoint").exists()


@pytest.mark.parametrize("engine", briefly(ENGINES, "zero3"))
def test_two_ranks_go_on_as_one_and_one_as_two(
    pool: Pool, alone: Pool, reference: dict[str, Any], engine: str, tmp_path: Path
) -> None:
    """A checkpoint is whole tensors by name: any engine on any number of ranks reads it."""
    shared = of(pool, tmp_path / "two", *ENGINES[engine], stop_after=2)
    assert shared["status"] == "interrupted"
    to_one = of(alone, tmp_path / "one", f"train.resume={shared['out']}", stop_after=4)
    assert to_one["status"] == "interrupted", to_one["error"]
    back = of(pool, tmp_path / "back", *ENGINES[engine], f"train.resume={to_one['out']}")
    assert back["status"] == "ok", back["error"]
    assert back["resumed"] in (4, 5)
    losses = back["losses"]
    tolerance = 1e-4 if "offload" in engine else 1e-5
    assert losses == pytest.approx(reference["losses"][-len(losses) :], rel=tolerance)
    assert back["val_loss"] == pytest.approx(reference["val_loss"], rel=tolerance)


def most_held(place: Place, overrides: list[str]) -> dict[str, int]:
    """Elements of a model, and the most of them that a rank held at a time while an engine took over its parts."""
    from torch import nn

    from llmsys import schema, wiring
    from llmsys.models import unfilled
    from llmsys.train import optimizer
    from llmsys.train.engines.local import local

    words = [*TINY, "model.num_layers=6", "model.num_kv_heads=4", f"train.world={place.world}", *overrides]
    config = schema.build(compose.compose(words))
    device = torch.device("cpu")
    most = 0
    with group(place, device):
        model, fill = unfilled(config.model, objective="causal_lm", num_labels=0, device=device, seed=0, folder=None)
        elements = sum(p.numel() for p in model.parameters())

        def watched(module: nn.Module) -> None:
            nonlocal most
            fill(module)
            parts = (getattr(p, "ds_tensor", local(p)) for p in model.parameters())
            most = max(most, sum(part.numel() for part in parts if not part.is_meta))

        engine = wiring.engine(config, place, device)
        assert engine.cuts_weights
        engine.wrap(model, lambda whole: optimizer.adamw(whole, config.train, 1e-3), watched)
    return {"elements": elements, "most": most}


@pytest.mark.parametrize("engine", briefly(("zero3", "fsdp2", "tp"), "zero3", "fsdp2"))
def test_an_engine_that_cuts_weights_holds_the_whole_model_at_no_time(pool: Pool, engine: str) -> None:
    """A part is filled when those before it are cut: half of the blocks, and at the end the embedding and the head."""
    for found in pool.call(f"{HERE}:most_held", ENGINES[engine]):
        assert found["most"] < 0.8 * found["elements"]


def poisoned(place: Place, overrides: list[str]) -> dict[str, Any]:
    """Three steps of an engine on a small model; in the second, rank 0's loss is infinite."""
    from llmsys import schema, wiring
    from llmsys.models import load
    from llmsys.train import optimizer

    config = schema.build(compose.compose([*TINY, "model.num_kv_heads=4", f"train.world={place.world}", *overrides]))
    device = torch.device("cpu")
    with group(place, device):
        model = load(config.model, objective="causal_lm", num_labels=0, device=device, seed=0, folder=None)
        engine = wiring.engine(config, place, device)
        wrapped = engine.wrap(model, lambda whole: optimizer.adamw(whole, config.train, 1e-3))
        ids = torch.arange(32).reshape(2, 16) + engine.data_rank
        states = []
        finite = []
        for step in range(3):
            with engine.accumulate(last=True):
                loss = wrapped(input_ids=ids, labels=ids).loss
                if step == 1 and place.rank == 0:
                    loss = loss * math.inf
                engine.backward(loss)
            (total,), norm = engine.step(loss.reshape(1), 1.0)
            finite.append(math.isfinite(total) and math.isfinite(norm))
            whole = [engine.full(p).float() for p in model.parameters()]
            moments = [m for p in model.parameters() for key, m in sorted(engine.moments(p).items()) if m.ndim]
            states.append(float(sum(t.double().abs().sum() for t in (*whole, *moments))))
        assert collectives.world() == place.world
    return {"finite": finite, "states": states}


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "tp"])
def test_a_gradient_that_is_not_finite_changes_nothing(pool: Pool, engine: str) -> None:
    """One rank's infinite loss: all ranks leave the update out, and go on with the next."""
    for found in pool.call(f"{HERE}:poisoned", ENGINES[engine]):
        assert found["finite"] == [True, False, True]
        first, second, third = found["states"]
        assert first == second != third


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora_peft"])
def test_fp32_copies_of_zero_go_over_to_an_engine_without_any(
    pool: Pool, alone: Pool, method: str, tmp_path: Path
) -> None:
    """bf16: ZeRO's checkpoint has fp32 copies and moments; one rank takes them in its own precision, and passes on what
    it has trained, not the copies."""
    overrides = ["model.dtype=bf16", "train.precision=bf16", f"method={method}", "train.lr_by_method.lora_peft=1e-2"]
    shared = of(pool, tmp_path / "two", *overrides, *ENGINES["zero2"], stop_after=2)
    one = of(alone, tmp_path / "one", *overrides, f"train.resume={shared['out']}", stop_after=4)
    assert one["status"] == "interrupted", one["error"]
    names = checkpoint.Reader(checkpoint.found(Path(one["out"]) / "checkpoint")[0], rank=0).names("optimizer")
    assert not any(name.startswith("master/") for name in names)
    back = of(pool, tmp_path / "back", *overrides, *ENGINES["zero2"], f"train.resume={one['out']}")
    whole = of(pool, tmp_path / "whole", *overrides, *ENGINES["zero2"])
    assert back["status"] == "ok", back["error"]
    assert back["losses"][-1] == pytest.approx(whole["losses"][-1], rel=2e-2), "rounded to bf16 on the way"


@pytest.mark.slow
def test_a_batch_norm_sees_the_same_on_one_rank_and_two(pool: Pool, alone: Pool, tmp_path: Path) -> None:
    """Training losses to rounding; the running statistics, by which validation goes, weight micro-batches otherwise."""
    overrides = ["model=resnet_tiny", "data=digits", "data.max_train=64", "data.max_val=32", "model.num_classes=10"]
    overrides += [
        "train.global_batch=16",
        "train.micro_batch=8",
        "train.steps=12",
    ]
    one, two = of(alone, tmp_path / "1", *overrides), of(pool, tmp_path / "2", *overrides, *ENGINES["ddp"])
    assert (one["status"], two["status"]) == ("ok", "ok"), two["error"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=0.02)


@pytest.mark.parametrize(
    ("engine", "method"),
    [
        pytest.param(engine, method, marks=[] if (engine, method) == ("fsdp2", "lora_peft") else pytest.mark.slow)
        for engine in ("ddp", "zero2", "zero3", "fsdp2", "tp")
        for method in ("lora_peft", "lorafa_peft")
    ],
)
def test_adapters_train_alike_on_one_rank_and_two(
    pool: Pool, alone: Pool, engine: str, method: str, tmp_path: Path
) -> None:
    """Frozen weights beside trained ones, which engines that cut weights must keep apart."""
    overrides = [f"method={method}", f"train.lr_by_method.{method}=1e-2"]
    one, two = of(alone, tmp_path / "1", *overrides), of(pool, tmp_path / "2", *overrides, *ENGINES[engine])
    assert (one["status"], two["status"]) == ("ok", "ok"), two["error"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert one["losses"][-1] < one["losses"][0]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero0", "ddp", "zero2", "zero3", "fsdp2"])
def test_bf16_runs_and_goes_on(pool: Pool, engine: str, tmp_path: Path) -> None:
    """Everything in bf16; ZeRO keeps fp32 copies, which a checkpoint must hold: the resumed run has the same bits."""
    overrides = [*ENGINES[engine], "model.dtype=bf16", "train.precision=bf16"]
    whole = of(pool, tmp_path / "whole", *overrides)
    assert whole["status"] == "ok", whole["error"]
    assert whole["losses"][-1] < whole["losses"][0]
    of(pool, tmp_path / "cut", *overrides, stop_after=3)
    again = of(pool, tmp_path / "cut", *overrides)
    assert again["losses"] == whole["losses"]


@pytest.mark.parametrize("engine", briefly(["ddp", "zero2", "zero3", "fsdp2", "tp"], "zero2"))
def test_autocast_is_the_same_on_every_engine(pool: Pool, alone: Pool, engine: str, tmp_path: Path) -> None:
    """fp32 weights, bf16 products: the order of sums differs by the rounding of bf16 only."""
    one = of(alone, tmp_path / "1", "train.precision=bf16")
    two = of(pool, tmp_path / "2", "train.precision=bf16", *ENGINES[engine])
    assert two["status"] == "ok", two["error"]
    assert two["losses"] == pytest.approx(one["losses"], rel=2e-3)


@pytest.mark.parametrize("engine", briefly(["ddp", "zero2", "zero3", "fsdp2"], "ddp", "zero3"))
def test_a_chunked_loss_is_the_same_on_every_engine(
    pool: Pool, reference: dict[str, Any], engine: str, tmp_path: Path
) -> None:
    """The head makes the loss where its weight is gathered, and never reads it again."""
    found = of(pool, tmp_path, "train.loss=chunked", *ENGINES[engine])
    assert found["status"] == "ok", found["error"]
    assert found["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(reference["norms"], rel=1e-4)
    assert found["val_loss"] == pytest.approx(reference["val_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_chunked_loss_over_a_tied_table_that_is_cut(pool: Pool, alone: Pool, tmp_path: Path) -> None:
    """The embedding's own table, of which each rank has half; what ranks say to each other stays what it was."""
    tied, chunked = "model.tie_embeddings=true", "train.loss=chunked"
    one = of(alone, tmp_path / "1", tied)
    two, whole = (of(pool, tmp_path / "2", tied, *ENGINES["zero3"], *more) for more in ([chunked], []))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-4)
    assert two["summary"]["comm_bytes"] == whole["summary"]["comm_bytes"]
    assert two["summary"]["saved_bytes"] < whole["summary"]["saved_bytes"]


def test_a_rank_that_cannot_write_fails_all_and_keeps_the_last_checkpoint(pool: Pool, tmp_path: Path) -> None:
    """A file stands where rank 1 would put its share: no rank goes on as if there were a checkpoint."""
    folder = tmp_path / "checkpoint"
    for place_found in pool.call(f"{HERE}:two_checkpoints", str(folder)):
        assert place_found == {"error": True, "newest": "step-00000001", "left": ["step-00000001"]}


def two_checkpoints(place: Place, folder: str) -> dict[str, Any]:
    """Writes step 1, then step 2, which rank 1 cannot."""
    device, where = torch.device("cpu"), Path(folder)
    with group(place, device):
        checkpoint.save(where, 1, {"a": torch.ones(2)}, {}, {"x": 1}, device=device)
        failed = False
        original = checkpoint.files.save

        def full_disk(tensors: dict[str, torch.Tensor], path: Path) -> None:
            raise OSError(28, "No space left on device", str(path))

        checkpoint.files.save = full_disk if place.rank == 1 else original  # type: ignore[assignment]
        try:
            checkpoint.save(where, 2, {"a": torch.ones(2)}, {}, {"x": 2}, device=device)
        except OSError as error:
            failed = error.errno == 28
        finally:
            checkpoint.files.save = original  # type: ignore[assignment]
        collectives.all_reduce(torch.zeros(1))
        newest = checkpoint.found(where)[0]
        assert json.loads((newest / "state.json").read_text())["x"] == 1
        return {"error": failed, "newest": newest.name, "left": sorted(path.name for path in where.iterdir())}
