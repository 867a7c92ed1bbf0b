"""Every experiment runs, at the size of its `smoke` overrides, to a record with the numbers it promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsys import compose, job, runner, schema
from llmsys.results import SHARED_KEYS
from llmsys.schema.task import SIMULATED
from llmsys.train import checks

Run = Callable[[str], tuple[job.Job, job.Record]]
EXPERIMENTS = sorted(compose.choices("exp"))
REPEATS = (
    *("full_llama7b", "lora_llama7b", "lorafa_minilm_lr", "lorafa_minilm_seeds", "pretrain_t5_4m"),
    *("compress_ablation", "compress_resnet18_cifar10", "compress_vgg16_cifar10"),
)
"""Which differ from another experiment in numbers alone."""
LONG = (
    *("compress_iteration", "decentral_finetune", "decentral_generate", "decentral_simulate_churn"),
    *("bench_serve_burst", "bench_serve_compare", "bench_serve_rate"),
)
"""Which take long, while another of the same list does not."""
MEASURED = ("compress_iteration", "compress_ablation", "compress_replay")
LOOKED_INTO = {
    "bench_modules": ("modules/qkv/forward_ms", "| qkv |"),
    "bench_ops": ("gemm/32x64x64/fp32/ms", "| gemm/32x64x64/fp32 |"),
    "bench_opportunities": ("opportunities/qkv/roofline_ms", "| qkv |"),
    "bench_serve_burst": ("output_tokens_per_s", "| first token |"),
    "bench_serve_compare": ("bandwidth_percent", "| per token |"),
    "bench_serve_modules": ("decode/2x8/qkv/bandwidth_percent", "| qkv |"),
    "bench_serve_rate": ("max_rate_per_s", "Highest rate"),
    "bench_serve_stub": ("added_ms_p50", "added by client and line"),
    "bench_predict": ("predicted_step_ms", "| optimizer |"),
    "bench_calibrate": ("scale/forward/work", ""),
    "decentral_plan": ("micro_batches_per_s", "| stage |"),
    "decentral_3080_vs_h100": ("critical_mbit", "compression for lines not to matter"),
    "decentral_profile": ("efficiency", "ms by the fit"),
    "decentral_attack": ("most_percent", "| layers before |"),
    "decentral_simulate_churn": ("200s/committed_steps", "mean time between failures"),
}
TOGETHER = ("decentral_train", "decentral_finetune", "decentral_generate")
TRAINED = [
    exp
    for exp in EXPERIMENTS
    if exp not in ("lorafa_ledger", "compress_simulate", "bench_advise", *MEASURED, *LOOKED_INTO, *TOGETHER)
]
ON_CUDA = ("peak_gib", "reserved_gib")
CLASSES = ("accuracy", "accuracy_se", "macro_f1")
BY_OBJECTIVE = {
    "classification": CLASSES,
    "images": CLASSES,
    "causal_lm": ("perplexity", "tokens_per_s"),
    "seq2seq": ("perplexity", "tokens_per_s"),
}
MAY_BE_ZERO = ("bleu", "rouge1", "rouge2", "rougeL", "comm_bytes", "linear_weights_trained", "accuracy", "accuracy_se")


def brief(experiments: Iterable[str]) -> list[Any]:
    """`experiments` for `parametrize`; the short suite has neither repetitions nor what takes long."""
    return [pytest.param(exp, marks=[pytest.mark.slow] if exp in (*REPEATS, *LONG) else []) for exp in experiments]


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Each is made once: experiments build on each other, and the demo has one of them for a method."""
    results = tmp_path_factory.mktemp("results")

    @cache
    def run(exp: str) -> tuple[job.Job, job.Record]:
        smoke = compose.compose([f"+exp={exp}"])["smoke"]
        made = job.make(compose.compose([f"+exp={exp}", *smoke, f"results={results}"]))
        return made, runner.run(made)

    return run


@pytest.mark.parametrize("exp", brief(TRAINED))
def test_its_smoke_run_is_ok(exp: str, smoke_run: Run) -> None:
    made, record = smoke_run(exp)
    assert record.status == "ok", record.error
    other = {key for keys in BY_OBJECTIVE.values() for key in keys}
    model = schema.build(made.config).model
    for key in {*SHARED_KEYS} - {*ON_CUDA, *MAY_BE_ZERO} - other | {*BY_OBJECTIVE[model.objective]} - {*MAY_BE_ZERO}:
        assert record.summary[key] > 0, key
    if model.objective == "seq2seq":
        assert {"bleu", "rouge1", "rouge2", "rougeL"} <= record.summary.keys()
    assert bool(record.kernel) == isinstance(model, schema.Transformer)
    parts, _ = checks.kinds_and_peak(schema.build(made.config), torch.device("cpu"))
    assert sum(parts.values()) == pytest.approx(record.summary["accounted_bytes"], rel=0.1)


@pytest.mark.parametrize("exp", brief(MEASURED))
def test_measured_iterations_leave_their_tables(exp: str, results: Path) -> None:
    smoke = compose.compose([f"+exp={exp}"])["smoke"]
    made = job.make(compose.compose([f"+exp={exp}", *smoke, f"results={results}"]))
    record = runner.run(made)
    assert record.status == "ok", record.error
    text = (Path(made.out) / record.files["tables"]).read_text()
    assert "| noop |" in text
    assert "| acpsgd |" in text


