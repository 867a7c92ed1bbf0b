"""Claims about what advice writes: it is what was predicted, or it is not written; and it runs.

Each script that runs here is started as a person would start it, in processes of its own.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmsys import compose, results, schema
from llmsys.bench.advise import emit, measured, space, torchrun
from llmsys.bench.advise.cells import Cell
from llmsys.bench.techniques import Techniques
from llmsys.cost import case, engines, shapes
from llmsys.train import zero_settings

CHOICE = Cell(
    techniques=Techniques.parse("F+R+Z2"),
    world=2,
    micro_batch=2,
    examples=4,
    accumulation=1,
    fits=True,
    tokens_per_s=1.0,
    step_ms=1.0,
    peak_bytes=1,
    capacity_bytes=2**30,
    host_bytes=0,
    host_capacity_bytes=None,
    binds="compute",
)
CARD = ["+exp=bench_advise", "model=llama_tiny", "hardware=rtx4090", "hardware.devices=2", "train.length=32"]


@functools.cache
def config(*words: str) -> schema.Config:
    """Nobody changes it."""
    return schema.build(compose.compose([*CARD, *words]))


def chosen(text: str, **changes: Any) -> Cell:
    return dataclasses.replace(CHOICE, techniques=Techniques.parse(text), **changes)


def made(text: str, *words: str) -> schema.Config:
    """What is to run."""
    return space.configured(config(*words), Techniques.parse(text), world=2, micro_batch=2, global_batch=0)


def emitted(text: str, *words: str, cuda: bool = True) -> emit.Emitted:
    return emit.files(config(*words), chosen(text), cuda=cuda)


FP32 = "model.dtype=fp32"
DEEPSPEED_JSON, FSDP_JSON = '--deepspeed="$here/ds_config.json"', '--fsdp_config="$here/fsdp.json"'
FINE = "task.stage=finetune"


@pytest.mark.parametrize(
    ("text", "words", "there", "missing"),
    [
        ("Naive", (), {"--ddp_find_unused_parameters=False"}, {"--bf16", "--fsdp", "--gradient_checkpointing"}),
        ("F+R", (FP32,), {"--bf16", "--gradient_checkpointing"}, {"--fsdp"}),
        ("F+R+Z2", (), {"--bf16", "--gradient_checkpointing", DEEPSPEED_JSON}, {"--fsdp"}),
        ("Z3+O", (FP32,), {DEEPSPEED_JSON}, {"--bf16", "--fsdp"}),
        ("Z3", ("engine=fsdp2",), {"--fsdp", FSDP_JSON}, {"--bf16", "--deepspeed"}),
        ("F+R+Z3+QL", ("engine=fsdp2", FINE), {"--fsdp"}, {"--bf16", "--gradient_checkpointing", "--deepspeed"}),
        ("Z3+O", ("engine=fsdp2",), {"--bf16", DEEPSPEED_JSON}, {"--fsdp"}),
        ("O8", (), {"--optim=adamw_bnb_8bit"}, {"--optim=adamw_torch_fused"}),
    ],
)
def test_the_line_of_trainer_says_what_was_predicted(
    text: str, words: tuple[str, ...], there: set[str], missing: set[str]
) -> None:
    """Autocast beside a bf16 model keeps fp32 copies that were not predicted. ZeRO's JSON says bf16, and so must it."""
    said = torchrun.words(made(text, *words))
    assert {"--per_device_train_batch_size=2", "--nproc_per_node=2", *there} <= set(said)
    assert not missing & {word.partition("=")[0] for word in said}


def test_fsdp2_cuts_the_weights_by_trainer_too() -> None:
    """Without its arguments the same line would be plain DDP."""
    for words, reshard in ((("engine=fsdp2",), True), (("engine=fsdp2", "engine.reshard=false"), False)):
        for text, again in (("Z3", False), ("R+Z3", True)):
            found = torchrun.fsdp(made(text, *words))
            assert found.pop("auto_wrap_policy") == "TRANSFORMER_BASED_WRAP"
            assert found == {"version": 2, "reshard_after_forward": reshard, "activation_checkpointing": again}


