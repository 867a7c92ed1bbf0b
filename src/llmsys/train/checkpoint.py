"""Checkpoints that a kill at any instant cannot spoil, and from which a run goes on with the same bits.

`<folder>/step-<n>/` holds, of each rank, `rank-<r>.safetensors` and `rank-<r>.json`, and `state.json`. Tensors are
whole and go by name, each in one rank's file, so that any number of ranks can read them; a rank writes its share, so
that none holds them all. The folder is written under another name, flushed to disk and then renamed, which is atomic;
only then older ones are removed. So every folder with a `step-` name is whole. Nothing in it is a pickle.

A disk may still change it: `state.json` has the CRC-32 of every file, itself included, which `Reader` compares.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsys import tensors as files
from llmsys.comm import collectives

SCHEMA = 2
STEP = re.compile(r"step-(\d+)")
STATE = "state.json"
SUMS = "crc32"


def save(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    plain: dict[str, Any],
    shared: dict[str, Any],
    *,
    device: torch.device,
    keep: Collection[int] = (),
) -> Path:
    """Writes the checkpoint of `step`, then removes those of other steps than this and `keep`. Collective.

    `tensors` and `plain` are this rank's share, `shared` what all ranks have. OSError (disk full) on every rank where
    one of them cannot write; the earlier checkpoints are then as they were.
    """
    rank, fresh, final = collectives.rank(), folder / f"fresh-{step}", folder / f"step-{step:08d}"
    fault = 0
    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder, keep=[path for path in folder.iterdir() if STEP.fullmatch(path.name)])
            fresh.mkdir()
        except OSError as error:
            fault = error.errno or errno.EIO
    _all_or_none(fault, fresh, device)
    sums = [0, 0]
    try:
        own = [fresh / name for name in _names(rank)]
        files.save(tensors, own[0])
        own[1].write_text(json.dumps(plain), encoding="utf-8")
        for path in own:
            files.sync(path)
        sums = [_sum(path) for path in own]
    except OSError as error:
        fault = error.errno or errno.EIO
    _all_or_none(fault, fresh, device)
    world = collectives.world()
    every = collectives.all_gather(torch.tensor(sums, device=device)).flatten().tolist()
    if rank == 0:
        try:
            named = zip((name for r in range(world) for name in _names(r)), every, strict=True)
            state = {"schema": SCHEMA, "step": step, "world": world, **shared, SUMS: dict(named)}
            (fresh / STATE).write_text(_sealed(state), encoding="utf-8")
            for path in (fresh / STATE, fresh):
                files.sync(path)
            if final.exists():
                shutil.rmtree(final)  # of an earlier attempt at this very step
            os.rename(fresh, final)
            files.sync(folder)
            _sweep(folder, keep=[final, *(folder / f"step-{number:08d}" for number in keep)])
        except OSError as error:
            fault = error.errno or errno.EIO
    _all_or_none(fault, fresh, device)
    return final


def _names(rank: int) -> tuple[str, str]:
    return f"rank-{rank}.safetensors", f"rank-{rank}.json"


def _sum(path: Path) -> int:
    """CRC-32 of a file, which one changed bit changes, and of changes at random all but one in 4 billion."""
    found = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            found = zlib.crc32(chunk, found)
    return found


def _sealed(state: dict[str, Any]) -> str:
    """`state` as JSON, with its own sum beside those of the other files."""
    state = json.loads(json.dumps(state))
    return json.dumps({**state, SUMS: {**state[SUMS], STATE: _seal(state)}})


def _seal(state: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def _all_or_none(fault: int, fresh: Path, device: torch.device) -> None:
    """Gives the room back and raises on every rank if one has a fault."""
    worst = collectives.most(fault, device)
    if worst:
        if collectives.rank() == 0:
            shutil.rmtree(fresh, ignore_errors=True)  # what failed is the write before; this only tidies up
        raise OSError(worst, os.strerror(worst), str(fresh))


class Reader:
    """A whole checkpoint: `shared` and this rank's `plain` values, and tensors by name, read when asked for.

    ValueError names a file that cannot be read, or whose sum is another: no kill leaves that, but a failing disk or a
    hand may. Sums of tensors are compared by `verify`. A checkpoint of older code has none.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path
        try:
            self.shared: dict[str, Any] = _json(path / STATE)
            if self.shared.get("schema") != SCHEMA:
                raise ValueError(f"of another schema than {SCHEMA}")
            self.world: int = self.shared["world"]
            self._sums: dict[str, int] = self.shared.pop(SUMS, {})
            if self._sums and self._sums.pop(STATE, None) != _seal({**self.shared, SUMS: self._sums}):
                raise ValueError(f"{STATE} is not what was written")
            self._files = [_opened(path / _names(r)[0]) for r in range(self.world)]
            self.plain = self.plain_of(rank) if rank < self.world else {}
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise ValueError(f"{path}: damaged: {error}") from error
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 - no mapping

    def plain_of(self, rank: int) -> dict[str, Any]:
        """The plain values of one of the ranks that wrote."""
        return _json(self.path / _names(rank)[1])

    def verify(self) -> None:
        """ValueError names the first file that is not what was written. Reads all of them."""
        for name, expected in self._sums.items():
            path = self.path / name
            if not path.exists() or _sum(path) != expected:
                raise ValueError(f"{self.path}: damaged: {name} is not what was written")

    def names(self, prefix: str) -> list[str]:
        """The names that begin with `prefix/`, without it."""
        return [name.removeprefix(f"{prefix}/") for name in self._where if name.startswith(f"{prefix}/")]

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def get(self, name: str) -> Tensor:
        """A tensor on the host."""
        found: Tensor = self._where[name].get_tensor(name)
        return found

    def lazily(self, names: Mapping[str, str]) -> Mapping[str, Tensor]:
        """Key -> tensor for key -> name; a tensor is read when it is asked for, and not kept."""
        return _Lazy(self, names)

    def all(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix/`, without it."""
        return {name: self.get(f"{prefix}/{name}") for name in self.names(prefix)}


def _json(path: Path) -> dict[str, Any]:
    """A file's object. ValueError names a file that has none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name}: no object of names and values")
    return found


def _opened(path: Path) -> Any:
    """A file of tensors, its header read. ValueError names a file that is none, or of another length than it says."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from error


class _Lazy(Mapping[str, Tensor]):
    def __init__(self, reader: Reader, names: Mapping[str, str]) -> None:
        self._reader, self._names = reader, names

    def __getitem__(self, key: str) -> Tensor:
        return self._reader.get(self._names[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def found(folder: Path) -> list[Path]:
    """The checkpoints, the latest step first. ValueError where a file stands in their folder's place."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file stands where checkpoints go; remove it")
    steps = [path for path in folder.iterdir() if STEP.fullmatch(path.name)] if folder.exists() else []
    return sorted(steps, reverse=True)


def not_gone_on_from(run: str, path: Path, error: ValueError) -> ValueError:
    """What to tell the user of `error` in a checkpoint of the run that `train.resume` names."""
    return ValueError(
        f"train.resume={run}: {error}; remove {path.name}, and the one before it is taken if there is one, or begin "
        "without train.resume"
    )


def set_aside(folder: Path) -> Path:
    """Renames a folder of checkpoints, so that a run can begin anew; what had that name before is deleted."""
    aside = folder.with_name(f"{folder.name}.old")
    if aside.is_dir():
        shutil.rmtree(aside)
    return folder.rename(aside)


def remove(folder: Path) -> None:
    """Deletes all checkpoints, after a run's success."""
    if folder.is_dir():
        shutil.rmtree(folder)


def _sweep(folder: Path, keep: Collection[Path]) -> None:
    """Removes what a kill left half written and checkpoints other than `keep`.

    An old checkpoint loses its name first, so that a kill while its files go cannot leave a torn one that has it.
    """
    for path in list(folder.iterdir()):
        if path in keep:
            continue
        if STEP.fullmatch(path.name):
            path = path.rename(path.with_name(f"old-{path.name}"))
        shutil.rmtree(path)
