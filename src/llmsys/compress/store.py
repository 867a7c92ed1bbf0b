"""The state of gradient compression on disk: one safetensors file for each rank, whose header is JSON.

    save_state(state, "checkpoint")        # on every rank, at the same step
    load_state(state, "checkpoint")        # on as many ranks, or on another number

Every rank has errors of its own, so every rank writes, and where the number of ranks has changed every rank reads all
files: errors become their mean, which is all that the sum over the ranks depends on (see `CompressionState.load`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from llmsys.compress.state import CompressionState

SCHEMA = 1
META = "compress"


def save_state(state: CompressionState, folder: Path | str) -> Path:
    """Writes this rank's file, whole or not at all, and returns its path. OSError for a full disk."""
    from llmsys import tensors

    file = _file(Path(folder), state.rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    told = {"schema": SCHEMA, "rank": state.rank, "world": state.world, **state.plain()}
    tensors.replace(state.tensors(), file, {META: json.dumps(told)})
    return file


def load_state(state: CompressionState, folder: Path | str) -> None:
    """Puts what all ranks have saved into `state`, in place. ValueError for a file that is missing, damaged or of
    another save than the others, and for the state of another model."""
    first, told = _read(Path(folder), 0)
    world, step = int(told["world"]), told["step"]
    found = [(first, told)]
    for rank in range(1, world):
        tensors, theirs = _read(Path(folder), rank)
        if (theirs["world"], theirs["step"]) != (world, step):
            text = f"written by rank {rank} of {theirs['world']} at step {theirs['step']}, but rank 0's is of {world}"
            raise ValueError(f"{_file(Path(folder), rank)}: {text} at step {step}; they are not of one save")
        found.append((tensors, theirs))
    state.load(found)


def _read(folder: Path, rank: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    file = _file(folder, rank)
    try:
        with safe_open(file, "pt") as opened:
            told = json.loads((opened.metadata() or {}).get(META, "null"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    except FileNotFoundError:
        raise ValueError(f"{file}: there is no such file; each rank's save_state writes one") from None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: damaged ({error})") from None
    if not isinstance(told, dict) or told.get("schema") != SCHEMA:
        raise ValueError(f"{file}: not a state of gradient compression, or of another version than {SCHEMA}")
    return tensors, told


def _file(folder: Path, rank: int) -> Path:
    return folder / f"compress-rank-{rank}.safetensors"
