"""The cells of `compress_robustness.py`: a claim in one sentence each, and the check, which is the same for all.

A cell is called on every rank of a fresh group, once for each of its phases: with `At`, in which there is a way to make
the subject. It returns numbers for the record, or raises `Broken` where its claim does not hold. Everything is in fp64
(torch's default type is set to it), but for bf16.

Of what error feedback holds back, `lag` is ||sum of means - sum of what was applied|| / ||sum of means||.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robustness_models import SHAPES, Given, Net, batch, distance, gradients, mean
from robustness_subjects import Options, Subject

MANY = 0.002
"""MiB of a bucket, of which `Net` then has several."""
EXACT = 1e-9
Grads = Sequence[Tensor]
Make = Callable[..., Subject]
"""(model, Options, resume) -> the subject."""


class Broken(Exception):
    """The claim does not hold: how, in a word (`wrong`, `diverges`, `poisoned`, `dead`), and what was seen."""

    def __init__(self, how: str, what: str) -> None:
        super().__init__(how, what)
        self.how, self.what = how, what


@dataclass(frozen=True, kw_only=True)
class At:
    """Where a check runs. `folder`: what one phase leaves for the next."""

    rank: int
    world: int
    make: Make
    folder: Path
    phase: int = 0

    def subject(self, model: nn.Module, options: Options | None = None, *, resume: bool = False) -> Subject:
        return self.make(model, options or Options(), self.folder if resume else None)


def learn(subject: Subject, at: At, steps: Iterable[int], overflow: int = -1) -> None:
    """`Net` on batches of this rank's own; in step `overflow` rank 1's loss is infinite."""
    for step in steps:
        factor = math.inf if (step, at.rank) == (overflow, 1) else 1.0
        subject.step([distance(batch(at.rank, step), factor)])


def give(subject: Subject, grads: Grads) -> None:
    subject.step([lambda model: model(*grads)])


def lags(subject: Subject, totals: Grads) -> list[float]:
    """By parameter."""
    pairs = zip(totals, subject.optimizer.applied, strict=True)
    return [float((total - applied).norm() / total.norm()) for total, applied in pairs]


def flat(subject: Subject) -> Tensor:
    return torch.cat([p.detach().flatten() for p in subject.model.parameters()])


def everywhere(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def healthy(subject: Subject) -> None:
    """Weights are finite, and the same bits on all ranks."""
    ranks = everywhere(flat(subject))
    if not all(bool(each.isfinite().all()) for each in ranks):
        raise Broken("poisoned", "weights are not finite")
    far = max(float((each - ranks[0]).abs().max()) for each in ranks)
    if not all(torch.equal(each, ranks[0]) for each in ranks):
        raise Broken("diverges", f"replicas are {far:.1e} apart after {subject.optimizer.steps} steps")
    if subject.optimizer.left_out:
        raise Broken("poisoned", f"steps {subject.optimizer.left_out} are not finite")


def close(found: Tensor, wanted: Tensor, what: str, within: float = EXACT) -> float:
    far = float((found - wanted).abs().max() / wanted.abs().max())
    if not far <= within:
        raise Broken("wrong", f"{what}: off by {far:.1e}")
    return far


def many_buckets(at: At) -> dict[str, float]:
    subject = at.subject(Net(), Options(bucket_mib=MANY))
    learn(subject, at, range(50))
    healthy(subject)
    return {"buckets": subject.buckets()}


def overflow(at: At) -> dict[str, float]:
    subject = at.subject(Net())
    learn(subject, at, range(12), overflow=5)
    left_out = everywhere(subject.optimizer.left_out)
    if left_out != [[5]] * at.world:
        raise Broken("poisoned" if all(5 in each for each in left_out) else "wrong", f"steps left out: {left_out[0]}")
    subject.optimizer.left_out.clear()
    healthy(subject)
    never = at.subject(Net())
    learn(never, at, [step for step in range(12) if step != 5])
    return {"off_by": close(flat(subject), flat(never), "weights, of those of a run that never had that step")}


def accumulation(at: At) -> dict[str, float]:
    parts, whole = at.subject(Net()), at.subject(Net())
    for step in range(8):
        xs = [batch(at.rank, step, part) for part in range(4)]
        parts.step([distance(x, 1 / 4) for x in xs])
        whole.step([distance(torch.cat(xs))])
    healthy(parts)
    return {"off_by": close(flat(parts), flat(whole), "weights, of those of the whole batch")}


def resumed(at: At, bucket_mib: float, within: float) -> dict[str, float]:
    """After five steps, in phase 1 with buckets of `bucket_mib`."""
    subject: Subject
    if at.phase == 0:
        subject = at.subject(Net())
        learn(subject, at, range(5))
        subject.save(at.folder)
        torch.save(subject.model.state_dict(), at.folder / f"begin-{at.rank}.pt")
        learn(subject, at, range(5, 10))
        torch.save(flat(subject), at.folder / f"end-{at.rank}.pt")
        return {}
    model = Net()
    model.load_state_dict(torch.load(at.folder / f"begin-{at.rank}.pt"))
    subject = at.subject(model, Options(bucket_mib=bucket_mib), resume=True)
    learn(subject, at, range(5, 10))
    healthy(subject)
    straight = torch.load(at.folder / f"end-{at.rank}.pt")
    return {"off_by": close(flat(subject), straight, "weights, of those of the run that went on", within)}


def another_world(at: At) -> dict[str, float]:
    """Three ranks, of which in phase 1 two are left; both then have the three's mean gradient."""
    subject = at.subject(Given(), resume=at.phase == 1)
    path = at.folder / "applied.pt"
    if at.phase == 0:
        for step in range(5):
            give(subject, gradients(at.rank, step))
        subject.save(at.folder)
    subject.optimizer.applied = [torch.zeros(shape) for shape in SHAPES]
    for step in range(5, 11):
        give(subject, gradients(at.rank, step) if at.phase == 0 else mean(3, step))
    healthy(subject)
    applied = torch.cat([total.flatten() for total in subject.optimizer.applied])
    if at.phase == 0:
        if at.rank == 0:
            torch.save(applied, path)
        return {}
    return {"off_by": close(applied, torch.load(path), "what six steps apply, of what three ranks would")}


