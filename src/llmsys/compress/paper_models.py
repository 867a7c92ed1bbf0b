"""The four models of the ACP-SGD paper (arXiv 2306.08881, table 1): every parameter, in the order of registration.

ResNet-50 and ResNet-152 as torchvision has them (arXiv 1512.03385), BERT-Base and BERT-Large as transformers'
`BertForPreTraining` does (arXiv 1810.04805), with a vocabulary padded to a multiple of 8 and the decoder tied to the
embedding: a tied tensor is one parameter, whose gradient is there when the embedding's is.

Beside each shape stand the FLOPs of one example's forward pass, of products and convolutions alone, as `cost.flops`
counts them: at the parameter whose gradient the backward pass has next after them. It goes through the parameters in
reverse, so attention's scores stand at `value`, the last of the three that it reads, and the tied decoder's product at
the norm before it.

Letters: L length, D model width, F feed-forward width, V vocabulary, C channels, S side of an image, K of a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

VOCABULARY = 30528
POSITIONS = 512
CLASSES = 1000
IMAGE = 224


class Parameter(NamedTuple):
    """`flops`: forward, of one example; the backward pass has twice as many."""

    name: str
    shape: tuple[int, ...]
    flops: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PaperModel:
    """`batch`: examples of each GPU, and `r`: width of the factors, as in the paper."""

    title: str
    make: Callable[[], Iterator[Parameter]]
    batch: int
    r: int

    @property
    def parameters(self) -> list[Parameter]:
        return list(self.make())

    @property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(p.name, p.shape) for p in self.make()]


def resnet(depths: tuple[int, ...]) -> Iterator[Parameter]:
    """Bottleneck blocks in four stages; stride 2 at the first 3x3 of a stage."""
    side = IMAGE // 2
    yield from _convolution("conv1", "bn1", 3, 64, 7, side)
    side, c_in = side // 2, 64
    for stage, (depth, width) in enumerate(zip(depths, (64, 128, 256, 512), strict=True)):
        for block in range(depth):
            name = f"layer{stage + 1}.{block}"
            before, side = side, side // 2 if stage and not block else side
            yield from _convolution(f"{name}.conv1", f"{name}.bn1", c_in, width, 1, before)
            yield from _convolution(f"{name}.conv2", f"{name}.bn2", width, width, 3, side)
            yield from _convolution(f"{name}.conv3", f"{name}.bn3", width, 4 * width, 1, side)
            if not block:
                yield from _convolution(f"{name}.downsample.0", f"{name}.downsample.1", c_in, 4 * width, 1, side)
            c_in = 4 * width
    yield from _linear("fc", c_in, CLASSES, 1)


def _convolution(name: str, norm: str, c_in: int, c_out: int, kernel: int, side: int) -> Iterator[Parameter]:
    shape = (c_out, c_in, kernel, kernel)
    yield Parameter(f"{name}.weight", shape, 2.0 * math.prod(shape) * side**2)
    yield from _norm(norm, c_out)


def _linear(name: str, n_in: int, n_out: int, tokens: int, before: float = 0.0) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (n_out, n_in), 2.0 * n_in * n_out * tokens)
    yield Parameter(f"{name}.bias", (n_out,), before)


def _norm(name: str, width: int, before: float = 0.0) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (width,))
    yield Parameter(f"{name}.bias", (width,), before)


def bert(num_layers: int, d: int, f: int, length: int = 64) -> Iterator[Parameter]:
    """With its pooler and both heads of pre-training; `length` is the paper's."""
    yield Parameter("bert.embeddings.word_embeddings.weight", (VOCABULARY, d))
    yield Parameter("bert.embeddings.position_embeddings.weight", (POSITIONS, d))
    yield Parameter("bert.embeddings.token_type_embeddings.weight", (2, d))
    yield from _norm("bert.embeddings.LayerNorm", d)
    for i in range(num_layers):
        name = f"bert.encoder.layer.{i}"
        yield from _linear(f"{name}.attention.self.query", d, d, length)
        yield from _linear(f"{name}.attention.self.key", d, d, length)
        yield from _linear(f"{name}.attention.self.value", d, d, length, before=4.0 * length**2 * d)
        yield from _linear(f"{name}.attention.output.dense", d, d, length)
        yield from _norm(f"{name}.attention.output.LayerNorm", d)
        yield from _linear(f"{name}.intermediate.dense", d, f, length)
        yield from _linear(f"{name}.output.dense", f, d, length)
        yield from _norm(f"{name}.output.LayerNorm", d)
    yield from _linear("bert.pooler.dense", d, d, 1)
    yield Parameter("cls.predictions.bias", (VOCABULARY,))
    yield from _linear("cls.predictions.transform.dense", d, d, length)
    yield from _norm("cls.predictions.transform.LayerNorm", d, before=2.0 * VOCABULARY * d * length)
    yield from _linear("cls.seq_relationship", d, 2, 1)


MODELS = {
    "resnet50": PaperModel(title="ResNet-50", make=lambda: resnet((3, 4, 6, 3)), batch=64, r=4),
    "resnet152": PaperModel(title="ResNet-152", make=lambda: resnet((3, 8, 36, 3)), batch=32, r=4),
    "bert_base": PaperModel(title="BERT-Base", make=lambda: bert(12, 768, 3072), batch=32, r=32),
    "bert_large": PaperModel(title="BERT-Large", make=lambda: bert(24, 1024, 4096), batch=8, r=32),
}
