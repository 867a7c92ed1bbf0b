"""Claims about what advice writes: it runs. Each is started as a person would start it, in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmsys import compose, results, schema
from llmsys.bench.advise import emit
from llmsys.bench.advise.cells import Cell
from llmsys.bench.techniques import Techniques

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
    capacity_bytes=2,
    host_bytes=0,
    host_capacity_bytes=None,
    binds="compute",
)
LIMIT_S = 1500
"""On a CPU DeepSpeed compiles an operator of its own where it is first used, a minute on an idle core. Stopped in
between it begins again."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S + 60)]
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
TRAINER = """
import json, torch, deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaConfig, Trainer, TrainingArguments
(settings,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
shape = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
model = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa", dtype=torch.bfloat16)
rows = (torch.arange(16) + torch.arange(16)[:, None]) % 64
trainer = Trainer(model, settings, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
done = trainer.train()
if trainer.is_world_process_zero():
    stage = trainer.model_wrapped.zero_optimization_stage()
    print(json.dumps({"steps": done.global_step, "loss": done.training_loss, "stage": stage}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What is written of the choice for a tiny model."""
    words = ["+exp=bench_advise", "model=llama_tiny", "hardware=rtx4090", "hardware.devices=2", "train.length=32"]
    config = schema.build(compose.compose(words))
    emit.write(emit.files(config, CHOICE, cuda=False), tmp_path / "emitted")
    return tmp_path / "emitted"


def started(folder: Path, script: str, *words: str) -> str:
    """The standard output of a script that was written; its `python` and `torchrun` are this environment's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    here = {"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    with subprocess.Popen(
        ["bash", str(folder / script), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **here},
        cwd=folder.parent,
        start_new_session=True,
    ) as made:
        try:
            out, err = made.communicate(timeout=LIMIT_S)
        except BaseException:
            os.killpg(made.pid, signal.SIGTERM)  # torchrun then ends its ranks, which have sessions of their own
            made.wait(30)
            raise
    assert made.returncode == 0, err[-3000:]
    return out


def last(text: str) -> dict[str, float]:
    """The JSON object that a program has said."""
    (line,) = [each for each in text.splitlines() if each.startswith('{"')]
    return dict(json.loads(line))


def test_our_own_command_trains_what_was_chosen(folder: Path) -> None:
    short = ["train.steps=3", "profile.warmup=1", "data.num_examples=24", "train.threads=1"]
    started(folder, "run.sh", *short, f"results={folder.parent / 'results'}")
    (record,) = results.read(folder.parent / "results")
    assert record.status == "ok"
    made = schema.build(record.config)
    assert Techniques.of(made) == CHOICE.techniques
    assert (made.train.world, made.train.micro_batch, made.train.length) == (2, 2, 32)


def test_deepspeed_reads_its_settings_and_takes_a_step(folder: Path) -> None:
    """By nobody's help: sizes stand there as numbers."""
    (folder / "step.py").write_text(DEEPSPEED)
    said = last(started(folder, "torchrun.sh", str(folder / "step.py")))
    assert said == {"stage": 2, "rows": 2, "moved": True}


def test_hugging_face_s_trainer_trains_with_the_line_and_the_settings(folder: Path) -> None:
    """It refuses arguments that differ from the JSON, so they do not."""
    (folder / "train.py").write_text(TRAINER)
    own = ["--output_dir", str(folder / "out"), "--max_steps", "2", "--use_cpu", "--save_strategy", "no"]
    said = last(started(folder, "torchrun.sh", str(folder / "train.py"), *own, "--report_to", "none"))
    assert (said["steps"], said["stage"]) == (2, 2)
    assert said["loss"] > 0
