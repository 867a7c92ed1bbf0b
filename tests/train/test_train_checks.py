"""What cannot run says so before anything is loaded: what it needs, what was found, what would run instead."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import train_harness as harness

from llmsys import compose, schema
from llmsys.cost import case
from llmsys.errors import Contradiction, Refused
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
    """Named by kind and unit; the commands are whole, and the truncated model really fits."""
    config = harness.config("lora_peft", name="lorafa_llama7b", smoke=["model=llama_tiny", "train.steps=2"])
    config.model.num_layers, config.hardware.mem_gib = 64, 0.02
    config.model.weights = "/no/such/folder"  # weights come last, so nobody misses them
    with pytest.raises(Refused) as refused:
        harness.run(tmp_path, config)
    message = str(refused.value)
    assert refused.value.reason == "memory"
    for part in ("weights", "gradients", "optimizer", "activations", "logits", "MiB", "hardware.mem_gib=0.02"):
        assert part in message
    assert " 0.00" not in message, "a tiny run's kinds are told in KiB"
    command = "  python -m llmsys +exp=lorafa_llama7b data=synthetic method=lora_peft"
    lines = message.splitlines()
    assert f"{command} model=llama_tiny train.steps=2" in lines
    assert f"{command} model.weights=/no/such/folder force=true   # in spite of this" in lines
    found = re.search(r"model\.num_layers=(\d+)", message)
    assert found
    config.model.num_layers, config.model.weights = int(found[1]), "random"
    assert checks.check_memory(config, CPU) <= 0.02 * 2**30


def test_what_would_run_is_what_was_typed_with_a_change() -> None:
    """Nothing typed is lost, what is changed stands once, and a shell hands on what Hydra reads. A smoke that chooses
    another model takes the model's own settings with it."""
    words = ["+exp=lorafa_llama7b", "method.r=64", "model.num_layers=8", "train.length=256", "data.labels=[a b,'c$']"]
    config = schema.build(compose.compose([*words, "results=elsewhere", "train.recompute='mlp:4,none:4'"]))
    lean = dataclasses.replace(config, train=dataclasses.replace(config.train, recompute="block"))
    config.hardware.mem_gib = sum(checks.kinds_and_peak(each, CPU)[1] for each in (config, lean)) / 2 / 2**30
    with pytest.raises(Refused) as refused:
        checks.check_memory(config, CPU)
    lines = [line.strip() for line in str(refused.value).splitlines() if line.startswith("  ")]
    offered = [compose.compose(shlex.split(line, comments=True)[3:]) for line in lines]
    assert len(offered) == 4, "the smoke, more computed again, fewer blocks, and force"
    for found in offered:
        assert len({word.partition("=")[0] for word in found["command"]}) == len(found["command"])
        assert (found["method"]["r"], found["results"], found["data"]["labels"]) == (64, "elsewhere", ["a b", "c$"])
    smoke, again, fewer, forced = offered
    assert smoke["model"]["num_layers"] == compose.compose(["model=llama_tiny"])["model"]["num_layers"]
    assert (again["train"]["recompute"], again["model"]["num_layers"]) == ("auto", 8)
    assert fewer["train"] == {**forced["train"], "recompute": "mlp"}
    assert fewer["model"] == {**forced["model"], "num_layers": fewer["model"]["num_layers"]}
    assert forced == compose.compose([*config.command, "results=elsewhere", "force=true"])


def test_without_an_experiment_the_command_names_model_and_data() -> None:
    """Else it would run the default model, not the one that was refused."""
    config = harness.config(hardware__mem_gib=1e-6, model__name="llama_tiny")
    command = "python -m llmsys model=llama_tiny data=synthetic method=full model.weights=random force=true"
    with pytest.raises(Refused, match=command):
        checks.check_memory(config, CPU)


def test_too_much_time_on_a_cpu_is_refused() -> None:
    """`train.steps=<n>` in the message is a number that passes."""
    config = harness.config(train__steps=10**6, hardware__tflops=0.001)
    with pytest.raises(Refused, match=r"hours at hardware\.tflops=0\.001(.|\n)*force=true") as refused:
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


def together(**groups: Any) -> schema.Config:
    """A config with several groups replaced at once, of which one alone would not fit the others."""
    return dataclasses.replace(harness.config(), **groups)


