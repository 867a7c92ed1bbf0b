"""What a record says a run has cost, against what is known of it otherwise."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import train_harness as harness

from llmsys import cost, schema
from llmsys.comm.place import Place
from llmsys.cost.flops import model_flops
from llmsys.cost.hardware import DEVICES
from llmsys.job import Record
from llmsys.train import checks, measure, peaks
from rank_pool import ENGINES, Pool


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("full", {}),
        ("full", {"train__loss": "chunked"}),
        ("full", {"model__quant": "nf4", "train__recompute": "block"}),
        ("lora_peft", {}),
    ],
)
def test_arithmetic_and_memory_add_up(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    config = harness.config(kind, train__micro_batch=2, train__global_batch=4, **changes)
    result = harness.run(tmp_path, config)
    summary = result["summary"]
    parts = (config.model, config.train, config.method, config.engine)
    step, needed, done = (
        summary["step_ms_p50"] / 1e3,
        model_flops(*parts, padded=False),
        cost.step_flops(*parts, padded=False),
    )
    assert summary["achieved_tflops"] == pytest.approx(needed / step / 1e12)
    assert summary["mfu"] == pytest.approx(summary["achieved_tflops"] / summary["peak_tflops"])
    assert summary["hfu"] / summary["mfu"] == pytest.approx(done / needed)
    assert summary["peak_tflops"] == 0.1
    assert result["notes"]["peak_tflops"] == "hardware.tflops=0.1"
    assert summary["tokens_per_s_per_device"] == summary["tokens_per_s"] == pytest.approx(4 * 32 / step)
    assert summary["activations_bytes"] + summary["logits_bytes"] == summary["saved_bytes"]
    estimate = cost.estimate(*parts, padded=False)
    assert summary["logits_bytes"] == pytest.approx(estimate["logits"], abs=64)
    assert summary["activations_bytes"] == pytest.approx(estimate["activations"], abs=64)
    assert not any(key.startswith(("communication", "offload", "agreement", "energy")) for key in summary)
    assert "workspace_bytes" not in summary  # a CPU has no allocator that counts


def on(name: str, gib: float, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """As if this were another machine's GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    total = int(gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total))
    monkeypatch.setattr(peaks, "_measured", lambda device, precision, threads: 42e12)
    return torch.device("cuda")


def test_the_peak_is_a_datasheet_s_by_the_card_s_name_and_else_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this device, also where the run is checked against another machine by name."""
    config = harness.config(train__precision="bf16", hardware__tflops=None)
    speed, source = peaks.peak_flops(config, on("NVIDIA A800-SXM4-80GB", 79.3, monkeypatch))
    assert (speed, source.partition(":")[0]) == (312e12, "A800 SXM 80 GB in bf16")
    other = harness.config(train__precision="bf16", hardware__tflops=None, hardware__name="h100")
    assert peaks.peak_flops(other, on("NVIDIA A800-SXM4-80GB", 79.3, monkeypatch))[0] == 312e12
    speed, source = peaks.peak_flops(config, on("NVIDIA H100 NVL", 93.1, monkeypatch))
    assert speed == 42e12
    assert source.startswith("measured: torch.matmul in bf16 on this NVIDIA H100 NVL")
    turing = on("NVIDIA GeForce RTX 2080 Ti", 10.8, monkeypatch)  # whose datasheet has no bf16
    assert peaks.peak_flops(config, turing)[1].startswith("measured")
    plain = harness.config(hardware__tflops=None)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    speed, source = peaks.peak_flops(plain, on("NVIDIA A100-SXM4-80GB", 79.3, monkeypatch))
    assert speed == DEVICES["a100"].peak("tf32")
    assert "in tf32" in source


def test_a_cpu_s_peak_is_measured_once_for_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record's `mfu`, its lower bound of a step's time and a table of modules are then of one peak."""
    config = harness.config(hardware__tflops=None)
    speeds = iter((2e9, 5e9, 1e9, 4e9, 3e9, 1e9, 9e9))
    monkeypatch.setattr(peaks, "matmul_flops", lambda device, precision, seconds: next(speeds))
    peaks._measured.cache_clear()
    found = peaks.peak_flops(config, torch.device("cpu"))
    assert found.measured
    assert found.per_s == 5e9, "the fastest of six"
    assert found.source.startswith("measured: torch.matmul in fp32 on this cpu")
    assert checks.arithmetic(config, torch.device("cpu")) == (5e9, "the 0.005 TFLOP/s of this CPU in fp32")
    peaks._measured.cache_clear()


