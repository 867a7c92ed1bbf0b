"""Every parameter of a model by name, from the published shape: the arithmetic that the other cost models stand on.

Each family's own table is in `families`; here is what holds for all of them: which layers get adapters, what is
trained, and what quantisation makes of a frozen weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator
from typing import NamedTuple

from llmsys import schema
from llmsys.cost.case import Case
from llmsys.cost.families import FAMILIES, Linear, Shape
from llmsys.cost.kept import Kept

BLOCK = re.compile(r"(?:^|\.)(?:layers?|h|block)\.\d+(?=\.|$)")
"""Up to the end of a block's name; its leftmost match, since T5 and ResNet have a `layer.0` inside their blocks."""

SHARING: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
)
"""Names of layers that read the same input, where they are parts of one module."""


class Parameter(NamedTuple):
    """One tensor of the model: `width` is bytes an element; `cut` the dimension that tensor parallelism divides."""

    name: str
    shape: Shape
    width: int
    trained: bool = False
    cut: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.width


def parameters(model: schema.Model, num_labels: int = 0) -> dict[str, Shape]:
    """Name -> shape of every parameter, as the built model names them; tied tensors once.

    `num_labels`: classes of a text classifier, 0 leaves its head out.
    """
    return FAMILIES[model.family].parameters(model, num_labels)


def num_params(model: schema.Model, num_labels: int = 0) -> int:
    """Parameters of a model, by arithmetic; see `parameters`."""
    return sum(math.prod(shape) for shape in parameters(model, num_labels).values())


def linears(model: schema.Model) -> list[Linear]:
    """The linear layers of all blocks, in the model's order."""
    return list(_linears(model))


def _all_linears(model: schema.Model) -> list[Linear]:
    return FAMILIES[model.family].linears(model)


_linears = Kept(_all_linears, repr, 32)


def blocks(model: schema.Model) -> list[str]:
    """Names of the repeated blocks, by the rule of `models.surgery.blocks`."""
    found = (BLOCK.search(name) for name in parameters(model))
    return list(dict.fromkeys(match.string[: match.end()] for match in found if match))


def adapted(case: Case) -> list[Linear]:
    """The linear layers that get an adapter, by the rule of `models.surgery.linear_names`."""
    return [] if case.adapter is None else _targeted(case.model, case.adapter)


def _targeted(model: schema.Model, adapter: schema.Adapter) -> list[Linear]:
    layers = linears(model)
    for target in adapter.targets:
        if not any(fits(layer.name, target) for layer in layers):
            there = ", ".join(dict.fromkeys(layer.name.rsplit(".", 1)[-1] for layer in layers))
            raise ValueError(f"method.targets={target}: no such linear layer in the blocks; there are {there}")
    if not adapter.targets:
        return layers
    return [layer for layer in layers if any(fits(layer.name, target) for target in adapter.targets)]


def check_adapters(model: schema.Model, method: schema.Method) -> None:
    """ValueError where adapters name no layer of the model's shape, or are wider than one, before there is a model.

    peft's may be wider: there that is waste, here A's rows could not be orthonormal.
    """
    if not isinstance(method, schema.Adapter):
        return
    layers = _targeted(model, method)
    if not isinstance(method, schema.LoRA):
        return
    for name, n_in, n_out, _ in layers:
        if method.r > min(n_in, n_out):
            raise ValueError(f"method.r={method.r}: exceeds the width of {name}, which is {n_in} x {n_out}")
    if method.bias != "none" and not {f"{layer.name}.bias" for layer in layers} & parameters(model).keys():
        raise ValueError(f"method.bias={method.bias}: no layer in method.targets has a bias")