@pytest.mark.parametrize(
    ("text", "words", "cuda", "why"),
    [
        ("Z3", ("engine=fsdp2",), False, "accelerate's FSDP2 shards on GPUs alone"),
        ("Z3", ("engine=fsdp2", FP32), True, "gathers weights in bf16 under autocast"),
        ("F+LFA", (FINE,), True, "Trainer has no LFA"),
        ("TP2", (), True, "Trainer has no TP2"),
        ("Q8", (), True, "Trainer has no Q8"),
        ("F+L", (FINE, "method=lora"), True, "method=lora is by our own functions"),
        ("Z2", ("train.loss=chunked",), True, "Trainer has no train.loss=chunked"),
        ("Naive", ("compress=acpsgd",), True, "Trainer has no compress=acpsgd"),
        ("Z2+O", ("engine=zero2_offload", "engine.optimizer=cpu_adam"), True, "no engine.optimizer=cpu_adam"),
    ],
)
def test_what_no_script_of_trainer_s_does_is_our_own_command_alone(
    text: str, words: tuple[str, ...], cuda: bool, why: str
) -> None:
    assert why in torchrun.why_not(made(text, *words), cuda=cuda)
    if text == "TP2":
        assert set(emitted(text, *words, cuda=cuda).texts) == {"run.sh"}


def test_what_trainer_s_ddp_takes_beside_is_said_and_has_to_fit() -> None:
    """Its gradients are no views into its buckets, as ours are."""
    assert torchrun.more_bytes(made("Naive"), 7) == 7
    assert torchrun.more_bytes(made("Z2"), 7) == 0
    gradients = 2 * shapes.num_params(config().model)
    assert f"{gradients / 2**30:.3g} GiB of a device more" in emitted("Naive").texts["torchrun.sh"]
    tight = chosen("Naive", peak_bytes=2**30 - 1)
    found = emit.files(config(), tight, cuda=True)
    assert "which do not fit" in found.why_not["torchrun.sh"]
    assert set(emit.files(config(), dataclasses.replace(tight, techniques=CHOICE.techniques), cuda=True).texts) == {
        *("run.sh", "torchrun.sh", "ds_config.json")
    }


def calls(told: list[str], name: str) -> dict[str, Any]:
    """The arguments of a call that a script is told to make."""
    (found,) = [
        node
        for each in told
        if each.startswith("  ")
        for node in ast.walk(ast.parse(f"dict({each.strip()})"))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]
    return {str(each.arg): ast.literal_eval(each.value) for each in found.keywords}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_4_bit_base_and_its_adapters_are_described_as_ours_are(dtype: str) -> None:
    """Scales quantised in turn, packed under the model's dtype, which engines that cut it need; all of LoRA's own."""
    told = torchrun.to_load(made("Z2+QL", FINE, f"model.dtype={dtype}", "method.r=4", "method.dropout=0.1"))
    assert calls(told, "BitsAndBytesConfig") == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": {"bf16": "bfloat16", "fp32": "float32"}[dtype],
    }
    assert calls(told, "LoraConfig") == {
        "r": 4,
        "lora_alpha": 128.0,
        "lora_dropout": 0.1,
        "target_modules": "all-linear",
    }
    assert any("autocast_adapter_dtype=True" in each for each in told)
    narrow = torchrun.to_load(made("Z2+QL", FINE, "method.dtype=model", "method.targets=[q_proj]"))
    assert any("autocast_adapter_dtype=False" in each for each in narrow)
    assert calls(narrow, "LoraConfig")["target_modules"] == ["q_proj"]


