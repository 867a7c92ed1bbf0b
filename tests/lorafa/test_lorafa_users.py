"""What a user copies works as it stands, and with torch alone."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_harness import outputs

import alone
import llmsys.lorafa
from llmsys.lorafa import load_adapter

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.filterwarnings("ignore:.pin_memory. argument is set as true:UserWarning")  # the Trainer's default
@pytest.mark.parametrize("example", ["lorafa_trainer", "lorafa_accelerate"])
def test_the_examples_learn_and_leave_an_adapter(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    try:
        model = runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")["model"].eval()
    finally:
        AcceleratorState._reset_state(True)
    losses = [float(x) for x in re.findall(r"'?loss'?:? '?(\d+\.\d+)", capsys.readouterr().out)]
    assert losses[-1] < losses[0]
    learnt = outputs(model)
    for path, parameter in model.named_parameters():
        if path.endswith(".B"):
            parameter.data.zero_()
    assert not torch.equal(outputs(model), learnt)
    assert torch.equal(outputs(load_adapter(model, "out/adapter")), learnt)


@pytest.mark.slow
@pytest.mark.parametrize("example", ["lorafa_trainer", "lorafa_accelerate"])
def test_the_examples_work_on_two_ranks(example: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(EXAMPLES / f"{example}.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "adapter" / "adapter.safetensors").is_file()


CODE = """
import llmsys.lorafa
assert "torch" not in sys.modules
import torch
from torch import nn
from llmsys.lorafa import *
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16, bias=False) for _ in range(4))
    def forward(self, x):
        shape = lambda y: y.unflatten(-1, (2, 8)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(*map(shape, (self.q_proj(x), self.k_proj(x), self.v_proj(x))))
        return self.o_proj(y.transpose(1, 2).flatten(-2))
class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 40), nn.Linear(16, 40), nn.Linear(40, 16)
    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp, self.input_layernorm = Attention(), MLP(), nn.RMSNorm(16)
    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(x)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(), Block()])
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x
x = torch.randn(2, 5, 16)
model = inject(Model(), LoRAFAConfig(r=4, share_a=True, dropout=0.1))
import llmsys.models.linear_cross_entropy
assert "torch._dynamo" not in sys.modules  # a second of a process that compiles nothing
assert sum(p.requires_grad for p in model.parameters()) == 14
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
model(x).square().mean().backward()
optimizer.step()
refresh(model, optimizer)
model.eval()
save_adapter(model, "out")
with torch.no_grad():
    assert torch.equal(load_adapter(Model().eval(), "out")(x), model(x))
    to_peft(model, "peft")
    assert torch.allclose(from_peft(Model().eval(), "peft")(x), model(x), atol=1e-5)
    unload(merge(model))
"""


def test_torch_and_safetensors_are_enough(tmp_path: Path) -> None:
    """For all but the families' own blocks: on a model with LLaMA's names that is not transformers'."""
    assert "safetensors" in alone.run(CODE, tmp_path)


def test_every_public_name_is_found_and_none_is_hidden_by_a_module() -> None:
    alone.check_names(llmsys.lorafa)
