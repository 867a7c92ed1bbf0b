"""On two real ranks: DDP never touches A, and a rank that drew another A is found at the start."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_harness import MLP, TARGETS, learnt, matrices, mlp
from torch.nn.parallel import DistributedDataParallel

from llmsys import schema
from llmsys.comm.place import Place
from llmsys.lorafa import (
    LoRAFAConfig,
    assert_same_across_ranks,
    delete_adapter,
    ignore_in_ddp,
    inject,
    load_adapter,
    merge,
    names,
    refresh,
    save_adapter,
    set_adapter,
    unmerge,
)
from llmsys.lorafa.basis import fingerprint
from llmsys.lorafa.methods import LoRAFA
from rank_pool import Pool

WAYS = ("inject", "twice", "set_adapter", "load", "delete", "merge", "refresh", "outer")


def model(way: str, folder: Path) -> Any:
    """One adapter and more, come to in one of `WAYS`."""
    made = mlp(correction="closed_form")
    if way in ("twice", "set_adapter", "delete"):
        inject(made, LoRAFAConfig(r=3, targets=TARGETS), "b")
    if way == "set_adapter":
        set_adapter(made, "default")
    if way == "delete":
        delete_adapter(made, "default")
    if way == "load":
        save_adapter(made, folder)
        made = load_adapter(MLP(), folder)
    if way == "merge":
        unmerge(merge(made))
    if way == "refresh":
        refresh(made)
    if way == "outer":
        made = torch.nn.Sequential(made)
        ignore_in_ddp(made)
    return made


def overwritten(place: Any, folder: str) -> dict[str, dict[str, bool]]:
    """Way -> whether rank 1's corrupt buffers were overwritten by a forward pass, of A and of a buffer of others."""
    found = {}
    for way in WAYS:
        made = model(way, Path(folder, str(place.rank)))
        made.register_buffer("other", torch.full((2,), float(place.rank)))
        wrapped = DistributedDataParallel(made)
        if place.rank:
            for path, buffer in made.named_buffers():
                if path.endswith((".A", ".inverse")):
                    buffer.fill_(7.0)
        wrapped(torch.ones(2, 16)).sum().backward()
        frozen = [buffer for path, buffer in made.named_buffers() if path.endswith((".A", ".inverse"))]
        mine = all((buffer == 7).all() == bool(place.rank) for buffer in frozen)
        found[way] = {"A": not mine or not frozen, "other": not made.other.any()}
    return found


def test_ddp_leaves_a_alone(pool: Pool, tmp_path: Path) -> None:
    """And goes on sending the buffers of others."""
    expected = {way: {"A": False, "other": True} for way in WAYS}
    assert pool.call("test_lorafa_ranks:overwritten", str(tmp_path)) == [expected, expected]


def compared(place: Any, case: str) -> str:
    """What a rank is told."""
    config = {"seed": place.rank if case == "seed" else 0}
    made = mlp(**config)
    inject(made, LoRAFAConfig(r=3, targets=TARGETS[: 1 + (case != "layers" or place.rank)]), "b")
    if case == "entry" and place.rank:
        made.second.adapters["b"].A[0, 0] += 0.01
    if case == "bf16" and place.rank:
        made.bfloat16()
    try:
        assert_same_across_ranks(made)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("same", ""),
        ("bf16", ""),
        ("seed", "A of first (default) is not the same on all ranks: 2 of 4 differ"),
        ("entry", "A of second (b) is not the same on all ranks: 1 of 4 differ"),
        ("layers", "the ranks have adapters of other names, or beside other layers"),
    ],
)
def test_a_rank_with_another_a_is_found_and_all_are_told(pool: Pool, case: str, told: str) -> None:
    assert pool.call("test_lorafa_ranks:compared", case) == [told, told]


def test_alone_there_is_nothing_to_compare() -> None:
    assert_same_across_ranks(mlp())
    assert_same_across_ranks(MLP())


def changed(place: Any) -> list[str]:
    """What comes too late under DDP, and what does not."""
    wrapped = DistributedDataParallel(mlp())
    told = []
    for call in (
        lambda: set_adapter(wrapped, "default"),
        lambda: inject(wrapped, LoRAFAConfig(r=2, targets=TARGETS), "b"),
        lambda: delete_adapter(wrapped, "default"),
    ):
        try:
            call()
        except ValueError as error:
            told.append(str(error))
    unmerge(merge(wrapped))
    refresh(wrapped)
    learnt(wrapped)
    assert names(wrapped) == ["default"]
    return told


def test_what_ddp_would_not_notice_is_refused(pool: Pool) -> None:
    """It builds its buckets of gradients once: a B that is trained later would differ from rank to rank, silently."""
    told, _ = pool.call("test_lorafa_ranks:changed")
    wanted = "comes before the model is wrapped in DDP, which would not know the new gradients"
    assert told == [f"{what}: {wanted}" for what in ("set_adapter", "inject", "delete_adapter")]


def saved(place: Any, folder: str) -> list[str]:
    wrapped = DistributedDataParallel(mlp())
    if place.rank == 0:
        save_adapter(wrapped, folder)
    torch.distributed.barrier()
    load_adapter(wrapped, folder)
    loaded = load_adapter(MLP(), folder)
    return sorted(matrices(loaded))


def test_names_in_a_file_are_those_inside_ddp(pool: Pool, tmp_path: Path) -> None:
    (a, b) = pool.call("test_lorafa_ranks:saved", str(tmp_path))
    assert a == b == [f"{layer}.adapters.default.A" for layer in TARGETS]


def prepared(place: Any, case: str) -> dict[str, str]:
    """What `method=lorafa` makes of a model that is not the same on both ranks: A and what follows from it, or what the
    rank is told."""
    config = schema.LoRA(kind="lorafa", r=3, targets=list(TARGETS))
    if case != "seed":
        config = dataclasses.replace(config, init=case, correction="closed_form", share_a=True)
    made = MLP()
    made.first.weight.data.add_(float(place.rank))
    made.second.weight.data.mul_(1 + place.rank * torch.arange(32))
    method = LoRAFA(config, seed=place.rank if case == "seed" else 0)
    try:
        method.prepare(made, [{"x": torch.ones(1, 16).cumsum(1) ** (1 + place.rank) * torch.eye(16)}])
    except ValueError as error:
        return {"told": str(error)}
    return {name: fingerprint(buffer) for name, buffer in made.named_buffers()}


def test_the_method_compares_a_that_is_drawn(pool: Pool) -> None:
    told = {"told": "A of first (default) is not the same on all ranks: 2 of 2 differ"}
    assert pool.call("test_lorafa_ranks:prepared", "seed") == [told, told]


@pytest.mark.parametrize("init", ["weight_svd", "pca"])
def test_the_method_sends_a_that_is_computed(pool: Pool, init: str) -> None:
    """Of weights or of batches that are not quite equal on two machines: all have rank 0's."""
    first, second = pool.call("test_lorafa_ranks:prepared", init)
    assert first == second
    assert sum(name.endswith(".A") for name in first) == sum(name.endswith(".inverse") for name in first) == 2
    alone = prepared(Place(rank=1, world=2), init)
    assert not {*alone.values()} & {*first.values()}, "else there was nothing to send"
