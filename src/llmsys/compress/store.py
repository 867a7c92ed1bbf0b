"""The state of gradient compression on disk: one safetensors file for each rank, whose header is JSON.

    save_state(state, "checkpoint")        # on every rank, at the same step
    load_state(state, "checkpoint")        # on as many ranks, or on another number

Every rank has errors of its own, so every rank writes, and reads its own. The others' headers are looked at, which say
whether the files are of one save: all have its step, and the factors, which all ranks have alike. Where the number of
ranks has changed every rank reads all files, one parameter after another: errors become their mean, which is all that
the sum over the ranks depends on (`CompressionState.load`).

A header has the SHA-256 of each tensor, so that a flipped bit is not a replica of its own. In the end ranks make sure
that they have read the same, which folders of their own may not hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsys.compress.agreement import check_equal
from llmsys.compress.state import CompressionState

SCHEMA = 1
META = "compress"
FACTORS = ("/p", "/q")
"""What names of tensors end in that all ranks have alike."""


def save_state(state: CompressionState, folder: Path | str) -> Path:
    """Writes this rank's file, whole or not at all, and returns its path. OSError for a full disk."""
    from llmsys import tensors

    file = _file(Path(folder), state.rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = state.tensors()
    told = {
        "schema": SCHEMA,
        "rank": state.rank,
        "world": state.world,
        "sha256": {name: _sha256(tensor) for name, tensor in kept.items()},
        **state.plain(),
    }
    tensors.replace(kept, file, {META: json.dumps(told)})
    return file


def load_state(state: CompressionState, folder: Path | str) -> None:
    """Puts what all ranks have saved into `state`, in place. Collective. ValueError, on every rank, where one of them
    finds a file that is missing, damaged or of another save than the others, or the state of another model, or where
    they have not found the same; `state` is of no use then."""
    wrong, read = "", ""
    try:
        read = _load(state, Path(folder))
    except ValueError as error:
        wrong = str(error)
    device = next(iter(state.devices.values()), torch.device("cpu"))
    check_equal({f"state in {folder} (its step, or the factors in it)": read}, state.group, device, wrong)


def _load(state: CompressionState, folder: Path) -> str:
    """What all ranks have to read alike."""
    with contextlib.ExitStack() as files:
        found = [files.enter_context(_opened(folder, 0))]
        found += [files.enter_context(_opened(folder, rank)) for rank in range(1, found[0].world)]
        for rank, each in enumerate(found):
            if why := each.stranger(rank, found[0]):
                raise ValueError(f"{_file(folder, rank)}: {why}; they are not of one save")
        state.load([(each, each.told) for each in found])
        return found[0].alike


class _Saved(Mapping[str, Tensor]):
    """The tensors of an open file, each read when it is asked for, and what its header has `told`."""

    def __init__(self, file: Path, opened: Any, told: dict[str, Any]) -> None:
        self._file, self._opened, self._names, self.told = file, opened, dict.fromkeys(opened.keys()), told
        self.world = int(told["world"])
        self._sums: dict[str, str] = told.get("sha256", {})  # which files of before have not
        factors = {name: of for name, of in sorted(self._sums.items()) if name.endswith(FACTORS)}
        self.alike = json.dumps([told["step"], factors])

    def stranger(self, rank: int, first: _Saved) -> str:
        """Why this is not what `rank` has written beside `first`; "" where it is."""
        own, of, step = self.told["rank"], self.world, self.told["step"]
        if own != rank:
            return f"written by rank {own}"
        if (of, step) != (first.world, first.told["step"]):
            there = f"rank 0's is of {first.world} at step {first.told['step']}"
            return f"written by rank {rank} of {of} at step {step}, but {there}"
        return "" if self.alike == first.alike else "its factors are not those of rank 0's"

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._opened.get_tensor(name)
        if self._sums and self._sums.get(name) != _sha256(tensor):
            raise ValueError(f"{self._file}: damaged ({name} is not what was written)")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)


@contextlib.contextmanager
def _opened(folder: Path, rank: int) -> Iterator[_Saved]:
    import safetensors

    file = _file(folder, rank)
    with contextlib.ExitStack() as files:
        try:
            opened = files.enter_context(safetensors.safe_open(file, "pt"))
            told = json.loads((opened.metadata() or {}).get(META, "null"))
        except FileNotFoundError:
            raise ValueError(f"{file}: there is no such file; each rank's save_state writes one") from None
        except (safetensors.SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{file}: damaged ({error})") from None
        if not isinstance(told, dict) or told.get("schema") != SCHEMA:
            raise ValueError(f"{file}: not a state of gradient compression, or of another version than {SCHEMA}")
        yield _Saved(file, opened, told)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"compress-rank-{rank}.safetensors"


def _sha256(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()
