"""The learning rate's schedule is transformers' own, and costs a process none of its imports."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from llmsys import schema
from llmsys.schema.train import SCHEDULES
from llmsys.train import optimizer


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 7, 20])
def test_its_bits_are_those_of_transformers(kind: str, warmup: int) -> None:
    """Also beyond its last step, where a run that goes on with more steps may look."""
    from transformers import get_scheduler

    theirs = get_scheduler(kind, torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0), warmup, 20)
    factor = optimizer.schedule(schema.Train(schedule=kind, warmup_steps=warmup, steps=20))
    assert [factor(step) for step in range(25)] == [theirs.lr_lambdas[0](step) for step in range(25)]


def test_it_imports_neither_peft_nor_transformers() -> None:
    code = (
        "import sys; from llmsys import schema; from llmsys.train import optimizer; optimizer.schedule(schema.Train());"
    )
    code += "sys.exit(bool({'peft', 'bitsandbytes', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
