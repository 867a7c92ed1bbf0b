"""What ranks do in the tests of the hook: train a small model under DDP, with the reference's gradients beside."""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llmsys.comm.place import Place
from llmsys.comm.traffic import Traffic
from llmsys.compress import Aggregator, CompressConfig, load_state, register, save_state
from llmsys.compress.reference import Reference

MANY = 0.002
"""MiB of a bucket, of which `Net` then has several."""
USERS: list[tuple[int, ...]] = [(0, 1), (), (1,), (), (), (0,)]
"""Which ranks use the layer `unused` in a step."""


class Net(nn.Module):
    """Matrices of several shapes, vectors, a convolution, and a matrix too small to be compressed; fp64."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv1d(3, 8, 3)
        self.body = nn.Sequential(nn.Linear(48, 24), nn.Tanh(), nn.LayerNorm(24), nn.Linear(24, 40), nn.Tanh())
        self.unused = nn.Linear(24, 20)
        self.head = nn.Linear(40, 2)
        self.double()

    def forward(self, x: Tensor, *, skip: bool = False) -> Tensor:
        y = self.body(self.conv(x).flatten(1))
        if not skip:
            y = y + self.unused(x.flatten(1)[:, :24]).repeat(1, 2)
        out: Tensor = self.head(y)
        return out


def batch(rank: int, step: int, part: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + part)
    return torch.randn(6, 3, 8, generator=generator, dtype=torch.float64)


def loss(y: Tensor) -> Tensor:
    return (y - 0.5).square().mean()


def everywhere(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def wrapped(model: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, **{"bucket_cap_mb": MANY, "gradient_as_bucket_view": True, **options})


def config_of(settings: dict[str, Any]) -> CompressConfig:
    """r = 2, and small matrices are compressed too."""
    return CompressConfig(**{"r": 2, "min_rate": 1, "density": 0.05, **settings})


def against_reference(
    place: Place, settings: dict[str, Any], options: dict[str, Any], steps: int = 6, parts: int = 1
) -> dict[str, float]:
    """The largest difference of any gradient from the reference's, and of any weight between ranks; collectives of the
    last step. Each step's gradient is accumulated over `parts` batches. Option `compile`: torch.compile's backend."""
    options = dict(options)
    backend, to_none = options.pop("compile", None), options.pop("set_to_none", True)
    skip = options.get("find_unused_parameters", False)
    config, model = config_of(settings), Net(seed=place.rank)  # DDP makes them equal
    ddp = wrapped(model, **options)
    register(ddp, config)
    first = dist._DEFAULT_FIRST_BUCKET_BYTES
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1  # the compiler refuses buckets below it, which is 1 MiB
    called: Any = torch.compile(ddp, backend=backend) if backend else ddp
    torch.manual_seed(place.rank)  # nothing may depend on it
    reference, worst = Reference(config, place.world), 0.0
    named = {name: p for name, p in model.named_parameters() if not (skip and name.startswith("unused"))}
    traffic = Traffic()
    for step in range(steps):
        batches = [batch(place.rank, step, part) for part in range(parts)]
        whole = sum((loss(model(x, skip=skip)) for x in batches), torch.zeros((), dtype=torch.float64))
        local = torch.autograd.grad(whole, list(named.values()))
        wanted = reference.step(everywhere(dict(zip(named, local, strict=True))))
        for x in batches[:-1]:
            with ddp.no_sync():
                loss(called(x, skip=skip)).backward()
        with traffic if step == steps - 1 else contextlib.nullcontext():
            loss(called(batches[-1], skip=skip)).backward()
        for name, p in named.items():
            assert p.grad is not None
            worst = max(worst, float((p.grad - wanted[name]).abs().max()))
        descend(model, to_none)
    dist._DEFAULT_FIRST_BUCKET_BYTES = first
    return {"worst": worst, "apart": apart(model), **traffic.calls}


def sometimes_unused(place: Place, settings: dict[str, Any], options: dict[str, Any], to_none: bool) -> dict[str, Any]:
    """One layer is used in some steps by no rank, by one, or by both. How far what was applied and is kept is from what
    was given, of that layer; the most that was applied in a step in which nobody had used it; and replicas."""
    model = Net()
    ddp = wrapped(model, find_unused_parameters=True, **options)
    state = register(ddp, config_of(settings))
    weight, total = model.unused.weight, [torch.zeros_like(model.unused.weight) for _ in range(2)]
    stray = 0.0
    for step in range(12):
        users = USERS[step % len(USERS)]
        value = loss(ddp(batch(place.rank, step), skip=place.rank not in users))
        local = torch.autograd.grad(value, [weight], retain_graph=True, allow_unused=True)[0]
        total[0] += sum(everywhere(torch.zeros_like(weight) if local is None else local)) / place.world
        value.backward()
        if weight.grad is not None:
            total[1] += weight.grad
            stray = max(stray, 0.0 if users else float(weight.grad.abs().max()))
        descend(model, to_none)
    kept = sum(everywhere(state.tensors()["unused.weight/error"])) / place.world
    given, applied = total
    far = float((given - applied - kept).abs().max() / given.abs().max())
    return {"far": far, "stray": stray, "apart": apart(model)}


def replicas(place: Place, settings: dict[str, Any], steps: int) -> float:
    """How far apart ranks' weights are after so many steps, with seeds and gradients of their own."""
    model = Net(seed=place.rank)
    ddp = wrapped(model)
    register(ddp, config_of(settings))
    torch.manual_seed(place.rank)
    for step in range(steps):
        loss(ddp(batch(place.rank, step))).backward()
        descend(model)
    return apart(model)


