"""What cannot run says so before anything is loaded: what it needs, what was found, what would run instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import train_harness as harness

from llmsys.errors import Refused
from llmsys.train import checks

CPU = torch.device("cpu")


def test_a_missing_rate_names_its_key(tmp_path: Path) -> None:
    """Never another method's rate in its place; and it is found before the data is read."""
    config = harness.config("lora_peft", data__kind="synthetic")
    del config.train.lr_by_method["lora_peft"]
    config.data.kind, config.data.path = "jsonl", "there is no such file"
    with pytest.raises(ValueError, match=r"train\.lr_by_method\.lora_peft"):
        harness.run(tmp_path, config)


def test_the_rate_is_the_method_s_times_the_scale() -> None:
    assert checks.learning_rate(harness.config("lorafa_peft", train__lr_scale=2.0)) == 1e-2


def test_too_little_memory_is_refused_with_what_would_run(tmp_path: Path) -> None:
    """Named by kind and in GiB; the commands are whole, and the truncated model really fits."""
    config = harness.config("lora_peft", name="lorafa_llama7b", smoke=["model=llama_tiny", "train.steps=2"])
    config.model.num_layers, config.hardware.mem_gib = 64, 0.02
    config.model.weights = "/no/such/folder"  # weights come last, so nobody misses them
    with pytest.raises(Refused) as refused:
        harness.run(tmp_path, config)
    message = str(refused.value)
    assert refused.value.reason == "memory"
    for part in ("weights", "gradients", "optimizer", "activations", "logits", "GiB", "hardware.mem_gib=0.02"):
        assert part in message
    command = "  python -m llmsys +exp=lorafa_llama7b data=synthetic method=lora_peft"
    lines = message.splitlines()
    assert f"{command} model=llama_tiny train.steps=2" in lines
    assert f"{command} model.weights=/no/such/folder force=true   # in spite of this" in lines
    found = re.search(r"model\.num_layers=(\d+)", message)
    assert found
    config.model.num_layers, config.model.weights = int(found[1]), "random"
    assert checks.check_memory(config, CPU) <= 0.02 * 2**30


def test_without_an_experiment_the_command_names_model_and_data() -> None:
    """Else it would run the default model, not the one that was refused."""
    config = harness.config(hardware__mem_gib=1e-6, model__name="llama_tiny")
    command = "python -m llmsys model=llama_tiny data=synthetic method=full model.weights=random force=true"
    with pytest.raises(Refused, match=command):
        checks.check_memory(config, CPU)


def test_too_much_time_on_a_cpu_is_refused() -> None:
    """`train.steps=<n>` in the message is a number that passes."""
    config = harness.config(train__steps=10**6, hardware__tflops=0.001)
    with pytest.raises(Refused, match=r"hours(.|\n)*force=true") as refused:
        checks.check_time(config, CPU)
    assert refused.value.reason == "time"
    found = re.search(r"train\.steps=(\d+)", str(refused.value))
    assert found
    assert checks.check_time(harness.config(train__steps=int(found[1]), hardware__tflops=0.001), CPU) > 0


def test_force_runs_in_spite_of_both() -> None:
    config = harness.config(train__steps=10**6, hardware__tflops=1e-3, force=True)
    config.hardware.mem_gib = 1e-6
    assert checks.check_memory(config, CPU) > 0
    assert checks.check_time(config, CPU) > 0


def test_memory_found_is_the_least_of_host_and_container(tmp_path: Path) -> None:
    """In a container MemAvailable is the whole machine's."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 64 kB\nMemAvailable:       32 kB\n")
    assert checks.host_available(tmp_path) == 32 * 1024
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("10240\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("2048\n")
    assert checks.host_available(tmp_path) == 8192
    (tmp_path / "sys/fs/cgroup/memory.stat").write_text("anon 1024\ninactive_file 1024\n")
    assert checks.host_available(tmp_path) == 9216, "pages of files are dropped when memory is asked for"
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert checks.host_available(tmp_path) == 32 * 1024


def test_matmul_speed_is_measured() -> None:
    """Some order of magnitude between a pocket calculator and a GPU."""
    assert 1e8 < checks.matmul_flops(CPU, "fp32", seconds=0.02) < 1e14
