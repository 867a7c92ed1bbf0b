"""ResNet (arXiv 1512.03385) and VGG with batch norm (arXiv 1409.1556): convolution, batch norm, ReLU, over and over.

Of each such layer autograd keeps the convolution's output (batch norm reads it again) and ReLU's output, which is the
next convolution's input; the sum at a residual block's end is made in place. So a network keeps two values for each
that it computes, and a block without recomputation costs what its resolution says.
Letters: B batch, C channels, S image side, K kernel side. Batch norm is fp32 in a bf16 network.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from llmsys import schema
from llmsys.cost.families.base import Linear, Shape

if TYPE_CHECKING:
    from llmsys.cost.notes import Tensor
    from llmsys.cost.walk import Walk


class Conv(NamedTuple):
    """A convolution with its batch norm; `relu`: followed by one."""

    name: str
    c_in: int
    c_out: int
    kernel: int
    stride: int = 1
    relu: bool = True


class Block(NamedTuple):
    """Convolutions in a row, and what a residual takes past them (None: the input itself, or no residual)."""

    name: str
    layers: list[Conv]
    shortcut: Conv | None = None


def linears(model: schema.ConvNet) -> list[Linear]:
    return []


def blocks(model: schema.ConvNet) -> Iterator[list[Block]]:
    """The blocks of each stage."""
    width = _stem(model).c_out if model.family == "resnet" else model.channels
    for i, (depth, out) in enumerate(zip(model.depths, model.widths, strict=True)):
        stage = []
        for j in range(depth):
            if model.family == "vgg":
                name = f"stages.{i}.layers.{j}"
                stage.append(Block(name, [Conv(name, width, out, 3)]))
            else:
                name, stride = f"resnet.encoder.stages.{i}.layers.{j}", 2 if i and not j else 1
                stage.append(_residual(model, name, width, out, stride))
            width = out
        yield stage


def _residual(model: schema.ConvNet, name: str, c_in: int, c_out: int, stride: int) -> Block:
    if model.block == "basic":
        sizes = [(c_in, c_out, 3, stride), (c_out, c_out, 3, 1)]
    else:
        middle = c_out // 4
        sizes = [(c_in, middle, 1, 1), (middle, middle, 3, stride), (middle, c_out, 1, 1)]
    layers = [Conv(f"{name}.layer.{i}", *size, relu=i + 1 < len(sizes)) for i, size in enumerate(sizes)]
    projects = c_in != c_out or stride != 1
    return Block(name, layers, Conv(f"{name}.shortcut", c_in, c_out, 1, stride, relu=False) if projects else None)


def _stem(model: schema.ConvNet) -> Conv:
    width = model.widths[0] // (4 if model.block == "bottleneck" else 1)
    kernel, stride = (7, 2) if model.stem == "imagenet" else (3, 1)
    return Conv("resnet.embedder.embedder", model.channels, width, kernel, stride)


def _convs(model: schema.ConvNet) -> Iterator[Conv]:
    if model.family == "resnet":
        yield _stem(model)
    for stage in blocks(model):
        for block in stage:
            yield from block.layers
            if block.shortcut:
                yield block.shortcut


def parameters(model: schema.ConvNet, num_labels: int) -> dict[str, Shape]:
    table: dict[str, Shape] = {}
    for conv in _convs(model):
        table[f"{conv.name}.convolution.weight"] = (conv.c_out, conv.c_in, conv.kernel, conv.kernel)
        if model.family == "vgg":
            table[f"{conv.name}.convolution.bias"] = (conv.c_out,)
        table |= {f"{conv.name}.normalization.{leaf}": (conv.c_out,) for leaf in ("weight", "bias")}
    head = "classifier.1" if model.family == "resnet" else "classifier"
    labels = num_labels or model.num_classes
    return {**table, f"{head}.weight": (labels, model.widths[-1]), f"{head}.bias": (labels,)}


def buffer_bytes(model: schema.ConvNet) -> int:
    """Running mean and variance of each channel in fp32, and an int64 count of batches."""
    return sum(2 * 4 * conv.c_out + 8 for conv in _convs(model))


def play(walk: Walk) -> None:
    model, tape = walk.model, walk.tape
    assert isinstance(model, schema.ConvNet)
    tape.elsewhere("stem")
    x = tape.new(walk.batch * model.channels * model.image_size**2, walk.width, False)
    side = model.image_size
    if model.family == "resnet":
        x, side = _conv(walk, _stem(model), x, side)
        if model.stem == "imagenet":
            x, side = _pool(walk, x, side, (side + 1) // 2)
    for stage in blocks(model):
        for block in stage:
            tape.block(block.name, x, residual=model.family == "resnet")
            x, side = _block(walk, block, x, side)
        if model.family == "vgg":
            tape.elsewhere(f"{block.name} pool")
            x, side = _pool(walk, x, side, side // 2)
    tape.elsewhere("head")
    features = tape.dropout(tape.new(walk.batch * model.widths[-1], x.width, x.grad), model.dropout)
    labels = walk.case.labels
    walk.loss(tape.linear(features, model.widths[-1], labels, walk.width, walk.trained), walk.batch)


def _block(walk: Walk, block: Block, x: Tensor, side: int) -> tuple[Tensor, int]:
    out, after = x, side
    for conv in block.layers:
        out, after = _conv(walk, conv, out, after)
    if block.layers[-1].relu:
        return out, after
    past = _conv(walk, block.shortcut, x, side)[0] if block.shortcut else x
    return walk.tape.from_output(walk.tape.new(out.numel, out.width, out.grad or past.grad)), after


def _conv(walk: Walk, conv: Conv, x: Tensor, side: int) -> tuple[Tensor, int]:
    """Padded by half the kernel: the side is divided by the stride, rounded up."""
    tape, side = walk.tape, -(-side // conv.stride)
    weights, numel = conv.c_in * conv.c_out * conv.kernel**2, walk.batch * conv.c_out * side**2
    y = tape.convolution(x, weights, numel, 2.0 * numel * conv.c_in * conv.kernel**2, walk.width, walk.trained)
    y = tape.batch_norm(y, conv.c_out, walk.trained)
    return tape.from_output(y) if conv.relu else y, side


def _pool(walk: Walk, x: Tensor, side: int, after: int) -> tuple[Tensor, int]:
    y = walk.tape.new(x.numel // side**2 * after**2, x.width, x.grad)
    if x.grad:
        walk.tape.save(x, walk.tape.new(y.numel, 8, False))
    return y, after
