"""Which combinations of techniques there are to choose among for a model on a machine, and why not the others.

A combination can fall out three times: letters can contradict each other (`llmsys.bench.techniques`), the stage does
not allow it, or the settings that it stands for do not go with this model or this device. Each time with a reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmsys import schema
from llmsys.bench.techniques import FUSED, KINDS, LETTERS, METHODS, Techniques
from llmsys.cost import shapes
from llmsys.cost.hardware import FP8


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A combination that can be, on `world` ranks."""

    techniques: Techniques
    world: int


@dataclass(frozen=True, kw_only=True)
class Space:
    """`candidates`, and of those that are left out a line each: `techniques=<it>: <why>`."""

    candidates: tuple[Candidate, ...]
    left_out: tuple[str, ...]


def space(config: schema.Config) -> Space:
    """All combinations of `task.letters`. ValueError for a letter that is not known, and where none is left."""
    task = advise(config)
    candidates: list[Candidate] = []
    left_out: dict[str, None] = {}
    for world in worlds(config):
        valid, refused = Techniques.sorted_out(letters(task, world))
        left_out |= dict.fromkeys(refused)
        for each in valid:
            candidate = Candidate(techniques=each, world=world)
            if why := why_not(config, candidate):
                left_out[f"techniques={each}: {why}"] = None
            else:
                candidates.append(candidate)
    if not candidates:
        why = next(reversed(left_out)).partition(": ")[2]
        raise ValueError(f"task.letters={task.letters}: no combination of them is left; the last one: {why}")
    return Space(candidates=tuple(candidates), left_out=tuple(left_out))


def check(config: schema.Config) -> None:
    """ValueError, which names the key, for letters that are not known or contradict each other, and where they need
    another stage."""
    task = advise(config)
    for key in ("letters", "require"):
        for letter in getattr(task, key):
            try:
                _parts(letter)
            except ValueError as error:
                raise ValueError(f"task.{key}={letter}: {str(error).partition(': ')[2]}") from None
    if not task.require:
        return
    asked = f"task.require=[{','.join(task.require)}]"
    try:
        together = Techniques.parse("+".join(task.require))
    except ValueError as error:
        raise ValueError(f"{asked}: {str(error).partition(': ')[2]}") from None
    if task.stage == "pretrain" and together.adapter:
        raise ValueError(f"{asked}: trains adapters alone, and this is pre-training; task.stage=finetune")


def advise(config: schema.Config) -> schema.Advise:
    assert isinstance(config.task, schema.Advise), config.task
    return config.task


def worlds(config: schema.Config) -> list[int]:
    """Numbers of ranks: those of the machine or those asked for; where cost is asked about also fewer of them."""
    most = config.train.world
    if advise(config).goal != "cost" or most != config.hardware.devices:
        return [most]
    return sorted({most, *(2**i for i in range(most.bit_length()) if 2**i < most)}, reverse=True)


def letters(task: schema.Advise, world: int) -> list[str]:
    """What is combined."""
    if task.letters:
        return [*task.letters, *(letter for letter in task.require if letter not in task.letters)]
    return [*LETTERS, *([f"TP{world}"] if world > 1 else [])]


def _parts(letter: str) -> set[str]:
    """What `Techniques.letters` has of a letter: QL is Q and L. ValueError for an unknown one."""
    Techniques.combinations([letter])
    token = letter.strip().upper()
    return {"Q", token[1:]} if token in ("QL", "QLFA") else {token}


def why_not(config: schema.Config, candidate: Candidate) -> str:
    """Why a combination that is valid in itself is none to choose; "" where it is one."""
    task, each, world = advise(config), candidate.techniques, candidate.world
    required = set().union(*(_parts(letter) for letter in task.require))
    if required - set(each.letters):
        return f"is without {', '.join(sorted(required - set(each.letters)))}, which task.require asks for"
    if each.quantised and not each.adapter:
        return "the linear layers of a 4-bit base are frozen, and without an adapter none of them is trained"
    if task.stage == "pretrain" and each.adapter:
        return "trains adapters alone, and this is pre-training; task.stage=finetune"
    if each.tensor not in (1, world):
        return f"cuts matrices over {each.tensor} ranks, and there are {world}"
    if each.fp8 and config.hardware.name not in FP8:
        known = config.hardware.name if config.hardware.name != "auto" else "this card"
        return f"of {known} no 8-bit floats are known; {', '.join(FP8)} have them"
    try:
        made = configured(config, each, world=world, micro_batch=1, global_batch=0)
        shapes.check_adapters(made.model, made.method)
        micro_batches(config, candidate)  # on other ranks the batch may divide
    except ValueError as error:
        return str(error)
    return ""