def unequal_seeds(at: At) -> dict[str, float]:
    model = Net()
    torch.manual_seed(1000 + at.rank)
    random.seed(at.rank)
    subject = at.subject(model)
    for step in range(50):
        learn(subject, at, range(step, step + 1))
        torch.randn(at.rank)  # as dropout would draw
    healthy(subject)
    return {}


def zero_gradients(at: At) -> dict[str, float]:
    """At r = 2 and at r = 4: torch makes factors orthonormal in one way up to 2 and in another beyond."""
    found = {}
    for r in (2, 4):
        subject = at.subject(Given(), Options(r=r))
        for _ in range(6):
            give(subject, [torch.zeros(shape) for shape in SHAPES])
        moved = float(flat(subject).abs().sum())
        if subject.optimizer.left_out or moved != 0:
            steps = subject.optimizer.left_out
            raise Broken("poisoned", f"r = {r}: steps {steps} of zeros are not finite, weights moved by {moved:.1e}")
        total = [torch.zeros(shape) for shape in SHAPES]
        for step in range(20):
            give(subject, gradients(at.rank, step))
            total = [a + b for a, b in zip(total, mean(at.world, step), strict=True)]
        healthy(subject)
        found[f"lag_r{r}"] = max(lags(subject, total))
        if not found[f"lag_r{r}"] < 0.25:
            share = 100 * (1 - found[f"lag_r{r}"])
            raise Broken("dead", f"r = {r}: of a matrix {share:.0f} % of 20 later gradients' sum is ever applied")
    return found


def vectors_only(at: At) -> dict[str, float]:
    shapes = ((32,), (7,))
    subject = at.subject(Given(shapes))
    total = [torch.zeros(shape) for shape in shapes]
    for step in range(6):
        give(subject, gradients(at.rank, step, shapes))
        total = [a + b for a, b in zip(total, mean(at.world, step, shapes), strict=True)]
    healthy(subject)
    if not (far := max(lags(subject, total))) <= EXACT:
        raise Broken("wrong", f"the sum of six gradients is off by {far:.1e}")
    return {"off_by": far}


