"""What torch's own MemTracker says a training step of a config needs, under FakeTensorMode: the peer of `bench_memory`.

The model is built and prepared by the shared trainer; its tensors are then replaced by fake ones of the same shapes,
and two steps run under `torch.distributed._tools.mem_tracker.MemTracker`, as its documentation has it. It knows one
rank: engines that cut a model talk to others, and fake tensors cannot. Its hooks do not reach some functions with
backward passes of their own, and it raises.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from live_steps import made
from llmsys import schema
from llmsys.comm.place import Place
from llmsys.train import optimizer
from llmsys.train.reproducible import reproducible


def tracked(config: dict[str, Any]) -> dict[str, Any]:
    """`peak`: bytes on the device, and `seconds` that it took, without building the model. What the tracker raises
    comes through."""
    typed = schema.build(config)
    device = torch.device("cuda" if typed.hardware.device == "cuda" else "cpu")
    train = typed.train
    with (
        tempfile.TemporaryDirectory() as folder,
        reproducible(train.seed, train.threads, train.deterministic),
    ):
        loop = made(typed, Place(), device, Path(folder))
        start = time.perf_counter()
        batch = loop.micro_batches(0)[0]
        mode = FakeTensorMode()
        model = _faked(loop.model, mode).train()
        with mode:
            inputs = {k: torch.empty(v.shape, dtype=v.dtype, device=device) for k, v in batch.items()}
            adamw = optimizer.adamw(model, train, 1e-4)
            tracker = MemTracker()
            tracker.track_external(model, adamw, *inputs.values())
            with tracker:
                for step in range(2):
                    for _ in range(schema.accumulation(train, typed.engine)):
                        with loop.mixed():
                            loss = model(**inputs).loss
                        loss.backward()
                    adamw.step()
                    adamw.zero_grad()
                    if step == 0:
                        tracker.reset_mod_stats()
        found = tracker.get_tracker_snapshot("peak")
        peak = max(kinds["Total"] for where, kinds in found.items() if where.type == device.type)
        return {"peak": int(peak), "seconds": time.perf_counter() - start}


def _faked(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """`model`, changed in place: each parameter and buffer a fake tensor of its shape; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, value in list(table.items()):
                if value is None:
                    continue
                if id(value) not in made:
                    with mode:
                        empty = torch.empty(value.shape, dtype=value.dtype, device=value.device)
                    is_weight = isinstance(value, nn.Parameter)
                    made[id(value)] = nn.Parameter(empty, requires_grad=value.requires_grad) if is_weight else empty
                table[name] = made[id(value)]
    return model


if __name__ == "__main__":
    print(json.dumps(tracked(json.loads(sys.stdin.read()))))
