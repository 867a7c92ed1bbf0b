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
    trained. All products are in the dtype of x (under autocast, in autocast's), whatever dtype an adapter is stored in;
    so x is never copied to another.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = [_Layer(layer) for layer in layers]
        kind = self.layers[0].kind
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        for layer in self.layers:
            if layer.module.weight.requires_grad:
                raise ValueError(
                    f"the weight of an adapted {type(layer.module).__name__} is trained; LoRA-FA takes it as frozen: "
                    "leave that layer out of `targets`, or its weight frozen"
                )

    def trained(self) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for layer in self.layers:
            for tensor in layer.trained():
                found[id(tensor)] = tensor
        return list(found.values())

    def forward(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Extra]]:
        x = self._operand(inputs[0])
        projected: dict[int, Tensor] = {}
        extras: list[Extra] = []
        for adapter, p in self._projections():
            source = x
            if p:
                seed = draw_seed()
                extras.append(seed)
                source = dropped(x, p, seed)
            projected[id(adapter.a)] = z = F.linear(source, adapter.a.to(x.dtype))
            extras.append(z)
        return self._outputs(x, projected), extras

    def again(self, inputs: Sequence[Tensor], extras: Sequence[Extra]) -> tuple[Tensor, ...]:
        return self._outputs(self._operand(inputs[0]), self._kept(extras)[0])

    def _operand(self, x: Tensor) -> Tensor:
        return x if self.dtype is None else x.to(self.dtype)

    def _outputs(self, x: Tensor, projected: dict[int, Tensor]) -> tuple[Tensor, ...]:
        return tuple(layer(x, projected) for layer in self.layers)

    def _projections(self) -> list[tuple[Adapter, float]]:
        """(adapter, dropout) of one layer for each distinct A."""
        found: dict[int, tuple[Adapter, float]] = {}
        for layer in self.layers:
            if layer.adapter is not None:
                found.setdefault(id(layer.adapter.a), (layer.adapter, layer.p))
        return list(found.values())

    def _kept(self, extras: Sequence[Extra]) -> tuple[dict[int, Tensor], dict[int, int]]:
        """(z, seed of the mask) by the identity of A."""
        left = list(extras)
        projected, seeds = {}, {}
        for adapter, p in self._projections():
            if p:
                seeds[id(adapter.a)] = int(left.pop(0))
            z = left.pop(0)
            assert isinstance(z, Tensor)
            projected[id(adapter.a)] = z
        return projected, seeds

    def reads_inputs(self, wanted: bool) -> bool:
        return any(adapter.a.requires_grad for adapter, _ in self._projections())

    def backward(
        self, inputs: Sequence[Tensor] | None, extras: Sequence[Extra], grads: Sequence[Tensor], wanted: bool
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
        projected, seeds = self._kept(extras)
        found: dict[int, Tensor] = {}
        dx: Tensor | None = None
        narrow: dict[int, Tensor] = {}  # dz by A: what reaches z through all layers that share it
        for layer, dy in zip(self.layers, grads, strict=True):
            rows = dy.flatten(0, -2)
            if wanted:
                dx = layer.back(rows, dx)
            if layer.bias_trained:
                found[id(layer.bias)] = rows.sum(0).to(layer.bias.dtype)
            adapter = layer.adapter
            if adapter is None:
                continue
            z = projected[id(adapter.a)].flatten(0, -2)
            if adapter.b.requires_grad:
                db = adapter.corrected(rows.T @ z)
                found[id(adapter.b)] = db.to(adapter.b.dtype).mul_(adapter.scale)
            if wanted or adapter.a.requires_grad:
                dz = rows @ adapter.b.to(rows.dtype) * adapter.scale
                narrow[id(adapter.a)] = narrow[id(adapter.a)] + dz if id(adapter.a) in narrow else dz
        for adapter, p in self._projections():
            key, a = id(adapter.a), adapter.a
            if a.requires_grad:
                assert inputs is not None
                x = self._operand(inputs[0])
                x = dropped(x, p, seeds[key]) if key in seeds else x
                found[key] = (narrow[key].T @ x.flatten(0, -2)).to(a.dtype)
            if not wanted:
                continue
            assert dx is not None
            if key in seeds:
                share = (narrow[key] @ a.to(dx.dtype)).view(*grads[0].shape[:-1], -1)
                dx += dropped(share, p, seeds[key]).flatten(0, -2)
            else:
                dx.addmm_(narrow[key], a.to(dx.dtype))
        shape = grads[0].shape[:-1]
        whole = dx.view(*shape, -1) if dx is not None else None
        return (whole,), [found.get(id(tensor)) for tensor in self.trained()]


class _Layer:
    """One frozen linear layer of any kind: `nn.Linear`, transformers' Conv1D, or a quantised one with `product` and
    `dequantised` (see `llmsys.models.quant_layers`)."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.adapter: Adapter | None = getattr(module, "adapter", None)
        self.p = self.adapter.dropout if self.adapter is not None and module.training else 0.0
        self.transposed = is_transposed(module)
        self.kind = str(self.module.weight.device.type)
        self.bias_trained = self.bias is not None and self.bias.requires_grad

    @property
    def bias(self) -> Any:
        """The adapter's own, or the layer's."""
        own = None if self.adapter is None else self.adapter.bias
        return self.module.bias if own is None else own

    def trained(self) -> list[Tensor]:
        found = [self.bias] if self.bias_trained else []
        if self.adapter is not None:
            found += [tensor for tensor in (self.adapter.b, self.adapter.a) if tensor.requires_grad]
        return found

    def __call__(self, x: Tensor, projected: dict[int, Tensor]) -> Tensor:
        module, adapter = self.module, self.adapter
        bias: Any = None if self.bias is None else self.bias.to(x.dtype)
        if hasattr(module, "dequantised"):
            y: Tensor = module.product(x)
            y = y if bias is None else y + bias
        elif self.transposed:
            y = torch.addmm(bias, x.flatten(0, -2), module.weight.to(x.dtype)).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, module.weight.to(x.dtype), bias)
        if adapter is None:
            return y
        z, b = projected[id(adapter.a)], adapter.b.to(x.dtype)
        y.view(-1, y.shape[-1]).addmm_(z.flatten(0, -2), b.T, alpha=adapter.scale)
        return y

    def back(self, dy: Tensor, dx: Tensor | None) -> Tensor:
        """dx + dy W, in place where there is a dx; dy [T, M]."""
        module = self.module
        if hasattr(module, "dequantised"):
            weight = module.dequantised(dy.dtype)
        elif self.transposed:
            weight = module.weight.to(dy.dtype).T
        else:
            weight = module.weight.to(dy.dtype)
        return dy @ weight if dx is None else dx.addmm_(dy, weight)
