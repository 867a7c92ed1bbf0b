"""The choice as something to run: files by name, of which each can be read, changed and started.

    run.sh           our own command, of the trainer that was predicted or measured
    torchrun.sh      the line that starts a script of Hugging Face's Trainer, `bash torchrun.sh train.py ...`
    ds_config.json   DeepSpeed's settings for it, where the choice is one of ZeRO's: the same that our engine hands over
    fsdp.json        FSDP2's, where that cuts the weights
    vllm_serve.sh    with `goal=serve` alone: the line of vLLM

What is written does what was predicted, or is not written, and there is a reason. LoRA-FA, 8-bit floats and our tensor
parallelism Trainer does not have; a shape that is predicted and not built here has no `run.sh`.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from llmsys import schema
from llmsys.bench.advise import command, space, torchrun
from llmsys.bench.advise.cells import GIB, Cell
from llmsys.cost import shapes
from llmsys.cost.case import Case, facts
from llmsys.files import write_atomic
from llmsys.train import zero_settings

NAMES = ("run.sh", "torchrun.sh", "ds_config.json", "fsdp.json", "vllm_serve.sh")
WRITTEN = ".written.json"
"""Hashes of what was written, by which it is known again."""


@dataclass(frozen=True, kw_only=True)
class Emitted:
    """`texts` by name; `why_not`: of scripts that are not among them, the reason."""

    texts: dict[str, str]
    why_not: dict[str, str]


def files(config: schema.Config, cell: Cell, *, cuda: bool) -> Emitted:
    """`config`: what advice was asked about; `cuda`: its devices are GPUs."""
    made = space.configured(
        config,
        cell.techniques,
        world=cell.world,
        micro_batch=cell.micro_batch,
        global_batch=space.advise(config).global_batch,
    )
    texts, why_not = {}, {}
    try:
        texts["run.sh"] = _script(["python", "-m", "llmsys", *command.words(made)])
    except ValueError as error:
        why_not["run.sh"] = str(error)
    trained = [p for p in shapes.held(_case(made, cuda)) if p.trained]
    more = torchrun.more_bytes(made, sum(p.nbytes for p in trained))
    reason = torchrun.why_not(made, cuda=cuda)
    if not reason and cell.peak_bytes + more > cell.capacity_bytes:
        reason = f"Trainer's DDP keeps buckets beside the gradients: {more / GIB:.3g} GiB more, which do not fit"
    if reason:
        return Emitted(texts=texts, why_not={**why_not, "torchrun.sh": reason})
    told = [f"Trainer's DDP keeps buckets beside the gradients: {more / GIB:.3g} GiB of a device more"] if more else []
    texts["torchrun.sh"] = _script(torchrun.words(made), [*torchrun.to_load(made), *told])
    if isinstance(made.engine, schema.DeepSpeed):
        settings = zero_settings.settings(
            made.model, made.train, made.engine, trained=sum(p.numel for p in trained), cuda=cuda
        )
        texts["ds_config.json"] = json.dumps(settings, indent=2) + "\n"
    if isinstance(made.engine, schema.FSDP2):
        texts["fsdp.json"] = json.dumps(torchrun.fsdp(made), indent=2) + "\n"
    return Emitted(texts=texts, why_not=why_not)


def check(name: str) -> None:
    """ValueError where `task.emit=name` is no folder, cannot be one, or has files of these names that are not of an
    earlier answer, or were changed since: nobody's work is written over."""
    folder = Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"task.emit={name}: is a file; it is a folder") from None
    except OSError as error:
        raise ValueError(f"task.emit={name}: cannot be made: {error.strerror}") from None
    ours = _written(folder)
    for each in NAMES:
        if (folder / each).exists() and _hash((folder / each).read_bytes()) not in ours.get(each, []):
            raise ValueError(f"task.emit={name}: {each} there is not as an answer has left it; name another folder")


def write(found: Emitted, folder: Path) -> None:
    """Each file into `folder`, which is made; of earlier choices none stays (`check` is asked before). OSError where it
    cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    ours = _written(folder)
    for name, text in found.texts.items():  # said first: who is killed in between finds its own files again
        ours[name] = [*ours.get(name, [])[-1:], _hash(text.encode())]
    write_atomic(folder / WRITTEN, json.dumps(ours, indent=1) + "\n")
    for name in NAMES:
        if name in found.texts:
            write_atomic(folder / name, found.texts[name])
        else:
            (folder / name).unlink(missing_ok=True)


def _written(folder: Path) -> dict[str, list[str]]:
    """What the last two answers wrote there: hashes by name."""
    try:
        found = json.loads((folder / WRITTEN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _case(config: schema.Config, cuda: bool) -> Case:
    known = facts(config, "cuda" if cuda else "cpu")
    return Case(config.model, config.train, config.method, config.engine, **known)


def _script(words: list[str], told: list[str] | None = None) -> str:
    """A shell script of one command; further words of whoever starts it come last."""
    plain = {'"$@"', *torchrun.HERE.values()}
    line = " ".join(word if word in plain else shlex.quote(word) for word in words)
    line += "" if '"$@"' in words else ' "$@"'
    here = ['here=$(cd "$(dirname "$0")" && pwd)'] if "$here" in line else []
    return "\n".join(["#!/bin/bash", *(f"# {each}" for each in told or []), "set -e", *here, f"exec {line}"]) + "\n"
