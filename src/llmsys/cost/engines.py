"""What one rank holds under each engine, in bytes, beside what autograd saves.

    local, ddp   everything whole; DDP's gradients are views into its buckets, so they cost what they cost alone
    deepspeed    ZeRO (arXiv 1910.02054); what is divided by the stage:
                   0  nothing
                   1  fp32 master weights and moments, of which each rank has a flat slice (in fp32 too: a copy)
                   2  gradients too, which the optimizer reads in fp32
                   3  weights too, each parameter by itself
                 offload puts master weights, moments and the optimizer's gradients into the host's memory, and
                 `optimizer+params` the slices of the weights
    fsdp2        every parameter cut along its first dimension, padded to equal shares; gradients and moments alike
    tp           the linear layers of the blocks and the head cut over the ranks; norms and embeddings whole

Gradient compression adds what a rank keeps of earlier gradients (`compressed`), and for a moment what it sends and
receives; under DeepSpeed, where all gradients are exchanged at once, also a copy of them.

AdamW keeps two moments and a 4-byte step count for each tensor it is given: a parameter, or under ZeRO a flat slice of
one of its two groups (matrices, which decay, and vectors, which do not). DeepSpeed's CPU Adam counts steps in Python.
So does AdamW in 8 bits (`train.adamw_8bit`), whose moments are a byte an element and a 4-byte scale for each run of
256; tensors of fewer than 4096 elements keep fp32 moments.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from llmsys import schema
from llmsys.cost import compressed, shapes
from llmsys.cost.case import Case
from llmsys.cost.shapes import Parameter

BUCKET = 50_000_000
"""The most elements of a bucket in which ZeRO reduces gradients; as many as are trained where those are fewer."""


@dataclass(frozen=True, kw_only=True)
class Holding:
    """Bytes of a rank by kind; `host` is the share of each kind that an engine keeps in the host's memory.

    `fleeting` is what is on the device for a moment only, at the peak: gathered weights, and buckets. `compress` is
    what gradient compression keeps.
    """

    weights: int
    gradients: int
    optimizer: int
    master: int = 0
    compress: int = 0
    host: dict[str, int] = field(default_factory=dict)
    fleeting: int = 0


RUN, SMALL = 256, 4096
"""Of the 8-bit AdamW: elements that have one scale, and those under which a tensor's moments stay in fp32."""
TABLES = 2 * 256 * 4
"""Its two tables of 256 fp32 values, one for all tensors."""


def hold(case: Case) -> Holding:
    """What a rank of `case` holds."""
    if case.method.kind == "majority":
        return Holding(weights=0, gradients=0, optimizer=0)
    parameters = shapes.held(case)
    holding = ENGINES[case.engine.kind](case, parameters)
    holding = dataclasses.replace(holding, weights=holding.weights + shapes.buffer_bytes(case))
    return holding if case.compress.kind == "none" else _compressed(case, holding, parameters)


def _compressed(case: Case, holding: Holding, parameters: list[Parameter]) -> Holding:
    """At the peak everything that is sent and has arrived is there, in all buckets, and of those methods that look at
    the size of elements the largest tensor once more, in fp32."""
    gradients = [(p.name, p.shape, p.width) for p in parameters if p.trained]
    config, world = case.compress, case.train.world
    wire = max(
        2 * sum(compressed.step_bytes(gradients, config, world, step).values())
        for step in (0, 1, *([config.refresh_every] if config.refresh_every else []))
    )
    looks = config.kind in ("topk", "efsign") and max((4 * p.numel for p in parameters if p.trained), default=0)
    copied = sum(p.nbytes for p in parameters if p.trained) if case.engine.kind == "deepspeed" else 0
    return dataclasses.replace(
        holding,
        compress=sum(compressed.state_bytes(gradients, config)),
        fleeting=holding.fleeting + wire + looks + copied,
    )


def _whole(case: Case, parameters: list[Parameter]) -> Holding:
    trained = [p for p in parameters if p.trained]
    return Holding(
        weights=sum(p.nbytes for p in parameters),
        gradients=sum(p.nbytes for p in trained),
        optimizer=_moments(case, [(p.numel, p.width) for p in trained]),
    )