def test_of_an_earlier_choice_nothing_is_left(tmp_path: Path) -> None:
    for text, words in (("F+Z2", ()), ("Z3", ("engine=fsdp2",)), ("TP2", ())):
        found = emitted(text, *words)
        emit.write(found, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {*found.texts, emit.WRITTEN}
        named = {name for name in found.texts if f'"$here/{name}"' in found.texts.get("torchrun.sh", "")}
        assert set(found.texts) - {"run.sh", "torchrun.sh"} == named


def test_what_somebody_else_has_written_stays(tmp_path: Path) -> None:
    """Said before anything is predicted: a file of one's own by that name, and one of ours that was changed since."""
    emit.check(str(tmp_path / "new"))
    emit.write(emitted("F+Z2"), tmp_path)
    emit.check(str(tmp_path))
    (tmp_path / "run.sh").write_text("mine")
    with pytest.raises(ValueError, match=rf"task\.emit={tmp_path}: run\.sh there is not as an answer has left it"):
        emit.check(str(tmp_path))
    with pytest.raises(ValueError, match=r"run\.sh: is a file; it is a folder"):
        emit.check(str(tmp_path / "run.sh"))
    assert (tmp_path / "run.sh").read_text() == "mine"


def test_buckets_are_emitted_as_large_as_memory_was_predicted_with() -> None:
    """The cost model imports nothing of the trainer, so the number stands in both."""
    assert engines.BUCKET == zero_settings.BUCKET
    settings = json.loads(emitted("Z3").texts["ds_config.json"])
    assert settings["zero_optimization"]["reduce_bucket_size"] == shapes.num_params(config().model)


OWN = """# @package _global_
# An experiment of one's own, with another model than any of ours.
defaults:
  - override /task: bench_advise
  - override /model: llama_tiny
  - override /engine: ddp
  - override /hardware: a800x8
  - override /dispatch: inline
  - _self_
name: mine
model: {num_layers: 3, intermediate_size: 128, dropout: 0.1, dtype: bf16}
train: {micro_batch: 1, global_batch: 1, length: 40, precision: bf16, loss: chunked, clip: 0.5}
data: {kind: synthetic_pairs}
"""


def composed(found: schema.Config, text: str) -> tuple[schema.Config, schema.Config]:
    """(what is to run, what our own command of it composes to)."""
    want = space.configured(found, Techniques.parse(text), world=2, micro_batch=3, global_batch=0)
    said = emit.files(found, chosen(text, micro_batch=3), cuda=True)
    assert "run.sh" not in said.why_not, said.why_not
    exec_, python, m, llmsys, *words, rest = shlex.split(said.texts["run.sh"].splitlines()[-1])
    assert (exec_, python, m, llmsys, rest) == ("exec", "python", "-m", "llmsys", "$@")
    return want, schema.build(compose.compose(words))


def agree(want: schema.Config, found: schema.Config) -> None:
    for group in ("model", "method", "engine", "network", "compress"):
        assert getattr(found, group) == getattr(want, group), group
    for key in (*measured.STEP, "clip"):
        assert getattr(found.train, key) == getattr(want.train, key), key
    assert case.padded(found) == case.padded(want)
    assert found.data.kind == want.data.kind


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("F+R+Z3+O", ("model.num_layers=3",)),
        ("Z2+QLFA", (FINE, "method.r=4")),
        ("F+TP2+L", (FINE, "method.targets=[q_proj,v_proj]")),
        ("F+L", (FINE, "method=lora", "method.share_a=true", "model.attention=flash_attention_2")),
        ("F+R", (FINE, "data=code_docstrings", "data.packages=[json]")),
        ("Z3", ("engine=fsdp2", "engine.reshard=false", "network=eth1g", "network.delay_ms=2.5")),
        ("Z2+O", ("engine=zero2_offload", "engine.optimizer=cpu_adam", "train.loss=chunked")),
        ("Naive", ("compress=acpsgd", "compress.r=2", "engine.bucket_mib=5")),
        ("Naive", ("model=t5_tiny", "data=alpaca_lengths", "train.target_length=16")),
    ],
)
def test_our_own_command_composes_to_what_was_chosen(text: str, words: tuple[str, ...]) -> None:
    want, found = composed(config(*words), text)
    agree(want, found)
    if "+L" in text or "QL" in text:
        assert want.data.kind == "synthetic_pairs", "what is predicted is fine-tuned on rows that are padded"


def test_a_model_that_a_file_of_one_s_own_has_changed_is_emitted_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "mine.yaml").write_text(OWN)
    own = schema.build(compose.compose([f"hydra.searchpath=[file://{tmp_path}]", "+exp=mine"]))
    want, found = composed(own, "F+Z2")
    agree(want, found)
    assert (found.model.num_layers, found.model.dropout, found.train.clip) == (3, 0.1, 0.5)  # type: ignore[attr-defined]


def test_a_config_that_a_program_has_made_is_emitted_as_it_is() -> None:
    """No word of a command line says what it is, and its model has no file."""
    shape = dataclasses.replace(config().model, name="mine, of 3", num_layers=3, hidden_size=96, max_length=40)  # type: ignore[call-arg]
    want, found = composed(dataclasses.replace(config(), command=[], model=shape), "F+R+Z2")
    agree(want, found)


