"""What tests of the running system share: a small job, providers that hold a given share of it, and what one process
that is never disturbed makes of the same job."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from decentral_harness import example, model, traced
from torch import Tensor

from llmsys.decentral.broker import Job
from llmsys.decentral.chain import Chain, chain
from llmsys.decentral.coordinator import Coordinator, Note
from llmsys.decentral.cost import Workload
from llmsys.decentral.decode import trace_decoder
from llmsys.decentral.exports import Exports
from llmsys.decentral.fleet import Fleet, Provider
from llmsys.decentral.generation import Generation
from llmsys.decentral.local import Local
from llmsys.decentral.noise import Noise
from llmsys.decentral.plan import plan
from llmsys.decentral.planes import AdamW, Rules
from llmsys.decentral.planes.layout import packed
from llmsys.decentral.planes.torch_stage import TorchPlane
from llmsys.decentral.training import Training

MICRO_BATCHES, RATE, DECAY = 4, 1e-2, 0.01


def batches(family: str, step: int) -> list[dict[str, Tensor]]:
    """The micro-batches of a step: tokens are the step's own."""
    draw = torch.Generator().manual_seed(step)

    def fresh(name: str, tensor: Tensor) -> Tensor:
        tokens = tensor.dtype == torch.long and tensor.dim() > 1 and name != "attention_mask"
        return torch.randint(2, 64, tensor.shape, generator=draw) if tokens else tensor

    return [{name: fresh(name, each) for name, each in example(family).items()} for _ in range(MICRO_BATCHES)]


def undisturbed(family: str, steps: int, clip: float = 0.0) -> list[tuple[float, ...]]:
    """Losses of each step's micro-batches: the model itself, torch's AdamW, one process."""
    return _undisturbed(family, steps, clip)[0]


def trained(family: str, steps: int) -> dict[str, Tensor]:
    """Its parameters after these steps."""
    return _undisturbed(family, steps, 0.0)[1]


@functools.cache
def _undisturbed(family: str, steps: int, clip: float) -> tuple[list[tuple[float, ...]], dict[str, Tensor]]:
    own = model(family)
    groups = [{"params": [p], "weight_decay": DECAY if p.dim() >= 2 else 0.0} for p in own.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=RATE, foreach=False)
    found = []
    for step in range(1, steps + 1):
        losses = []
        for batch in batches(family, step):
            loss = own(**batch).loss
            (loss / MICRO_BATCHES).backward()
            losses.append(float(loss.detach()))
        if clip:
            named = sorted(own.named_parameters())
            norm = math.sqrt(sum(float(p.grad.double().square().sum()) for _, p in named if p.grad is not None))
            for p in own.parameters():
                if p.grad is not None and norm > clip:
                    p.grad.mul_(clip / norm)
        optimizer.step()
        optimizer.zero_grad()
        found.append(tuple(losses))
    return found, {name: p.detach() for name, p in own.named_parameters()}


def machines(mem_gib: float, count: int) -> list[Provider]:
    """p0, p1, ..., each a little faster than the one before."""
    return [
        Provider(name=f"p{at}", tflops=0.1 + 0.01 * at, mem_gib=mem_gib, up_mbit=500, down_mbit=500)
        for at in range(count)
    ]


@functools.cache
def mem_gib(family: str, stages: int) -> float:
    """Of a provider, so that as many as `stages` hold the job, and fewer do not."""
    return hold(chain(traced(family).graph), Workload(micro_batches=MICRO_BATCHES, most=1), stages)


def hold(own: Chain, work: Workload, stages: int) -> float:
    """GiB of each, for a job."""
    low, high = 1e-6, 1.0
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        try:
            plan(own, Fleet(providers=tuple(machines(middle, stages))), work)
            high = middle
        except ValueError:
            low = middle
    return high * 1.02


def training(family: str, steps: int, **more: object) -> Training:
    own = traced(family)
    rules = Rules(micro_batches=MICRO_BATCHES, optimizer=AdamW(weight_decay=DECAY))
    given = {
        "graph": own.graph,
        "chain": chain(own.graph),
        "tensors": {key: packed(tensor) for key, tensor in own.tensors.items()},
        "rules": rules,
        "data": lambda step: [{k: packed(v) for k, v in each.items()} for each in batches(family, step)],
        "steps": steps,
        "rate": lambda step: RATE,
    }
    return Training(**{**given, **more})  # type: ignore[arg-type]