@pytest.mark.parametrize("exp", brief(LOOKED_INTO))
def test_modules_and_operators_leave_their_tables(exp: str, results: Path) -> None:
    smoke = compose.compose([f"+exp={exp}"])["smoke"]
    made = job.make(compose.compose([f"+exp={exp}", *smoke, f"results={results}"]))
    record = runner.run(made)
    assert record.status == "ok", record.error
    key, line = LOOKED_INTO[exp]
    assert record.summary[key] > 0
    if line:
        assert line in (Path(made.out) / record.files["tables"]).read_text()


@pytest.mark.parametrize("exp", brief(TOGETHER))
def test_jobs_over_processes_leave_what_they_made(exp: str, smoke_run: Run) -> None:
    made, record = smoke_run(exp)
    assert record.status == "ok", record.error
    assert record.summary["tokens_per_s"] > 0
    assert (record.summary["lost"], record.summary["plans"]) == (0, 1)
    assert {(Path(made.out) / name).exists() for name in record.files.values()} == {True}


def test_the_ledger_leaves_its_tables(results: Path) -> None:
    smoke = compose.compose(["+exp=lorafa_ledger"])["smoke"]
    made = job.make(compose.compose(["+exp=lorafa_ledger", *smoke, f"results={results}"]))
    record = runner.run(made)
    assert record.status == "ok", record.error
    text = (Path(made.out) / record.files["tables"]).read_text()
    for title in ("Saved by a block", "Times fewer bytes", "measured model whole", "total peak", "freezing A buys"):
        assert title in text
    cells = [f"{heads}/{dropout}" for heads in ("mha", "gqa") for dropout in ("0", "0.1")]
    for cell in cells:
        saved = record.summary[f"block/{cell}/lorafa/none/total"]
        assert record.summary[f"block/{cell}/lorafa/none/total_closed"] == pytest.approx(saved, rel=0.01)
        assert record.summary[f"block/{cell}/peft_lora/total"] > 2.8 * saved


def test_the_simulation_leaves_tables_and_advice(results: Path) -> None:
    smoke = compose.compose(["+exp=compress_simulate"])["smoke"]
    made = job.make(compose.compose(["+exp=compress_simulate", *smoke, f"results={results}"]))
    record = runner.run(made)
    assert record.status == "ok", record.error
    text = (Path(made.out) / record.files["tables"]).read_text()
    for title in ("10GbE, 8 GPUs", "Break-even", "on 10GbE with 8 GPUs and ResNet-50: "):
        assert title in text
    assert "the paper" not in text  # whose numbers are of other clusters
    for method in SIMULATED:
        where = f"resnet50/eth10g/8/{method}"
        assert record.summary[f"{where}/iteration_ms"] * (1 + 1e-9) >= record.summary[f"{where}/device_ms"] > 0
    # parameters fitted elsewhere take the place of specifications: here a link that costs nothing, and 100 ms
    given = ["task.per_machine=1", "task.alpha_s=0", "task.beta_bytes_per_s=1e15", "+task.compute_ms.resnet50=100"]
    record = runner.run(job.make(compose.compose(["+exp=compress_simulate", *smoke, *given, f"results={results}"])))
    for method in SIMULATED:
        ms = {key: record.summary[f"resnet50/given/8/{method}/{key}_ms"] for key in ("iteration", "compress")}
        assert ms["iteration"] - ms["compress"] == pytest.approx(100, rel=1e-3)
    with pytest.raises(ValueError, match=r"hardware\.name=auto"):
        schema.build(compose.compose(["+exp=compress_simulate", "hardware=auto"]))


@pytest.mark.parametrize(
    "method", ["full", pytest.param("lora_peft", marks=pytest.mark.slow), "lorafa_peft", "probe", "majority"]
)
def test_every_method_of_the_demo_runs(method: str, results: Path, smoke_run: Run) -> None:
    smoke = compose.compose(["+exp=lorafa_minilm"])["smoke"]
    made = job.make(compose.compose(["+exp=lorafa_minilm", *smoke, f"method={method}", f"results={results}"]))
    record = smoke_run("lorafa_minilm")[1] if method == "lorafa_peft" else runner.run(made)
    assert record.config["method"]["kind"] == method
    assert record.status == "ok", record.error
    assert 0 <= record.summary["macro_f1"] <= 1
    n = 24
    p = record.summary["accuracy"]
    assert record.summary["accuracy_se"] == pytest.approx((p * (1 - p) / n) ** 0.5)


def test_one_run_builds_on_the_weights_of_another(results: Path, smoke_run: Run) -> None:
    """`run:<exp>` finds the other run's weights by its recomputed id: here at smoke size, by its real folder."""
    base, record = smoke_run("pretrain_llama_6m")
    assert record.status == "ok"
    tuned_smoke = [o for o in compose.compose(["+exp=lorafa_llama_6m"])["smoke"] if not o.startswith("model.weights")]
    config = compose.compose(["+exp=lorafa_llama_6m", *tuned_smoke, f"results={results}"])
    made = job.make(config, {"run:pretrain_llama_6m": base.out})
    record = runner.run(made)
    assert record.status == "ok", record.error
    assert made.run_id != job.make(config, {"run:pretrain_llama_6m": str(results / "other")}).run_id
