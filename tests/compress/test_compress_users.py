"""What a user copies works as it stands, and with torch alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import alone
import llmsys.compress

EXAMPLES = Path(__file__).parents[2] / "examples"
CODE = """
import llmsys.compress
assert "torch" not in sys.modules
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from llmsys.compress import *
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
def train(method):
    model = DistributedDataParallel(torch.nn.Linear(40, 30), bucket_cap_mb=0.001)
    state = register(model, CompressConfig(method=method, r=2))
    model(torch.randn(5, 40)).square().mean().backward()
    return model, state
for method in ("none", "sign", "efsign", "topk", "randomk", "powersgd"):
    train(method)
model, state = train("acpsgd")
save_state(state, "out")
load_state(state, "out")
aggregator = Aggregator(model.module.named_parameters(), CompressConfig())
aggregator.aggregate([p.grad for p in model.parameters()])
x = torch.randn(3, 40, 50)
assert decode(encode(x, CompressConfig())).shape == x.shape
"""


def test_torch_and_safetensors_are_enough(tmp_path: Path) -> None:
    assert "safetensors" in alone.run(CODE, tmp_path)


def example(name: str, ranks: int, folder: Path) -> list[float]:
    """Runs an example, and gives the losses that it says. Lightning starts its ranks itself; the others are started by
    torchrun."""
    launcher = [] if name == "lightning" else ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *launcher, str(EXAMPLES / f"compress_{name}.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return [float(x) for x in re.findall(r"(?<!train_)loss'?:? '?(\d+\.\d+)", done.stdout)]


FOLDERS = {
    "trainer": ["out/checkpoint-10", "out/checkpoint-20"],
    "accelerate": ["out"],
    "fsdp2": ["out/shard-0", "out/shard-1"],
}
RANKS = {"compress-rank-0.safetensors", "compress-rank-1.safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), [("trainer", 2), ("accelerate", 2), ("lightning", 2), ("fsdp2", 4)])
def test_the_examples_learn(name: str, ranks: int, tmp_path: Path) -> None:
    losses = example(name, ranks, tmp_path)
    assert losses[-1] < 0.98 * losses[0]
    for folder in FOLDERS.get(name, []):
        assert {path.name for path in (tmp_path / folder).glob("compress-*")} == RANKS


@pytest.mark.slow
def test_the_trainers_example_goes_on_where_it_was(tmp_path: Path) -> None:
    """From its first checkpoint, with the errors that were saved beside it, to the same errors in the second, to the
    bit: without them a resumed run had lost what was not sent yet, and said nothing."""
    straight = example("trainer", 2, tmp_path)
    last = tmp_path / "out" / "checkpoint-20"
    kept = {name: load_file(last / name) for name in RANKS}
    shutil.rmtree(last)
    assert example("trainer", 2, tmp_path) == straight[2:] != []
    for name, tensors in kept.items():
        again = load_file(last / name)
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_every_public_name_is_found_and_none_is_hidden_by_a_module() -> None:
    alone.check_names(llmsys.compress)