def test_what_a_gpu_is_checked_by_without_a_name_is_its_datasheet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the shares in its record are; of a machine by name that one's, which did not run."""
    config = harness.config(train__precision="bf16", hardware__tflops=None)
    gpu = on("NVIDIA A800-SXM4-80GB", 79.3, monkeypatch)
    assert checks.arithmetic(config, gpu) == (312e12, "the 312.000 TFLOP/s of this GPU in bf16")
    other = harness.config(train__precision="bf16", hardware__tflops=None, hardware__name="h100")
    assert checks.arithmetic(other, gpu)[0] == DEVICES["h100"].peak("bf16")


def test_memory_and_links_have_peaks_where_the_card_says_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """An A100 on a board of NVLink has links that are known; whether a bridge joins two of the PCIe kind, its name does
    not say. What is given in numbers counts first, beside a name it is of the machine by that name."""
    plain = harness.config()
    sxm, row = on("NVIDIA A100-SXM4-80GB", 79.3, monkeypatch), DEVICES["a100"]
    assert [found.per_s / 1e9 for found in asked(plain, sxm)] == [row.gb_per_s, row.pcie_gbps, row.gbps(1)]
    assert all(row.title in found.source and not found.measured for found in asked(plain, sxm))
    pcie = on("NVIDIA A100 80GB PCIe", 79.3, monkeypatch)
    assert [found and found.per_s / 1e9 for found in asked(plain, pcie)][:2] == [1935, row.pcie_gbps]
    assert asked(plain, pcie)[2] is None
    for device in (on("NVIDIA H100 NVL", 93.1, monkeypatch), torch.device("cpu")):
        assert asked(plain, device) == [None] * 3
    given = {"hardware__mem_gbps": 100.0, "hardware__host_gbps": 20.0, "hardware__gbps": 10.0}
    assert [found.per_s for found in asked(harness.config(**given), torch.device("cpu"))] == [100e9, 20e9, 10e9]
    named = harness.config(**given, hardware__name="rtx3090")
    assert asked(named, torch.device("cpu")) == [None] * 3


def asked(config: schema.Config, device: torch.device) -> list[Any]:
    return [peak(config, device) for peak in (peaks.memory, peaks.host_link, peaks.link)]


