"""Compressed gradients by arithmetic on shapes: what is worth compressing, what travels and what is kept.

A gradient [N, ...] is the matrix [N, M] with M the product of the rest. A vector has no low rank and travels whole.
Sizes of one step, of d elements in all of which w travel whole, on W ranks, in bytes:

    none           all_reduce the gradients as they are; fp16, bf16: 2 d
    sign           all_to_all and all_gather W (ceil(d / 8 / W) + 1) each: bits, and a flag
    efsign         all_gather W (4 (tensors + w) + bits of the others)
    topk           all_gather W (8 k + 4 w), k elements of each tensor, with their places
    randomk        all_reduce 4 (k + w)
    powersgd       all_reduce 4 (sum (N + M) r + w), in two rounds
    acpsgd         all_reduce 4 (sum N r + w) on even steps, 4 (sum M r + w) on odd ones

where `wire=bf16` halves an all_reduce, and so does half precision where all of it travels whole. This is of one bucket:
of `sign` each further one adds at most 2 W bytes, and one that has only what travels whole is in the gradients' type.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from llmsys.cost.families import Shape
from llmsys.schema.compress import LOW_RANK, SPARSE, Settings

Named = tuple[str, Shape, int]
"""Name, shape and bytes an element of a gradient."""


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """(N, M) of a gradient that has at least two dimensions."""
    return shape[0], math.prod(shape[1:])


def width(shape: Sequence[int], r: int) -> int:
    """The rows of its factors: a matrix has no more than min(N, M) directions."""
    return min(r, *matrix(shape))


def low_rank(name: str, shape: Sequence[int], config: Settings) -> bool:
    """Whether Power-SGD or ACP-SGD sends factors of it; the same matrices at every step of a schedule of ranks."""
    if config.method not in LOW_RANK or len(shape) < 2 or 0 in shape or config.skips(name):
        return False
    return min(matrix(shape)) > config.min_rate * config.widest or not config.min_rate


def kept(numel: int, density: float) -> int:
    """How many of `numel` elements Top-k and Random-k send: at least one, as the published code has it."""
    return min(numel, max(1, round(density * numel)))


def state_bytes(gradients: Iterable[Named], config: Settings) -> tuple[int, int]:
    """(bytes of errors, bytes of factors) that a rank keeps between steps."""
    errors = factors = 0
    for name, shape, nbytes in gradients:
        low = low_rank(name, shape, config)
        if config.feedback and (low or (config.method not in LOW_RANK and not config.skips(name))):
            errors += math.prod(shape) * (nbytes if config.error_dtype == "half" else max(4, nbytes))
        if low:
            factors += sum(matrix(shape)) * width(shape, config.widest) * max(4, nbytes)
    return errors, factors


def _compressed(name: str, shape: Sequence[int], config: Settings) -> bool:
    return low_rank(name, shape, config) if config.method in LOW_RANK else not config.skips(name)


def step_bytes(gradients: Sequence[Named], config: Settings, world: int, step: int) -> dict[str, int]:
    """Bytes of the whole tensors of the collectives of `step` (from 0), by kind, as `comm.traffic` counts them."""
    method, elements = config.method, sum(math.prod(shape) for _, shape, _ in gradients)
    if method in ("none", "fp16", "bf16"):
        whole = sum(math.prod(shape) * nbytes for _, shape, nbytes in gradients)
        return {"all_reduce": whole if method == "none" else 2 * elements}
    if method == "sign":
        votes = world * (math.ceil(math.ceil(elements / 8) / world) + 1)
        return {"all_to_all": votes, "all_gather": votes}
    wire = 2 if config.wire == "bf16" else 4
    if method in (*LOW_RANK, "randomk") and not any(_compressed(name, shape, config) for name, shape, _ in gradients):
        return {"all_reduce": sum(math.prod(shape) * min(wire, nbytes) for _, shape, nbytes in gradients)}
    if method in LOW_RANK:
        return {"all_reduce": wire * _low_rank_elements(gradients, config, step)}
    sent = [math.prod(shape) for name, shape, _ in gradients if not config.skips(name)]
    whole = elements - sum(sent)
    if method == "efsign":
        return {"all_gather": world * (4 * (len(sent) + whole) + sum(math.ceil(numel / 8) for numel in sent))}
    assert method in SPARSE, f"no cost is known for compress.kind={method}"
    chosen = sum(kept(numel, config.density) for numel in sent)
    if method == "randomk":
        return {"all_reduce": wire * (chosen + whole)}
    return {"all_gather": world * (8 * chosen + 4 * whole)}


def _low_rank_elements(gradients: Sequence[Named], config: Settings, step: int) -> int:
    found = 0
    for name, shape, _ in gradients:
        if config.refreshes(step) or not low_rank(name, shape, config):
            found += math.prod(shape)
            continue
        n, m = matrix(shape)
        sides = n + m if config.method == "powersgd" else (n if step % 2 == 0 else m)
        found += sides * width(shape, config.r_at(step))
    return found


def mean_bytes(gradients: Sequence[Named], config: Settings, world: int, steps: int) -> dict[str, int]:
    """`step_bytes` on average over the first `steps` steps."""
    if config.method not in LOW_RANK:
        return step_bytes(gradients, config, world, 0)
    alike: dict[tuple[int, bool, int], list[int]] = {}
    for step in range(steps):
        alike.setdefault((config.r_at(step), config.refreshes(step), step % 2), []).append(step)
    total: Counter[str] = Counter()
    for group in alike.values():
        for kind, nbytes in step_bytes(gradients, config, world, group[0]).items():
            total[kind] += nbytes * len(group)
    return {kind: round(nbytes / steps) for kind, nbytes in total.items()}
