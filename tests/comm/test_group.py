"""The group of a run's ranks."""

import os

import pytest
import torch
import torch.distributed as dist

from llmsys.comm.group import VARIABLES, group
from llmsys.comm.place import Place


def test_a_group_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    # The Trainer and Accelerate take RANK for a launch by torchrun, also when a run in this process is over.
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    before = dict(os.environ)
    with group(Place(), torch.device("cpu")):
        assert os.environ["RANK"] == "0"
        assert dist.get_world_size() == 1
    assert dict(os.environ) == before
    assert not dist.is_initialized()