def configured(
    base: schema.Config, techniques: Techniques, *, world: int, micro_batch: int, global_batch: int
) -> schema.Config:
    """`base` with the settings that `techniques` stands for (its `words`), on `world` ranks. `global_batch` 0: what
    they and the micro-batch make. ValueError for settings that do not go together."""
    assert isinstance(base.model, schema.Transformer), base.model
    flash = base.model.attention if base.model.attention in FUSED else FUSED[0]
    model = dataclasses.replace(
        base.model,
        attention=flash if techniques.flash else "eager",
        quant="nf4" if techniques.quantised else "none",
    )
    engine = _engine(base.engine, techniques, world)
    shares = 1 if engine.kind == "tp" else world
    train = dataclasses.replace(
        base.train,
        recompute="block" if techniques.recompute else "none",
        optimizer="adamw_8bit" if techniques.adam8 else "adamw",
        fp8=techniques.fp8,
        world=world,
        micro_batch=micro_batch,
        global_batch=global_batch or micro_batch * shares,
    )
    method = _method(base.method, techniques.adapter)
    return dataclasses.replace(base, techniques=str(techniques), model=model, train=train, method=method, engine=engine)


def _engine(base: schema.Engine, techniques: Techniques, world: int) -> schema.Engine:
    if techniques.tensor > 1:
        return schema.Engine(kind="tp")
    if techniques.zero == 3 and not techniques.offload and isinstance(base, schema.FSDP2):
        return base
    if techniques.zero:
        offload = "none"
        if techniques.offload:
            offload = "optimizer+params" if techniques.zero == 3 else "optimizer"
        optimizer = base.optimizer if isinstance(base, schema.DeepSpeed) else "torch"
        return schema.DeepSpeed(kind="deepspeed", zero=techniques.zero, offload=offload, optimizer=optimizer)
    if world == 1:
        return schema.Engine(kind="local")
    return base if isinstance(base, schema.DDP) else schema.DDP(kind="ddp")


def _method(base: schema.Method, adapter: str) -> schema.Method:
    """The adapter's, with the width and the rest that `base` has, where that is an adapter too."""
    if KINDS.get(base.kind, "") == adapter:
        return base
    kind = METHODS[adapter]
    if not adapter:
        return schema.Method(kind=kind)
    shared: dict[str, Any] = {}
    if isinstance(base, schema.Adapter):
        shared = {field.name: getattr(base, field.name) for field in dataclasses.fields(schema.Adapter)}
    cls = schema.LoRA if kind in ("lora", "lorafa") else schema.Adapter
    return cls(**{**shared, "kind": kind})


def micro_batches(config: schema.Config, candidate: Candidate) -> Sequence[int]:
    """The micro-batches to choose among, ascending: those asked for, or all, of which so many as make the global batch.

    ValueError where none of them does.
    """
    task = advise(config)
    shares = 1 if candidate.techniques.tensor > 1 else candidate.world
    if not task.global_batch:
        return sorted(set(task.micro_batches)) or range(1, task.most_micro_batch + 1)
    each, rest = divmod(task.global_batch, shares)
    asked = task.micro_batches or range(1, min(task.most_micro_batch, each) + 1)
    found = sorted({size for size in asked if not rest and size <= each and each % size == 0})
    if not found:
        raise ValueError(f"train.global_batch={task.global_batch}: no micro-batch on {shares} ranks makes it")
    return found


def bound(config: schema.Config, candidate: Candidate, size: int) -> str:
    """The setting by which no larger micro-batch than `size` was looked at; "" where larger ones were, and where one
    alone was asked about."""
    task, sizes = advise(config), micro_batches(config, candidate)
    if size < sizes[-1] or len(set(task.micro_batches)) == 1:
        return ""
    if task.micro_batches:
        return f"task.micro_batches=[{','.join(map(str, task.micro_batches))}]"
    if task.global_batch and size * (1 if candidate.techniques.tensor > 1 else candidate.world) == task.global_batch:
        return f"train.global_batch={task.global_batch}"
    return f"task.most_micro_batch={task.most_micro_batch}"
