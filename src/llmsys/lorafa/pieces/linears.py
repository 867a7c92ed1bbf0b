"""Frozen linear layers that read one input, with their low-rank adapters.

Shapes: x [..., N], W_i [M_i, N], A_i [R, N], B_i [M_i, R]; T rows in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmsys.lorafa.pieces.dropout import draw_seed, dropped
from llmsys.lorafa.pieces.piece import Extra
from llmsys.models.surgery import is_transposed

if TYPE_CHECKING:
    from llmsys.lorafa.layer import Adapter


class Linears:
    """y_i = x W_i^T + b_i + s_i z_i B_i^T with z_i = dropout(x) A_i^T, for layers i that read the same x.

    Backward (LoRA-FA, arXiv 2308.03303, section 3): dB_i = s_i dy_i^T z_i, and dx is the sum of
    dy_i W_i + s_i (dy_i B_i) A_i. With a trained A also dA_i = s_i (dy_i B_i)^T dropout(x), which alone reads x.

    Keeps: z_i [T, R], once for layers that share A, and the seed of a dropout mask, a number; x only where an A is
    trained. All products are in the dtype of x (under autocast, in autocast's; or in `dtype`), whatever dtype an
    adapter is stored in; so x is never copied to another. The layers share one mask, as they share x.
    """

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype | None = None) -> None:
        self.layers = [_Layer(layer) for layer in layers]
        kind = self.layers[0].module.weight.device.type
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        self.slots: dict[int, _Layer] = {}  # one layer for each distinct A
        for layer in self.layers:
            if layer.module.weight.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"the weight of an adapted {type(layer.module).__name__} is trained; LoRA-FA takes it as frozen: "
                    "leave that layer out of `targets`, or its weight frozen"
                )
            if layer.adapter is not None:
                layer.slot = id(layer.adapter.a)
                self.slots.setdefault(layer.slot, layer)
        self.rates = sorted({layer.p for layer in self.slots.values() if layer.p})

    def trained(self) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for layer in self.layers:
            for tensor in layer.trained():
                found[id(tensor)] = tensor
        return list(found.values())

    def read(self) -> list[Tensor]:
        return [tensor for layer in self.layers for tensor in layer.read()]

    def forward(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Extra]]:
        x = self._operand(inputs[0])
        self.given = inputs[0].dtype
        seeds: list[Extra] = [draw_seed() for _ in self.rates]
        sources = self._dropped(x, seeds)
        z = {slot: F.linear(sources[layer.p], layer.a(x.dtype)) for slot, layer in self.slots.items()}
        return self._outputs(x, z), [*seeds, *z.values()]

    def again(self, inputs: Sequence[Tensor], extras: Sequence[Extra]) -> tuple[Tensor, ...]:
        return self._outputs(self._operand(inputs[0]), self._kept(extras))

    def _operand(self, x: Tensor) -> Tensor:
        return x if self.dtype is None else x.to(self.dtype)

    def _dropped(self, x: Tensor, seeds: Sequence[Extra]) -> dict[float, Tensor]:
        """x under the mask of each rate, and under none."""
        return {0.0: x, **{p: dropped(x, p, int(seed)) for p, seed in zip(self.rates, seeds, strict=True)}}

    def _outputs(self, x: Tensor, z: dict[int, Tensor]) -> tuple[Tensor, ...]:
        return tuple(layer(x, z) for layer in self.layers)

    def _kept(self, extras: Sequence[Extra]) -> dict[int, Any]:
        """z by the identity of A."""
        return dict(zip(self.slots, extras[len(self.rates) :], strict=True))

    def reads_inputs(self, wanted: bool) -> bool:
        return any(layer.a_trained for layer in self.slots.values())

    def backward(
        self, inputs: Sequence[Tensor] | None, extras: Sequence[Extra], grads: Sequence[Tensor], wanted: bool
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
        z, seeds = self._kept(extras), extras[: len(self.rates)]
        found: dict[int, Tensor] = {}
        dx: Tensor | None = None
        dz: dict[int, Tensor] = {}  # by A: what reaches z through all layers that share it
        for layer, dy in zip(self.layers, grads, strict=True):
            rows = dy.flatten(0, -2)
            if wanted:
                dx = layer.back(rows, dx)
            if layer.bias_trained:
                found[id(layer.bias)] = rows.sum(0).to(layer.bias.dtype)
            adapter = layer.adapter
            if adapter is None:
                continue
            b = adapter.b
            if b.requires_grad:
                db = adapter.corrected(rows.T @ z[layer.slot].flatten(0, -2))
                found[id(b)] = db.to(b.dtype).mul_(adapter.scale)
            if wanted or layer.a_trained:
                share = (rows @ b.to(rows.dtype)).mul_(adapter.scale)
                dz[layer.slot] = dz[layer.slot].add_(share) if layer.slot in dz else share
        if self.reads_inputs(wanted):
            assert inputs is not None
            sources = self._dropped(self._operand(inputs[0]), seeds)
            for slot, layer in self.slots.items():
                if layer.a_trained:
                    assert layer.adapter is not None
                    da = dz[slot].T @ sources[layer.p].flatten(0, -2)
                    found[id(layer.adapter.a)] = da.to(layer.adapter.a.dtype)
        trained = [found.get(id(tensor)) for tensor in self.trained()]
        if dx is None:
            return (None,), trained
        masked: dict[float, Tensor] = {}  # what comes through the adapters and each rate's mask
        for slot, layer in self.slots.items():
            if not layer.p:
                dx.addmm_(dz[slot], layer.a(dx.dtype))
            elif layer.p in masked:
                masked[layer.p].addmm_(dz[slot], layer.a(dx.dtype))
            else:
                masked[layer.p] = dz[slot] @ layer.a(dx.dtype)
        for p, seed in zip(self.rates, seeds, strict=True):
            dx.add_(dropped(masked[p], p, int(seed)))
        return (dx.view(*grads[0].shape[:-1], dx.shape[-1]).to(self.given),), trained


class _Layer:
    """One frozen linear layer of any kind: `nn.Linear`, transformers' Conv1D, or a quantised one with `product` and
    `dequantised` (see `llmsys.models.quant_layers`).

    One is made for each forward pass. Asking an `nn.Module` for something costs a microsecond, as much as a small
    product: what cannot change until the backward pass is asked for once, weights are read where they are used.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.adapter: Adapter | None = getattr(module, "adapter", None)
        self.owner = None if self.adapter is None else self.adapter.owner
        self.slot = 0
        self.p = self.adapter.dropout if self.adapter is not None and module.training else 0.0
        self.stored = _stored(module)
        bias = self._bias()
        self.biased = bias is not None
        self.bias_trained = bias is not None and bias.requires_grad
        self.a_trained = self.owner is not None and self.owner.A.requires_grad

    @property
    def bias(self) -> Any:
        """The adapter's own, or the layer's."""
        return self._bias() if self.biased else None

    def _bias(self) -> Any:
        own = None if self.adapter is None else self.adapter.bias
        return self.module.bias if own is None else own

    def a(self, dtype: torch.dtype) -> Tensor:
        assert self.owner is not None
        return self.owner.A.to(dtype)

    def trained(self) -> list[Tensor]:
        found = [self.bias] if self.bias_trained else []
        if self.adapter is not None:
            found += [tensor for tensor in (self.adapter.b, self.adapter.a) if tensor.requires_grad]
        return found

    def read(self) -> list[Tensor]:
        found = [] if self.stored == "packed" else [self.module.weight]
        found += [self.bias] if self.biased else []
        return found if self.adapter is None else [*found, self.adapter.a, self.adapter.b]

    def __call__(self, x: Tensor, z: dict[int, Tensor]) -> Tensor:
        module, adapter = self.module, self.adapter
        bias: Any = self.bias.to(x.dtype) if self.biased else None
        if self.stored == "packed":
            y: Tensor = module.product(x)
            y = y if bias is None else y + bias
        elif self.stored == "transposed":
            y = torch.addmm(bias, x.flatten(0, -2), module.weight.to(x.dtype)).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, module.weight.to(x.dtype), bias)
        if adapter is None:
            return y
        rows = y.view(-1, y.shape[-1])
        rows.addmm_(z[self.slot].flatten(0, -2), adapter.b.to(x.dtype).T, alpha=adapter.scale)
        return y

    def back(self, dy: Tensor, dx: Tensor | None) -> Tensor:
        """dx + dy W, in place where there is a dx; dy [T, M]."""
        module = self.module
        if self.stored == "packed":
            weight = module.dequantised(dy.dtype)
        elif self.stored == "transposed":
            weight = module.weight.to(dy.dtype).T
        else:
            weight = module.weight.to(dy.dtype)
        return dy @ weight if dx is None else dx.addmm_(dy, weight)


_STORED: dict[type, str] = {}


def _stored(module: nn.Module) -> str:
    """How a layer's class keeps its weight: `plain` [M, N], `transposed` or `packed` in few bits."""
    kind = type(module)
    if kind not in _STORED:
        packed = hasattr(module, "dequantised")
        _STORED[kind] = "packed" if packed else "transposed" if is_transposed(module) else "plain"
    return _STORED[kind]
