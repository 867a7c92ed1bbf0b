"""Claims about `bench_modules`: its steps are training's, bit for bit; its record is whole; what it counts is what the
cost model counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmsys import compose, runner, schema
from llmsys import job as jobs
from llmsys.bench.modules import figures, tables
from llmsys.bench.modules.figures import ARMS
from llmsys.comm.place import Place
from llmsys.cost.modules import Flops, by_module
from llmsys.train import checks
from rank_pool import Pool

HERE = "test_bench_modules"
TINY = ["train.length=32", "train.threads=1", "train.save_final=false", "data.num_examples=24", "dispatch.kind=process"]
TINY += ["train.lr_by_method={full: 1e-2, lora_peft: 1e-2, lora: 1e-2, lorafa: 1e-2}", "profile.probe=false"]
TINY += ["train.global_batch=4", "train.micro_batch=2", "train.schedule=constant", "model=llama_tiny"]
ROUNDS = ["task=bench_modules", "task.warmup=1", "task.rounds=2"]
STEPS = 3 * len(ARMS)


def run(place: Place, results: str, overrides: list[str]) -> dict[str, Any]:
    """One rank of a run; `losses` of every step as the run tells them."""
    settings = [*TINY, f"train.world={place.world}", f"train.steps={STEPS}", f"results={results}", *overrides]
    made = jobs.make(compose.compose(settings))
    losses: list[float] = []

    def listener(progress: dict[str, Any]) -> None:
        losses.extend([progress["loss"]] if "loss" in progress else [])

    record = runner.run(made, listener, place=place)
    assert record.status == "ok", record.error
    text = (
        (Path(record.config["results"]) / "scratch" / made.run_id / "modules.md") if "tables" in record.files else None
    )
    return {
        "losses": losses,
        "summary": record.summary,
        "samples": record.samples,
        "kernel": record.kernel,
        "notes": record.notes,
        "config": record.config,
        "text": text.read_text() if text and place.rank == 0 else "",
    }


CASES = {
    "accumulation": [],
    "eager-block": ["model.attention=eager", "train.recompute=block"],
    "peft-block": ["method=lora_peft", "train.recompute=block"],
    "lora": ["method=lora", "train.recompute=attn+mlp"],
    "lorafa": ["method=lorafa"],
    "chunked": ["train.loss=chunked"],
}


@pytest.mark.parametrize("case", CASES)
def test_its_steps_are_trainings(case: str, tmp_path: Path) -> None:
    """A third of them has every span attached: no loss differs in a bit, of all that follow either."""
    plain = run(Place(), str(tmp_path), CASES[case])
    looked = run(Place(), str(tmp_path), [*CASES[case], *ROUNDS])
    assert looked["losses"] == plain["losses"]
    assert len(plain["losses"]) == STEPS
    assert plain["losses"][-1] < plain["losses"][0]
    _is_whole(looked)
    rows = set(tables.rows(looked["summary"]))
    assert ("block" in rows) == (case in ("lora", "lorafa"))
    assert ("logits+loss" in rows) == (case == "chunked")
    assert ("modules/qkv/recompute_ms" in looked["summary"]) == (case in ("eager-block", "peft-block"))


def _is_whole(found: dict[str, Any]) -> None:
    """Every step's rows are that step; all FLOPs of the cost model have a row; the table says what looking costs."""
    summary, samples = found["summary"], found["samples"]
    rows = [values for key, values in samples.items() if key.startswith("modules/")]
    for i, whole in enumerate(samples["modules_step_ms"]):
        assert sum(values[i] for values in rows) == pytest.approx(whole)
    assert all(len(values) == 2 for values in samples.values()), "warm-up is left out"
    config = schema.build(found["config"])
    parts = config.model, config.train, config.method, config.engine
    products = by_module(*parts, **checks.facts(config, checks.torch.device("cpu")))
    counted = sum(value for key, value in summary.items() if key.endswith("_flops"))
    assert counted == pytest.approx(sum(sum(flops) for flops in products.values()))
    assert 0 < summary["attributed_percent"] <= 100
    assert found["notes"]["peak_tflops"].startswith("measured")
    assert summary["peak_measured"] == 1
    assert "Overhead, round by round" in found["text"]
    for row in tables.rows(summary):
        assert f"| {row} |" in found["text"]


def test_ranks_that_share_gradients(pool: Pool, tmp_path: Path) -> None:
    """DDP's losses keep their bits, and waiting for its last bucket is communication, behind the last module.
    That ranks agree on the number of labels has a row of its own."""
    overrides = ["engine=ddp", "train.global_batch=8"]
    plain = pool.call(f"{HERE}:run", str(tmp_path), overrides)
    looked = pool.call(f"{HERE}:run", str(tmp_path), [*overrides, *ROUNDS])
    assert looked[0]["losses"] == plain[0]["losses"] == plain[1]["losses"]
    summary = looked[0]["summary"]
    assert summary["modules/communication/backward_ms"] > 0
    for row in ("data", "agreement", "optimizer"):
        assert summary[f"modules/{row}/ms"] > 0, "a phase of the step, no part of what nobody knows"
    _is_whole(looked[0])


def test_a_median_row_and_its_speed() -> None:
    """By hand: 3 ms forward and 6 back for 9e9 FLOP in all are 1 TFLOP/s, half of a peak of 2."""
    rows = {
        "down": {"forward": [3.0, 3.0, 9.0], "backward": [6.0, 6.0, 18.0]},
        "optimizer": {"": [1.0, 1.0, 3.0]},
        "unattributed": {"": [0.0, 0.0, 0.0], "forward": [2.0, 2.0, 6.0]},
    }
    products = {"model.layers.0.mlp.down_proj": Flops(3e9, 5e9, 1e9)}
    found = figures.modules(rows, products, 2e12)
    assert found["modules/down/ms"] == 9
    assert found["modules/down/share_percent"] == pytest.approx(75)
    assert found["modules/down/forward_tflops"] == pytest.approx(1)
    assert found["modules/down/backward_tflops"] == pytest.approx(1), "with what is computed again"
    assert found["modules/down/peak_percent"] == pytest.approx(50)
    assert found["attributed_percent"] == pytest.approx(100 * 10 / 12)
    step_ms = {"bare": [10.0, 20.0, 10.0], "phases": [10.0, 20.0, 11.0], "modules": [10.5, 21.0, 10.5]}
    overheads = figures.overheads(step_ms)
    assert overheads["overhead/modules_percent"] == pytest.approx(5), "round by round, though rounds differ"
    assert overheads["overhead/phases_percent"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("engine=zero2", "engine.kind=deepspeed: bench_modules is for engine=local or engine=ddp"),
        ("task.rounds=1", "task.rounds=1: must be at least 2"),
    ],
)
def test_what_it_cannot_do_is_said_before(override: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        schema.build(compose.compose(["+exp=bench_modules", override]))