def aggregated(place: Place, settings: dict[str, Any], steps: int = 6) -> float:
    """The largest difference of the aggregator's gradients from the reference's."""
    config, model = config_of(settings), Net()
    named = dict(model.named_parameters())
    aggregator, reference = Aggregator(named.items(), config, bucket_mib=MANY), Reference(config, place.world)
    worst = 0.0
    for step in range(steps):
        local = torch.autograd.grad(loss(model(batch(place.rank, step))), list(named.values()))
        wanted = reference.step(everywhere(dict(zip(named, local, strict=True))))
        found = aggregator.aggregate([g.clone() for g in local])
        worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(found, wanted.values(), strict=True)))
    return worst


def without_gradients(place: Place, settings: dict[str, Any]) -> dict[str, float]:
    """One layer is frozen, another one's gradient is missing on one rank or on both: the largest difference from what
    comes out where there are zeros instead, and how far replicas are apart that apply it."""
    config, model = config_of(settings), Net()
    model.head.requires_grad_(False)
    named = dict(model.named_parameters())
    missing, zeros = (Aggregator(named.items(), config, bucket_mib=MANY) for _ in range(2))
    worst = 0.0
    for step in range(4):
        model.zero_grad()
        loss(model(batch(place.rank, step), skip=step % 2 == 0 or place.rank == 1)).backward()
        grads = [None if p.grad is None else p.grad.clone() for p in named.values()]
        there = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in named.values()]
        found, wanted = missing.aggregate(grads), zeros.aggregate(there)
        worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)))
        for p, mean in zip(named.values(), found, strict=True):
            p.grad = mean
        descend(model)
    return {"worst": worst, "apart": apart(model)}


def poisoned(place: Place, settings: dict[str, Any], value: float) -> dict[str, Any]:
    """Steps whose gradient was not finite, where rank 1's loss was `value` times too large in step 3; and replicas."""
    model = Net()
    ddp = wrapped(model)
    register(ddp, config_of(settings))
    bad = []
    for step in range(8):
        factor = value if step == 3 and place.rank == 1 else 1.0
        (loss(ddp(batch(place.rank, step))) * factor).backward()
        if not all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None):
            bad.append(step)
            model.zero_grad()
        descend(model)
    return {"bad": bad, "apart": apart(model), "finite": all(bool(p.isfinite().all()) for p in model.parameters())}


def scaled(place: Place, settings: dict[str, Any]) -> dict[str, Any]:
    """With torch's GradScaler, where the loss overflows in step 3 on rank 1: its scales, and how far weights are from
    those of a run that has no scale and leaves that step out, and from those of one that never had it."""
    ends = []
    scales = []
    for scaled, had in ((True, True), (False, True), (False, False)):
        model = Net().float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        ddp = wrapped(model)
        state = register(ddp, config_of(settings), loss_scale=scaler.get_scale if scaled else None)
        for step in range(8):
            if step == 3 and not had:
                continue
            optimizer.zero_grad()
            value = loss(ddp(batch(place.rank, step).float()))
            if step == 3 and place.rank == 1:
                value = value * math.inf
            (scaler.scale(value) if scaled else value).backward()
            if scaled:
                scaler.step(optimizer)
                scaler.update()
                scales.append(scaler.get_scale())
            elif step != 3:
                optimizer.step()
        assert state.plain()["step"] == 7
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    far = [float((ends[0] - end).abs().max()) for end in ends[1:]]
    return {"scales": scales, "left_out": far[0], "never": far[1]}