def test_a_model_of_a_config_json_is_emitted_by_that_file(tmp_path: Path) -> None:
    """By all of its shape, where a program has changed it; and not at all where only predictions know it."""
    shape = {"model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 176,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    words = ["+exp=bench_advise", f"model.config={tmp_path}", "hardware=rtx4090", "hardware.devices=2"]
    asked = schema.build(compose.compose([*words, "train.length=32"]))
    want, found = composed(asked, "Z2")
    agree(dataclasses.replace(want, model=dataclasses.replace(want.model, config=found.model.config)), found)  # type: ignore[attr-defined,call-arg]
    cut = dataclasses.replace(asked, command=[], model=dataclasses.replace(asked.model, num_layers=1))  # type: ignore[call-arg]
    want, found = composed(cut, "Z2")
    assert found.model.num_layers == 1  # type: ignore[attr-defined]
    (tmp_path / "config.json").write_text(json.dumps({**shape, "model_type": "qwen3"}), encoding="utf-8")
    there = emit.files(schema.build(compose.compose([*words, "train.length=32"])), chosen("Z2"), cuda=True)
    assert "predicted" in there.why_not["run.sh"]
    assert set(there.texts) == {"torchrun.sh", "ds_config.json"}, "which Trainer builds"


LIMIT_S = 1500
"""On a CPU DeepSpeed compiles an operator of its own where it is first used, a minute on an idle core. Stopped in
between it begins again."""
runs = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S + 60)]
DEEPSPEED = """
import argparse, json, torch, deepspeed, deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # all-reduce on a CPU, which it would compile first
parser = argparse.ArgumentParser()
parser.add_argument("--deepspeed")
path = parser.parse_known_args()[0].deepspeed
deepspeed.init_distributed("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 1))
before = [p.clone() for p in model.parameters()]
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=path)
rows = engine.train_micro_batch_size_per_gpu()
loss = engine(torch.ones(rows, 16, dtype=next(engine.parameters()).dtype)).float().pow(2).mean()
engine.backward(loss)
engine.step()
moved = any(not torch.equal(a, b.to(a.dtype)) for a, b in zip(before, engine.module.parameters()))
if torch.distributed.get_rank() == 0:
    print(json.dumps({"stage": engine.zero_optimization_stage(), "rows": rows, "moved": moved}))
"""
BASE = """
import json, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, HfArgumentParser, TrainingArguments
(settings,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
model = AutoModelForCausalLM.from_pretrained("BASE", LOADING)
rows = (torch.arange(16) + torch.arange(16)[:, None]) % 64
"""
TRAINER = (
    BASE
    + """
import deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
from transformers import Trainer
if "ADAPTER":
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(model, ADAPTER)
trainer = Trainer(model, settings, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
done = trainer.train()
if trainer.is_world_process_zero():
    wrapped = trainer.model_wrapped
    stage = wrapped.zero_optimization_stage() if hasattr(wrapped, "zero_optimization_stage") else -1
    found = {"steps": done.global_step, "loss": done.training_loss, "stage": stage, "ranks": trainer.args.world_size}
    found["kind"] = type(wrapped).__name__
    found["dtypes"] = sorted({str(p.dtype) for p in model.parameters() if p.is_floating_point()})
    print(json.dumps(found))
"""
)
FSDP = (
    BASE
    + """
from types import SimpleNamespace
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import fsdp_utils
from torch.distributed.tensor import DTensor
settings.device  # joins the ranks
plugin = FullyShardedDataParallelPlugin(**settings.fsdp_plugin_args)
state = SimpleNamespace(fsdp_plugin=plugin)
there = dict(torch_device_mesh=None, mixed_precision="bf16" if settings.bf16 else "no", device=torch.device("cpu"))
accelerator = SimpleNamespace(state=state, is_main_process=False, **there)
plugin.set_auto_wrap_policy(model)
if plugin.activation_checkpointing:
    fsdp_utils.fsdp2_apply_ac(accelerator, model)
model = fsdp_utils.fsdp2_prepare_model(accelerator, model)
model(input_ids=rows[:2], labels=rows[:2], use_cache=settings.use_cache).loss.backward()
cut = [isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in model.parameters()]
again = any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules())
dtypes = sorted({str(p.dtype) for p in model.parameters()})
if torch.distributed.get_rank() == 0:
    print(json.dumps({"cut": all(cut), "again": again, "dtypes": dtypes, "version": plugin.fsdp_version}))
"""
)


def written(tmp_path: Path, text: str, *words: str, cuda: bool = False, **changes: Any) -> Path:
    """A folder with what is written of the choice for a tiny model."""
    found = emit.files(config(*words), chosen(text, **changes), cuda=cuda)
    emit.write(found, tmp_path / "emitted")
    return tmp_path / "emitted"


def script(folder: Path, program: str) -> str:
    """`program` as a file, with what `torchrun.sh` says above its line in its places, and a tiny base for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(shape).save_pretrained(folder / "base")
    said = [
        each.removeprefix("#   ") for each in (folder / "torchrun.sh").read_text().splitlines() if each[:4] == "#   "
    ]
    loading, adapter = (*said, "")[:2]
    filled = program.replace('"ADAPTER"', repr(bool(adapter))).replace("ADAPTER", adapter or "None")
    (folder / "train.py").write_text(filled.replace("LOADING", loading).replace("BASE", str(folder / "base")))
    return str(folder / "train.py")


def started(folder: Path, name: str, *words: str) -> str:
    """The standard output of a script that was written; its `python` and `torchrun` are this environment's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    here = {"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    with subprocess.Popen(
        ["bash", str(folder / name), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **here},
        cwd=folder.parent,
        start_new_session=True,
    ) as running:
        try:
            out, err = running.communicate(timeout=LIMIT_S)
        except BaseException:
            os.killpg(running.pid, signal.SIGTERM)  # torchrun then ends its ranks, which have sessions of their own
            running.wait(30)
            raise
    assert running.returncode == 0, err[-8000:]
    return out


