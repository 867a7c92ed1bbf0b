"""The state of gradient compression on disk: one safetensors file for each rank, whose header is JSON.

    save_state(state, "checkpoint")        # on every rank, at the same step
    load_state(state, "checkpoint")        # on as many ranks, or on another number

Every rank has errors of its own, so every rank writes, and reads its own. The others' headers are looked at, which say
whether the files are of one save. Where the number of ranks has changed every rank reads all files, one parameter
after another: errors become their mean, which is all that the sum over the ranks depends on (`CompressionState.load`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
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
    with contextlib.ExitStack() as files:
        first = files.enter_context(_opened(Path(folder), 0))
        world, step = int(first.told["world"]), first.told["step"]
        found = [first]
        for rank in range(1, world):
            found.append(files.enter_context(_opened(Path(folder), rank)))
            of, at = found[-1].told["world"], found[-1].told["step"]
            if (of, at) != (world, step):
                text = f"written by rank {rank} of {of} at step {at}, but rank 0's is of {world} at step {step}"
                raise ValueError(f"{_file(Path(folder), rank)}: {text}; they are not of one save")
        state.load([(each, each.told) for each in found])


class _Saved(Mapping[str, Tensor]):
    """The tensors of an open file, each read when it is asked for, and what its header has `told`."""

    def __init__(self, opened: Any, told: dict[str, Any]) -> None:
        self._opened, self._names, self.told = opened, dict.fromkeys(opened.keys()), told

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._opened.get_tensor(name)
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
        yield _Saved(opened, told)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"compress-rank-{rank}.safetensors"