def ranks(world: int, **groups: Any) -> schema.Config:
    train = schema.Train(world=world, micro_batch=8 // world, length=32, lr_by_method={"full": 1e-3})
    return together(engine=schema.DDP(kind="ddp"), train=train, **groups)


def test_a_convnet_is_checked_and_offered_fewer_images_at_once() -> None:
    """Its settings have no depth. What is offered fits."""
    model = schema.ConvNet(kind="convnet", family="resnet", name="tiny_resnet")
    config = together(model=model, data=schema.Data(kind="digits"))
    need = checks.check_memory(config, CPU)
    assert checks.check_time(config, CPU) > 0
    config.hardware.mem_gib = 0.6 * need / 2**30
    with pytest.raises(Refused, match=r"train\.micro_batch=\d") as refused:
        checks.check_memory(config, CPU)
    found = re.search(r"train\.micro_batch=(\d+)", str(refused.value))
    assert found
    config.train.micro_batch = int(found[1])
    assert checks.check_memory(config, CPU) < need


def test_ranks_share_the_memory_of_a_host() -> None:
    """Four need four times their share; on a GPU by name each has its own."""
    alone = checks.check_memory(harness.config(), CPU)
    share = checks.check_memory(ranks(4), CPU)
    assert share < alone
    with pytest.raises(Refused, match=r"each of 4 ranks(.|\n)*engine=ddp train\.world=4"):
        checks.check_memory(ranks(4, hardware=schema.Hardware(mem_gib=3.9 * share / 2**30)), CPU)
    assert checks.check_memory(ranks(4, hardware=schema.Hardware(mem_gib=4.1 * share / 2**30)), CPU) == share
    own = checks.check_memory(ranks(4, hardware=schema.Hardware(name="rtx3090")), CPU)
    assert own > share, "a GPU has a workspace, too"
    named = schema.Hardware(name="rtx3090", mem_gib=1.01 * own / 2**30)
    assert checks.check_memory(ranks(4, hardware=named), CPU) == own


def test_a_machine_by_name_is_asked_instead_of_this_one() -> None:
    """Memory and peak are its own, the peak that of the precision, and a refusal says whose they are."""
    deep = {"model__hidden_size": 4096, "model__intermediate_size": 11008, "model__num_layers": 32}
    with pytest.raises(Refused, match=r"hardware\.name=rtx3090: GeForce RTX 3090 has 23\.69 GiB"):
        checks.check_memory(harness.config(**deep, hardware__name="rtx3090"), CPU)
    there = {"hardware__name": "a100", "hardware__tflops": None}
    slow = checks.check_time(harness.config(**there), CPU)
    fast = checks.check_time(harness.config(**there, train__precision="bf16"), CPU)
    assert slow / fast == pytest.approx(312 / 19.5)
    with pytest.raises(ValueError, match=r"train\.precision=bf16"):
        checks.check_time(harness.config(**{**there, "hardware__name": "rtx2080ti"}, train__precision="bf16"), CPU)
    with pytest.raises(Refused, match=r"A100 SXM 80 GB in fp32"):
        checks.check_time(harness.config(**there, train__steps=10**9), CPU)
    with pytest.raises(ValueError, match=r"hardware\.name=rtx9"):
        checks.check_memory(harness.config(hardware__name="rtx9"), CPU)


def test_a_slow_link_is_the_least_time_of_a_step() -> None:
    """At 1 Mbit/s the gradients take longer than all arithmetic."""
    fast = checks.check_time(ranks(2), CPU)
    slow = checks.check_time(ranks(2, network=schema.Network(up_mbit=1.0, down_mbit=1.0)), CPU)
    gradients = checks.kinds_and_peak(ranks(2), CPU)[0]["gradients"]
    assert fast < slow == pytest.approx(gradients * 8 / 1e6 * 1e3)


@pytest.mark.parametrize(
    ("family", "data", "expected"),
    [
        ("llama", {"kind": "synthetic"}, False),
        ("llama", {"kind": "code_docstrings"}, True),
        ("t5", {"kind": "code_docstrings"}, True),
        ("bert", {"kind": "code_packages", "labels": ["a", "b"]}, True),
        ("llama", {"kind": "hub", "path": "x", "columns": {"text": "t"}}, False),
        ("llama", {"kind": "hub", "path": "x", "columns": {"source": "a", "target": "b"}}, True),
        ("bert", {"kind": "hub", "path": "x", "columns": {"text": "t", "label": "l"}}, True),
    ],
)
def test_data_that_is_not_packed_is_padded(family: str, data: dict[str, Any], expected: bool) -> None:
    config = together(data=schema.Data(**data), model=schema.Transformer(family=family))
    assert case.padded(config) == expected
    assert checks.check_memory(config, CPU) > 0


def test_the_command_instead_of_a_run_on_hub_data_keeps_its_columns() -> None:
    data = schema.Data(kind="hub", path="sst2", columns={"text": "sentence", "label": "label"})
    config = together(data=data, model=schema.Transformer(family="bert"), hardware=schema.Hardware(mem_gib=1e-6))
    with pytest.raises(Refused, match=r"'data\.columns=\{text: sentence, label: label\}' .*data\.path=sst2"):
        checks.check_memory(config, CPU)


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


def test_8_bit_floats_are_refused_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU by its compute capability: 8.9 is Ada, 9.0 Hopper; Ampere's 8.6 has none, and the message says both."""
    config, gpu = harness.config(train__fp8=True), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3090")
    for capability, runs in (((8, 6), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        if runs:
            checks.formats(config, gpu)
        else:
            with pytest.raises(Contradiction, match=r"capability 8\.9 or later.*this NVIDIA GeForce RTX 3090 has 8\.6"):
                checks.formats(config, gpu)
    with pytest.raises(Contradiction, match="this run is on a CPU"):
        checks.formats(config, CPU)
    checks.formats(harness.config(), CPU)


@pytest.mark.parametrize(
    ("library", "overrides", "extra"),
    [
        ("sacrebleu", ["model=t5_tiny", "data=code_docstrings"], "train"),
        ("bitsandbytes", ["model.quant=nf4", "method=lora_peft"], "train"),
        ("deepspeed", ["engine=zero2"], "deepspeed"),
    ],
)
def test_a_missing_library_is_named_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, library: str, overrides: list[str], extra: str
) -> None:
    config = schema.build(compose.compose(overrides))
    checks.libraries(config)
    monkeypatch.setattr(sys, "path", [])
    for name in list(sys.modules):
        if name.split(".")[0] == library:
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(LookupError, match=rf"{library}: pip install 'llmsys\[{extra}\]'"):
        checks.libraries(config)