def _moments(case: Case, tensors: list[tuple[int, int]]) -> int:
    """Bytes of AdamW's state of (elements, bytes each of a moment in full); those of 8-bit AdamW are fp32 or 8 bits."""
    if case.train.optimizer == "adamw":
        return sum(2 * numel * width + 4 for numel, width in tensors)
    large = [numel for numel, _ in tensors if numel >= SMALL]
    small = sum(numel for numel, _ in tensors if numel < SMALL)
    return 8 * small + sum(2 * numel + 8 * -(-numel // RUN) for numel in large) + (TABLES if large else 0)


def _cut(case: Case, parameters: list[Parameter]) -> Holding:
    return _whole(case, [_share(p, p.cut, case.train.world) for p in parameters])


def _sharded(case: Case, parameters: list[Parameter]) -> Holding:
    """At the peak one block is gathered for use and the next one in advance; without resharding all of them are."""
    assert isinstance(case.engine, schema.FSDP2)
    whole = {unit: sum(p.nbytes for p in group) for unit, group in _units(case, parameters).items()}
    outside = whole.pop("", 0)
    gathered = sum(sorted(whole.values())[-2:]) if case.engine.reshard else sum(whole.values())
    holding = _whole(case, [_share(p, 0, case.train.world) for p in parameters])
    return dataclasses.replace(holding, fleeting=outside + gathered)


def _share(parameter: Parameter, dim: int | None, world: int) -> Parameter:
    """The largest share of a parameter that is cut along `dim` (None: not cut)."""
    if dim is None or world == 1:
        return parameter
    shape = tuple(-(-size // world) if i == dim else size for i, size in enumerate(parameter.shape))
    return parameter._replace(shape=shape)


def _units(case: Case, parameters: list[Parameter]) -> dict[str, list[Parameter]]:
    """Parameters by the block that they belong to; what lies outside the blocks under ''."""
    blocks = shapes.blocks(case.model)
    units: dict[str, list[Parameter]] = {}
    for p in parameters:
        block = next((block for block in blocks if p.name.startswith(block + ".")), "")
        units.setdefault(block, []).append(p)
    return units


def _deepspeed(case: Case, parameters: list[Parameter]) -> Holding:
    assert isinstance(case.engine, schema.DeepSpeed)
    return (_zero_0, _zero_1_2, _zero_1_2, _zero_3)[case.engine.zero](case, case.engine, parameters)


def _zero_0(case: Case, engine: schema.DeepSpeed, parameters: list[Parameter]) -> Holding:
    """As on one rank. DeepSpeed's CPU Adam has fp32 moments whatever the weights are."""
    holding, trained = _whole(case, parameters), [p.numel for p in parameters if p.trained]
    return holding if engine.optimizer == "torch" else dataclasses.replace(holding, optimizer=8 * sum(trained))


def _zero_1_2(case: Case, engine: schema.DeepSpeed, parameters: list[Parameter]) -> Holding:
    # each group flat, padded so that every slice begins at a multiple of two elements
    padded = [_round_up(sum(group), 2 * case.train.world) for group in _groups(parameters)]
    slices = [size // case.train.world for size in padded]
    elements = sum(slices)
    trained = sum(p.numel for p in parameters if p.trained)
    holding = Holding(
        weights=sum(p.nbytes for p in parameters if not p.trained) + case.width * sum(padded),
        gradients=case.width * trained if engine.zero == 1 else 4 * elements,
        optimizer=_slices(case, engine, slices),
        master=4 * elements,
        fleeting=case.width * min(trained, BUCKET),
    )
    return holding if engine.offload == "none" else _offloaded(holding, engine)


def _zero_3(case: Case, engine: schema.DeepSpeed, parameters: list[Parameter]) -> Holding:
    """At the peak the largest parameter is gathered, and the next; gradients lie in the model's dtype in a buffer of
    their own beside those that the optimizer reads."""
    world = case.train.world
    slices = [sum(-(-numel // world) for numel in group) for group in _groups(parameters)]
    elements = sum(slices)
    bucket = case.width * min(sum(p.numel for p in parameters if p.trained), BUCKET)
    gathered = 2 * max(p.nbytes for p in parameters)
    holding = Holding(
        weights=sum(-(-p.numel // world) * p.width for p in parameters),
        gradients=4 * elements,
        optimizer=_slices(case, engine, slices),
        master=4 * elements,
        fleeting=gathered + bucket + (case.width * elements if engine.offload == "none" else 0),
    )
    return holding if engine.offload == "none" else _offloaded(holding, engine)


def _offloaded(holding: Holding, engine: schema.DeepSpeed) -> Holding:
    """With the optimizer go the gradients that it reads; stage 1 has them all on the device first."""
    host = {"optimizer": holding.optimizer, "master": holding.master}
    if engine.zero > 1:
        host["gradients"] = holding.gradients
    if engine.offload == "optimizer+params":
        host["weights"] = holding.weights
    return dataclasses.replace(holding, host=host)


def _groups(parameters: list[Parameter]) -> list[list[int]]:
    """Elements of what is trained, in AdamW's two groups; empty ones left out."""
    trained = [p for p in parameters if p.trained]
    matrices = [p.numel for p in trained if len(p.shape) >= 2]
    vectors = [p.numel for p in trained if len(p.shape) < 2]
    return [group for group in (matrices, vectors) if group]


def _slices(case: Case, engine: schema.DeepSpeed, slices: list[int]) -> int:
    """Bytes of the moments of a rank's flat slices; DeepSpeed's CPU Adam has no step count in a tensor."""
    return _moments(case, [(numel, 4) for numel in slices]) if engine.optimizer == "torch" else 8 * sum(slices)


def _round_up(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


ENGINES: dict[str, Callable[[Case, list[Parameter]], Holding]] = {
    "local": _whole,
    "ddp": _whole,
    "deepspeed": _deepspeed,
    "fsdp2": _sharded,
    "tp": _cut,
}