def test_a_product_is_timed_with_random_numbers_and_draws_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ones a GPU draws less power and is faster; a run's own random stream goes on as if nothing had been timed."""
    seen: list[torch.Tensor] = []
    product = torch.matmul

    def watched(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        seen.append(a)
        return product(a, b, out=out)

    monkeypatch.setattr(torch, "matmul", watched)
    state = torch.get_rng_state()
    assert 1e8 < peaks.matmul_flops(torch.device("cpu"), "fp32", seconds=0.01) < 1e14
    assert seen[0].std() > 0.9
    assert torch.equal(torch.get_rng_state(), state)


def test_what_an_engine_hides_has_no_time_of_its_own_and_a_note(pool: Pool, tmp_path: Path) -> None:
    """Its communication is timed once, in a step of its own, and says which phases it is a part of."""
    for engine in ("ddp", "zero2-offload"):
        overrides = [*ENGINES[engine], "train.steps=4"]
        found = pool.call("rank_runs:run", str(tmp_path / engine), overrides, None)[0]
        assert found["status"] == "ok", found["error"]
        record = Record.read(Path(found["out"]))
        assert record is not None
        assert record.summary["communication_busy_ms"] > 0
        assert record.summary["agreement_ms_p50"] > 0
        assert not {"communication_ms_p50", "offload_ms_p50", "offload_busy_ms"} & record.summary.keys()
        assert "within backward" in record.notes["communication_ms"]
        assert record.summary["tokens_per_s_per_device"] == record.summary["tokens_per_s"] / 2
        assert ("offload_ms" in record.notes) == (engine != "ddp")


def test_the_rest_of_a_gpu_s_peak_is_workspace_and_what_is_offloaded_is_not_in_it() -> None:
    """Gradients are there at the peak only where micro-batches are accumulated, or in the host's memory."""
    mib = 2**20
    held = {
        "weights": [torch.empty(mib, dtype=torch.uint8)],
        "gradients": [torch.empty(mib, dtype=torch.uint8, device="meta")],
        "optimizer": [torch.empty(2 * mib, dtype=torch.uint8)],
    }
    accounted = {"accounted_bytes": 10.0 * mib, "gradients_bytes": 1.0 * mib}
    gpu, peak = torch.device("cuda"), {"peak_gib": 12 / 1024}
    for engine, world, offloaded, rest in (
        (schema.DDP(kind="ddp"), 1, None, 3),
        (schema.DDP(kind="ddp"), 2, None, 2),
        (schema.DeepSpeed(kind="deepspeed", zero=2, offload="optimizer"), 1, 4, 6),
    ):
        config = harness.config(train__micro_batch=8 // world, engine=engine)
        found = measure.on_host(config, held, gpu)
        assert found == ({} if offloaded is None else {"offloaded_bytes": offloaded * mib})
        assert measure.workspace(config, {**accounted, **found}, peak) == {"workspace_bytes": rest * mib}
        assert measure.on_host(config, held, torch.device("cpu")) == {}
    assert measure.workspace(config, accounted, {"host_peak_gib": 1.0}) == {}


def test_peaks_are_of_the_rank_that_has_most(pool: Pool) -> None:
    """Rank 1 has more of one and less of another; that its host's mark could not be reset is said."""
    for found in pool.call("test_train_measure:most_of_both"):
        assert found == {"peak_gib": 3.0, "alloc_retries": 5.0, "host_peak_reset": 0.0}
    assert measure.over_ranks({"host_peak_gib": 1.5, "host_peak_reset": 1}) == {
        "host_peak_gib": 1.5,
        "host_peak_reset": 1.0,
    }


def most_of_both(place: Place) -> dict[str, float]:
    """Of this rank and the other."""
    first = {"peak_gib": 3.0, "alloc_retries": 0, "host_peak_reset": 1}
    return measure.over_ranks({"host_peak_reset": 0, "peak_gib": 2.0, "alloc_retries": 5} if place.rank else first)


def test_energy_is_of_all_devices_or_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 J in the 5 steps behind warm-up; of two GPUs of which one cannot be read nobody knows the sum."""
    counter = SimpleNamespace(joules=30.0, source="a counter", why={})
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    outcome: Any = SimpleNamespace(resumed_from_step=None, tokens_per_step=120)

    def told(device: torch.device, world: int = 1) -> Any:
        config = SimpleNamespace(train=SimpleNamespace(steps=6, world=world))
        loop: Any = SimpleNamespace(energy=counter, config=config, spans=SimpleNamespace(warmup=1), device=device)
        return measure._energy(loop, outcome)

    assert told(cpu) == ({"energy_j_per_step": 6.0, "tokens_per_j": 20.0}, {"energy_j_per_step": "a counter"})
    for other, expected in (([30.0, 1.0], 12.0), ([0.0, 0.0], None)):
        monkeypatch.setattr(measure.collectives, "all_reduce", lambda own, other=other: own.add_(torch.tensor(other)))
        found, notes = told(gpu, world=2)
        assert found.get("energy_j_per_step") == expected
        assert notes["energy_j_per_step"] == ("a counter" if expected else "another rank's counter cannot be read")
    counter.joules, counter.source, counter.why = 0.0, "", {"energy_j_per_step": "no package"}
    assert told(cpu) == ({}, {"energy_j_per_step": "no package"})
    counter.source, counter.why = "a counter", {}
    assert told(cpu) == ({}, {"energy_j_per_step": "did not move in 5 steps: a counter"})


def test_a_record_without_notes_is_written_as_before_there_were_any() -> None:
    record = Record(name="n", run_id="r", task="train", status="ok")
    assert '"notes"' not in record.to_json()
    record.notes["peak_tflops"] = "measured"
    assert Record.from_json(record.to_json()) == record


def test_the_peak_of_the_loss_s_share_is_of_language_models_alone(tmp_path: Path) -> None:
    config = harness.config("full", family="bert", train__steps=2)
    assert isinstance(config.model, schema.Transformer)
    summary = harness.run(tmp_path, config)["summary"]
    assert "logits_bytes" not in summary
    assert summary["mfu"] > 0
