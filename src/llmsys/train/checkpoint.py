"""Checkpoints that a kill at any instant cannot spoil, and from which a run goes on with the same bits.

`<folder>/step-<n>/` holds `state.safetensors` and `state.json`. It is written under another name, flushed to disk and
then renamed, which is atomic; only then the previous one is removed. So the newest `step-` folder is always whole.
Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsys import tensors as files

SCHEMA = 1
STEP = re.compile(r"step-(\d+)")


def save(folder: Path, step: int, tensors: dict[str, Tensor], plain: dict[str, Any]) -> Path:
    """Writes the checkpoint of `step`, then removes older ones. OSError (disk full) leaves those as they were."""
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder, keep=newest(folder))
    fresh, final = folder / f"fresh-{step}", folder / f"step-{step:08d}"
    try:
        fresh.mkdir()
        files.save(tensors, fresh / "state.safetensors")
        text = json.dumps({"schema": SCHEMA, "step": step, **plain})
        (fresh / "state.json").write_text(text, encoding="utf-8")
        for path in (fresh / "state.safetensors", fresh / "state.json", fresh):
            files.sync(path)
        os.rename(fresh, final)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)  # give the room back; what failed is the write above
        raise
    files.sync(folder)
    _sweep(folder, keep=final)
    return final


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors on the host, plain values) of the newest checkpoint; None where there is none.

    ValueError names one that cannot be read: no kill leaves that, but a failing disk or a hand may.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = newest(folder)
    if path is None:
        return None
    try:
        return load_file(path / "state.safetensors"), json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (ValueError, FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error


def newest(folder: Path) -> Path | None:
    """The checkpoint of the latest step; None where there is none."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file stands where checkpoints go; remove it")
    found = [p for p in folder.iterdir() if STEP.fullmatch(p.name)] if folder.exists() else []
    return max(found, default=None)


def remove(folder: Path) -> None:
    """Deletes all checkpoints, after a run's success."""
    if folder.is_dir():
        shutil.rmtree(folder)


def _sweep(folder: Path, keep: Path | None) -> None:
    """Removes what a kill left half written and checkpoints other than `keep`.

    An old checkpoint loses its name first, so that a kill while its files go cannot leave a torn one that has it.
    """
    for path in list(folder.iterdir()):
        if path == keep:
            continue
        if STEP.fullmatch(path.name):
            path = path.rename(path.with_name(f"old-{path.name}"))
        shutil.rmtree(path)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors (`<parameter's number>.<key>`) and the rest, which is JSON."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for number, values in state["state"].items():
        for key, value in values.items():
            (tensors if isinstance(value, Tensor) else plain)[f"{number}.{key}"] = value
    return tensors, {"values": plain, "param_groups": state["param_groups"]}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Loads into `optimizer`, in place, what `pack_optimizer` gave."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **plain["values"]}.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every name with `prefix/` before it."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def unprefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix/`, without it."""
    return {n.removeprefix(f"{prefix}/"): t for n, t in tensors.items() if n.startswith(f"{prefix}/")}