def job(family: str) -> Job:
    return Job(chain=chain(traced(family).graph), work=Workload(micro_batches=MICRO_BATCHES, most=1))


def generating(
    own: Generation, family: str = "llama", *, compress: str = "none", noise: Noise | None = None
) -> tuple[Job, Training]:
    """By the small model of a family; with noise its first quarter and its end are private."""
    rows = len(own.prompts[0])
    traced = trace_decoder(model(family), rows, own.length, chosen=True, noise=bool(own.temperature))
    training = Training(
        graph=traced.graph,
        chain=chain(traced.graph),
        tensors={key: packed(tensor) for key, tensor in traced.tensors.items()},
        rules=own.rules(),
        data=lambda step: [{k: packed(v) for k, v in each.items()} for each in own.data(step)],
        steps=own.steps,
        rate=lambda step: 0.0,
        exports=Exports(own.rules()),
        copy_every=10**9,
        vocabulary=64,
        rows=rows,
        noise=noise,
    )
    pins = (training.chain.count // 4, 1) if noise else (0, 0)
    work = Workload(train=False, micro_batches=len(own.prompts), most=1, compress=compress, private=pins)
    return Job(chain=training.chain, work=work), training


def together(
    family: str,
    count: int,
    stages: int,
    steps: int,
    watch: Callable[[Local, str, str, int], None] | None = None,
    note: Note = lambda event, more: None,
    **more: object,
) -> Local:
    """`count` providers of which `stages` hold the job, on the torch plane; not begun."""
    local = Local(Coordinator(job(family), training(family, steps, **more), note), watch)
    for each in machines(mem_gib(family, stages), count):
        local.join(each, TorchPlane())
    return local


def advance(local: Local, step: int) -> None:
    """Until it is committed."""
    while local.coordinator.state.step < step:
        local.round()
        local.now += 0.01


def losses_of(coordinator: Coordinator) -> list[tuple[float, ...]]:
    return [coordinator.updates[step].losses for step in sorted(coordinator.updates)]


def losses(local: Local) -> list[tuple[float, ...]]:
    return losses_of(local.coordinator)


@dataclass
class Storm:
    """Of a seed: up to `most` of kills, silences, departures and arrivals at (step, what happens, how often it has),
    while more than `least` are there."""

    seed: int
    steps: int
    least: int
    most: int = 3
    kinds: Sequence[str] = ("kill", "silence", "leave")
    happened: list[tuple[str, str, int, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.due = {
            (self.random.randint(1, self.steps), self.random.choice(["work", "heard"]), self.random.randint(1, 11))
            for _ in range(self.random.randint(1, self.most))
        }
        self.seen: dict[tuple[int, str], int] = {}

    def __call__(self, local: Local, name: str, what: str, step: int) -> None:
        self.seen[step, what] = self.seen.get((step, what), 0) + 1
        place = (step, what, self.seen[step, what])
        if place not in self.due or len(local.providers) <= self.least or name not in local.providers:
            return
        self.due.discard(place)
        kind = self.random.choice(self.kinds)
        self.happened.append((name, what, step, kind))
        if kind == "leave":
            local.leave(name)
        else:
            local.kill(name, noticed=kind == "kill")


@dataclass
class Astray:
    """Of a seed: so many frames, among the first `among`, that do not arrive as they were sent: `drop`, `corrupt` (some
    bits), `duplicate`, `late` (with the next that goes there)."""

    seed: int
    count: int
    among: int
    kinds: Sequence[str] = ("drop", "corrupt", "duplicate", "late")
    happened: list[tuple[int, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.due = {self.random.randrange(self.among): self.random.choice(self.kinds) for _ in range(self.count)}
        self.seen = 0
        self.held: dict[str, list[bytes]] = {}

    def __call__(self, to: str, data: bytes) -> list[bytes]:
        kind = self.due.get(self.seen, "")
        self.seen += 1
        before = self.held.pop(to, [])
        if kind:
            self.happened.append((self.seen, kind, to))
        if kind == "drop":
            return before
        if kind == "late":
            self.held[to] = [*before, data]
            return []
        if kind == "corrupt":
            changed = bytearray(data)
            for _ in range(3):
                changed[self.random.randrange(len(changed))] ^= 1 << self.random.randrange(8)
            data = bytes(changed)
        return [*before, data, data] if kind == "duplicate" else [*before, data]