def half_precision(at: At) -> dict[str, float]:
    """Once in fp64 and once in bf16, with the same gradients, which bf16 has exactly."""
    found = {}
    for name, dtype in (("fp64", torch.float64), ("bf16", torch.bfloat16)):
        with default_type(torch.float64 if dtype == torch.float64 else torch.float32):
            subject = at.subject(Given().to(dtype))
            total = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
            for step in range(20):
                with default_type(torch.float64):
                    ranks = [[g.to(torch.bfloat16) for g in gradients(rank, step)] for rank in range(at.world)]
                give(subject, [g.to(dtype) for g in ranks[at.rank]])
                means = [torch.stack(each).double().mean(0) for each in zip(*ranks, strict=True)]
                total = [a + b for a, b in zip(total, means, strict=True)]
            healthy(subject)
            found[f"lag_{name}"] = max(lags(subject, total)[:-1])
    if not found["lag_bf16"] < 1.2 * found["lag_fp64"]:
        seen = ", ".join(f"{found[f'lag_{name}']:.3f} in {name}" for name in ("bf16", "fp64"))
        raise Broken("wrong", f"of the sum of 20 gradients is missing {seen}")
    return found


def wide(at: At) -> dict[str, float]:
    """Methods that take half a power iteration a step are exact on every second one."""
    subject = at.subject(Given(), Options(r=64, every=True))
    total = [torch.zeros(shape) for shape in SHAPES]
    each: list[list[float]] = []
    for step in range(12):
        give(subject, gradients(at.rank, step))
        total = [a + b for a, b in zip(total, mean(at.world, step), strict=True)]
        each.append(lags(subject, total))
    healthy(subject)
    worst = max(min(pair) for pair in zip(each[-2], each[-1], strict=True))
    if not worst <= 1e-6:  # torch's epsilon of 1e-8 is seen
        raise Broken("wrong", f"of the sum of the gradients {worst:.1e} is missing")
    return {"lag": worst}


@dataclass(frozen=True)
class Cell:
    """`worlds`: how many ranks each phase has. `repeats`: of one in which threads race."""

    claim: str
    check: Callable[[At], dict[str, float]]
    worlds: tuple[int, ...] = (2,)
    repeats: int = 1


MORE = "50 steps with a bucket of 2 kB, on {} ranks: no hang, and replicas equal to the bit"
CELLS = {
    "many buckets, 2 ranks": Cell(MORE.format(2), many_buckets, repeats=3),
    "many buckets, 4 ranks": Cell(MORE.format(4), many_buckets, worlds=(4,), repeats=3),
    "inf on one rank": Cell(
        "step 5 of 12 is left out by both ranks, and the others give the weights that they give without it", overflow
    ),
    "accumulation x4": Cell("eight steps of four micro-batches give the weights that whole batches give", accumulation),
    "resume, bit-exact": Cell(
        "saved after five steps, between a P and a Q, and read by new processes: five more give the same bits",
        partial(resumed, bucket_mib=25.0, within=0.0),
        worlds=(2, 2),
    ),
    "resume, other buckets": Cell(
        "the same, from one bucket to several: the same weights, but for rounding (1e-9)",
        partial(resumed, bucket_mib=MANY, within=EXACT),
        worlds=(2, 2),
    ),
    "resume, other world": Cell(
        "saved on three ranks, read on two that have the same mean gradient: what is applied stays the same (1e-9)",
        another_world,
        worlds=(3, 2),
    ),
    "unequal seeds": Cell("ranks seeded differently have the same bits after 50 steps", unequal_seeds),
    "zero gradients": Cell(
        "six steps of zeros change nothing, and of 20 gradients after them over 3/4 is applied", zero_gradients
    ),
    "vectors only": Cell("the gradients of a model without a matrix are the exact mean", vectors_only),
    "bf16": Cell("of 20 gradients in bf16 at most 1.2 times as much is held back as in fp64", half_precision),
    "r above the matrix": Cell("r = 64 of matrices of 12 to 32: nothing is held back longer than a step (1e-6)", wide),
}


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run(name: str, at: At) -> dict[str, float]:
    with default_type(torch.float64):
        return CELLS[name].check(at)