def scale_read(place: Place, parts: int) -> list[list[str]]:
    """What happens in each of four steps of `parts` micro-batches, in order: the scale is read, a pass begins."""
    model, happened = Net(), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def read() -> float:
        happened[-1].append("read")
        return float(scaler.get_scale())

    ddp = wrapped(model)
    register(ddp, config_of({}), loss_scale=read)
    for step in range(4):
        happened.append([])
        for part in range(parts):
            with contextlib.nullcontext() if part == parts - 1 else ddp.no_sync():
                value = scaler.scale(loss(ddp(batch(place.rank, step, part))))
                happened[-1].append("backward")
                value.backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            ddp(batch(place.rank, step))
    return happened


def resumed(place: Place, settings: dict[str, Any], folder: str, cap: float) -> float:
    """How far a run that was saved after 3 steps and went on with buckets of `cap` MiB is from one that was not."""
    model = Net()
    ddp = wrapped(model)
    state = register(ddp, config_of(settings))

    def train(ddp: DistributedDataParallel, steps: range) -> Tensor:
        for step in steps:
            loss(ddp(batch(place.rank, step))).backward()
            descend(ddp.module)
        return torch.cat([p.detach().flatten() for p in ddp.module.parameters()])

    train(ddp, range(3))
    save_state(state, folder)
    again = copy.deepcopy(model)
    straight = train(ddp, range(3, 7))
    dist.barrier()
    other = wrapped(again, bucket_cap_mb=cap)
    load_state(register(other, config_of(settings)), folder)
    return float((train(other, range(3, 7)) - straight).abs().max())


def loaded(place: Place, folder: str, case: str) -> str:
    """What a rank is told that reads its state in a folder of its own; rank 1's is `case`."""
    model = wrapped(Net())
    state = register(model, CompressConfig(r=2, min_rate=1))
    for step in range(2):
        loss(model(batch(place.rank, step))).backward()
        model.zero_grad()
        save_state(state, f"{folder}/{step}")
        dist.barrier()
    own = f"{folder}/{0 if place.rank == 1 and case == 'of another step' else 1}"
    if case == "cut off" and place.rank == 1:
        own = f"{folder}/cut"
        shutil.copytree(f"{folder}/1", own)
        file = Path(own) / "compress-rank-1.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
    try:
        load_state(register(wrapped(Net()), CompressConfig(r=2, min_rate=1)), own)
    except ValueError as error:
        return str(error)
    return "nothing"


def refused(place: Place, case: str) -> str:
    """What a rank is told that has not the same as the other, or what cannot be compressed."""
    layer, odd = nn.Linear(4, 4), place.rank == 1
    attempts: dict[str, Callable[[], object]] = {
        "config": lambda: register(wrapped(Net()), CompressConfig(r=2 + odd)),
        "model": lambda: register(wrapped(nn.ModuleDict({f"layer{place.rank}": layer})), CompressConfig()),
        "sparse": lambda: register(wrapped(nn.Embedding(10, 4, sparse=True)), CompressConfig()),
        "bare": lambda: register(layer, CompressConfig()),  # type: ignore[arg-type]
        "shapes": lambda: Aggregator(nn.Linear(4, 4 + odd).named_parameters(), CompressConfig()),
        "types": lambda: Aggregator((layer.double() if odd else layer).named_parameters(), CompressConfig()),
        "scaler": lambda: register(wrapped(Net()), CompressConfig(), loss_scale=(lambda: 1.0) if odd else None),
        "sparse on one": lambda: register(wrapped(nn.Embedding(10, 4, sparse=odd)), CompressConfig()),
        "empty on one": lambda: Aggregator([] if odd else layer.named_parameters(), CompressConfig()),
        "buckets": lambda: Aggregator(layer.named_parameters(), CompressConfig(), bucket_mib=25 + odd),
    }
    try:
        attempts[case]()
    except ValueError as error:
        return str(error)
    return "nothing"


def vectors(place: Place) -> float:
    """A model without a matrix: how far its gradients are from the mean."""
    model = nn.LayerNorm(30)
    ddp = wrapped(model)
    register(ddp, CompressConfig())
    x = torch.randn(5, 30, generator=torch.Generator().manual_seed(place.rank))
    (local,) = torch.autograd.grad(loss(model(x)), [model.weight])
    loss(ddp(x)).backward()
    assert model.weight.grad is not None
    return float((model.weight.grad - sum(everywhere(local)) / place.world).abs().max())


def apart(model: nn.Module) -> float:
    whole = everywhere(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return max(float((each - whole[0]).abs().max()) for each in whole)


@torch.no_grad()
def descend(model: nn.Module, to_none: bool = True) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p -= 0.05 * p.grad
    model.zero_grad(set_to_none=to_none)
