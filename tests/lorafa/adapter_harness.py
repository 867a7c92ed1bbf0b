"""Tiny models with adapters in them, for the tests of an adapter's life.

Run as a program with a folder, it forks a process for each folder in that, which saves an adapter there and dies as the
folder's name says; prints their exit codes as JSON.

    write   SIGKILL in the middle of writing the new file
    sync    SIGKILL when it is written, not yet on the disk
    rename  SIGKILL when it would take the old one's place
    full    no room for it: a limit of the file's size, whose signal is ignored; exits with the system's error number
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.lorafa import LoRAFAConfig, inject, save_adapter

IDS = torch.arange(24).reshape(2, 12)


def tiny(family: str = "llama", dtype: str = "fp32", **changes: Any) -> Any:
    """A transformer of two layers and width 64, the same each time, in evaluation mode."""
    from llmsys import models, schema

    tied = family in ("gpt2", "t5")
    cfg = schema.Transformer(family=family, dtype=dtype, tie_embeddings=tied, **changes)
    made = models.load(cfg, objective=cfg.objective, num_labels=3, device=torch.device("cpu"), seed=0, folder=None)
    return made.eval()


class MLP(nn.Module):
    """No block is known in it. [., 16] -> [., 4]"""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first, self.second, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4, bias=False)
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.3, generator=generator)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


TARGETS = ("first", "second")


def mlp(name: str = "default", *, dtype: torch.dtype = torch.float32, **config: Any) -> MLP:
    """An MLP with an adapter that has learnt something."""
    model = inject(MLP(dtype), LoRAFAConfig(**{"r": 2, "targets": TARGETS, **config}), name)
    return learnt(model, name)


def learnt(model: Any, name: str = "default", seed: int = 1) -> Any:
    """Writes into all that the adapter trains, in place, as training would; returns `model`."""
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if f"adapters.{name}." in path:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def outputs(model: Any, seed: int = 0) -> Tensor:
    """Logits of `IDS`; of an MLP, of some random rows."""
    with torch.no_grad():
        if hasattr(model, "config"):
            more = {"decoder_input_ids": IDS} if model.config.model_type == "t5" else {}
            return model(input_ids=IDS, **more).logits.float()
        dtype = next(model.parameters()).dtype
        return model(torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)).float()


def matrices(model: Any) -> dict[str, Tensor]:
    """Every frozen A by its name, copied."""
    return {path: buffer.clone() for path, buffer in model.named_buffers() if path.endswith(".A")}


def everything(model: nn.Module) -> Any:
    """All that a model is, to be compared: classes, attributes, hooks, what is trained, and every bit."""

    def told(tensor: Tensor) -> Any:
        bits = b"" if tensor.is_meta else tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        return id(tensor), tensor.requires_grad, tensor.dtype, tensor.shape, bits

    def simple(value: Any) -> bool:
        return isinstance(value, str | int | float | tuple | list | None)

    return (
        {
            path: (type(m), {key: value if simple(value) else id(value) for key, value in vars(m).items()})
            for path, m in model.named_modules()
        },
        {path: (len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in model.named_modules()},
        {name: told(tensor) for named in (model.named_parameters, model.named_buffers) for name, tensor in named()},
    )


def _die(folder: Path, moment: str) -> None:
    from llmsys import tensors

    def kill(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def torn(_: Any, path: Path, *__: Any) -> None:
        with open(path, "wb") as file:
            file.write(b"\x10")
            file.flush()
            kill()

    new = mlp(alpha=7)
    if moment == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
    elif moment == "rename":
        os.replace = kill
    else:
        setattr(tensors, {"write": "save", "sync": "sync"}[moment], torn if moment == "write" else kill)
    try:
        save_adapter(new, folder)
    except OSError as error:
        os._exit(error.errno or 1)
    os._exit(0)


def main(folder: Path) -> None:
    """One child after another."""
    codes = {}
    for each in sorted(folder.iterdir()):
        child = os.fork()
        if not child:
            _die(each, each.name)
        codes[each.name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