def fits(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def is_head(name: str) -> bool:
    """A classification head is new, so adapters train it in full."""
    return name.split(".")[0] == "classifier"


def held(case: Case) -> list[Parameter]:
    """Every parameter of the model as `method` and `model.quant` leave it, adapters included."""
    return list(_held(case))


def _read(case: Case) -> tuple[Hashable, ...]:
    """What parameters depend on; ZeRO casts adapters."""
    return repr(case.model), repr(case.method), case.num_labels, min(case.zero, 1)


def _whole(case: Case) -> list[Parameter]:
    return [] if case.method.kind == "majority" else [*_base(case), *_adapters(case)]


_held = Kept(_whole, _read, 128)


def _base(case: Case) -> Iterator[Parameter]:
    layers = {f"{layer.name}.weight": layer for layer in linears(case.model)}
    quantised = layers if case.model.quant != "none" else {}
    biases = {f"{layer.name}.bias" for layer in adapted(case)} if case.fused and case.fused.bias != "none" else set()
    for name, shape in parameters(case.model, case.labels).items():
        whole = case.method.kind == "full" and f"{name.rpartition('.')[0]}.weight" not in quantised
        trained = whole or (case.adapter is not None and is_head(name)) or name in biases
        if name in layers and case.model.quant != "none":
            width = case.width if case.model.quant == "nf4" and math.prod(shape) % 8 == 0 else 1
            yield Parameter(name, (packed_bytes(math.prod(shape), case.model.quant) // width,), width)
        else:
            yield Parameter(name, shape, _width(case, name), trained, _cut(name, layers))


def _width(case: Case, name: str) -> int:
    """Batch norm stays in fp32 in a bf16 network."""
    return 4 if isinstance(case.model, schema.ConvNet) and ".normalization." in name else case.width


def _cut(name: str, layers: dict[str, Linear]) -> int | None:
    """The dimension that tensor parallelism divides: none of a norm, an embedding, or a bias added after the sum."""
    if name == "lm_head.weight":
        return 0
    stem, _, leaf = name.rpartition(".")
    layer = layers.get(f"{stem}.weight")
    if layer is None or (leaf == "bias" and layer.cut == 1):
        return None
    return layer.cut


def packed_bytes(numel: int, quant: str) -> int:
    """Bytes of a quantised weight without its scales: what an engine may cut. 4-bit ones are stored as the model's own
    dtype where they fill a whole number of it."""
    return numel if quant == "int8" else -(-numel // 2)


def scale_bytes(numel: int, rows: int, quant: str) -> int:
    """Bytes of a quantised weight's scales, as `models.quant` derives them: whole on every rank."""
    if quant == "int8":
        return 4 * rows
    scales = -(-numel // 64)
    return scales + 4 * -(-scales // 256) + 4


def _scales(model: schema.Model) -> int:
    """Bytes of all scales, and of NF4's two tables."""
    if model.quant == "none":
        return 0
    sizes = (scale_bytes(layer.n_in * layer.n_out, layer.n_out, model.quant) for layer in linears(model))
    return sum(sizes) + 4 * (16 + 256) * (model.quant == "nf4")


def _adapters(case: Case) -> Iterator[Parameter]:
    if case.adapter is None:
        return
    r, width = case.adapter.r, case.adapter_width
    owner = owners(case)
    for layer in adapted(case):
        # beside a matrix that is cut by outputs B is cut, beside one that is cut by inputs A is
        a_cut, b_cut = (None, 0) if layer.cut == 0 else (1, None)
        if case.fused is None or (case.fused.train_a and owner[layer.name] == layer.name):
            trained = case.method.kind in ("lora_peft", "lora")
            yield Parameter(f"{layer.name}.lora_A", (r, layer.n_in), width, trained, a_cut)
        yield Parameter(f"{layer.name}.lora_B", (layer.n_out, r), width, True, b_cut)


def owners(case: Case) -> dict[str, str]:
    """Name of each adapted layer -> of the one whose A it uses: with `share_a` the first that reads the same input."""
    found: dict[str, str] = {}
    for layer in adapted(case):
        parent, _, own = layer.name.rpartition(".")
        group: tuple[str, ...] = next((names for names in SHARING if own in names), (own,))
        if parent.endswith("EncDecAttention"):  # whose query reads the decoder
            group = tuple(name for name in group if (name == "q") == (own == "q"))
        siblings = [f"{parent}.{name}" for name in group] if case.fused and case.fused.share_a else []
        found[layer.name] = next((name for name in siblings if name in found), layer.name)
    return found


def buffer_bytes(case: Case) -> int:
    """Bytes of what the model keeps beside its parameters (rotary frequencies, position ids, running statistics, the
    scales of a quantised base), and of a frozen A, which is a buffer in the dtype of the weight beside it, and the
    inverse of A A^T where it is used."""
    found = FAMILIES[case.model.family].buffer_bytes(case.model) + _scales(case.model)
    if case.fused is None:
        return found
    layers, r = adapted(case), case.fused.r
    if case.fused.correction != "none":
        found += len(layers) * r * r * (2 if case.zero and case.width == 2 else 4)
    if case.fused.train_a:
        return found
    owner = owners(case)
    return found + sum(r * layer.n_in * case.frozen_width for layer in layers if owner[layer.name] == layer.name)


def trainable_params(case: Case) -> int:
    """Parameters that the method trains."""
    return sum(parameter.numel for parameter in held(case) if parameter.trained)