def last(text: str) -> dict[str, Any]:
    """The JSON object that a program has said."""
    (found,) = [each for each in text.splitlines() if each.startswith('{"')]
    return dict(json.loads(found))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("F+R+Z2", (), marks=runs),
        pytest.param("Naive", ("model.num_layers=1",), marks=runs),
        pytest.param("Z3", ("engine=fsdp2",), marks=runs),
        pytest.param("F+QL", (FINE, "method.r=4"), marks=runs),
    ],
)
def test_our_own_command_trains_what_was_chosen(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    folder = written(tmp_path, text, *words)
    short = ["train.steps=3", "profile.warmup=1", "data.num_examples=24", "train.threads=1"]
    started(folder, "run.sh", *short, f"results={folder.parent / 'results'}")
    (record,) = results.read(folder.parent / "results")
    assert record.status == "ok"
    trained = schema.build(record.config)
    assert Techniques.of(trained) == Techniques.parse(text)
    assert (trained.train.world, trained.train.micro_batch, trained.train.length) == (2, 2, 32)
    agree(made(text, *words), trained)


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 60)
def test_deepspeed_reads_its_settings_and_takes_a_step(tmp_path: Path) -> None:
    """By nobody's help: sizes stand there as numbers."""
    folder = written(tmp_path, "F+R+Z2")
    (folder / "step.py").write_text(DEEPSPEED)
    said = last(started(folder, "torchrun.sh", str(folder / "step.py")))
    assert said == {"stage": 2, "rows": 2, "moved": True}


@pytest.mark.parametrize(
    ("text", "words", "want"),
    [
        pytest.param("F+R+Z2", (), {"stage": 2, "dtypes": ["torch.bfloat16"]}, marks=runs),
        pytest.param("Naive", (), {"kind": "DistributedDataParallel", "dtypes": ["torch.bfloat16"]}, marks=runs),
        pytest.param(
            "F+R+QL",
            (FINE, "method.r=4", "method.dropout=0.1"),
            {"kind": "DistributedDataParallel", "dtypes": ["torch.bfloat16", "torch.float32"]},
            marks=runs,
        ),
    ],
)
def test_hugging_face_s_trainer_trains_with_the_line(
    text: str, words: tuple[str, ...], want: dict[str, Any], tmp_path: Path
) -> None:
    """It refuses arguments that differ from DeepSpeed's JSON, so they do not. What it loads is what comments say."""
    folder = written(tmp_path, text, *words)
    own = ["--output_dir", str(folder / "out"), "--max_steps", "2", "--use_cpu", "--save_strategy", "no"]
    said = last(started(folder, "torchrun.sh", script(folder, TRAINER), *own, "--report_to", "none"))
    assert (said["steps"], said["ranks"]) == (2, 2)
    assert said["loss"] > 0
    assert {key: said[key] for key in want} == want


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("text", ["R+Z3", "F+Z3"])
def test_what_trainer_hands_to_accelerate_cuts_every_weight(text: str, tmp_path: Path) -> None:
    """By accelerate's own functions: its FSDP needs GPUs, and on a CPU Trainer would leave it out without a word."""
    folder = written(tmp_path, text, "engine=fsdp2", cuda=True)
    said = last(started(folder, "torchrun.sh", script(folder, FSDP), "--output_dir", str(folder / "out"), "--use_cpu"))
    assert said == {"cut": True, "again": "R" in text, "dtypes": ["torch.bfloat16"], "version": 2}


@pytest.mark.gpu
@pytest.mark.timeout(LIMIT_S + 60)
def test_on_gpus_trainer_cuts_the_weights(tmp_path: Path) -> None:
    import torch

    ranks = torch.cuda.device_count()
    folder = written(tmp_path, "F+Z3", "engine=fsdp2", f"hardware.devices={ranks}", cuda=True, world=ranks)
    own = ["--output_dir", str(folder / "out"), "--max_steps", "2", "--save_strategy", "no", "--report_to", "none"]
    said = last(started(folder, "torchrun.sh", script(folder, TRAINER), *own))
    assert (said["steps"], said["ranks"], said["dtypes"]) == (2, ranks, ["torch.bfloat16"])
    assert said["kind"].startswith("FSDP")
