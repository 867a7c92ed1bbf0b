"""A linear layer with adapters beside it, made of the layer itself.

The layer stays the object it is, with its weight under its old name: its class becomes a subclass that also runs
adapters. So whatever looks for an `nn.Linear`, or reads `layer.weight`, finds it, and taking adapters off again is
giving the class back. R low-rank width, M outputs, N inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.lorafa.config import SEEDED, LoRAFAConfig
from llmsys.lorafa.pieces.linears import Linears
from llmsys.lorafa.pieces.piece import run


class Adapter(nn.Module):
    """A [R, N] and B [M, R]. A frozen A is a buffer: no optimizer, `requires_grad_` or `set_adapter` can reach it.

    `shared`: the adapter of another layer, whose A this one uses. A is no part of a state dict where a seed gives it.
    """

    A: Tensor
    B: nn.Parameter
    inverse: Tensor | None

    def __init__(
        self, config: LoRAFAConfig, a: Tensor | None, outputs: int, dtype: torch.dtype, *, shared: Adapter | None = None
    ) -> None:
        super().__init__()
        self.config, self.dropout, self.scale = config, config.dropout, config.scale
        self._owner = (shared,)  # in a tuple: A must have one home in the tree of modules
        if a is not None and config.train_a:
            self.A = nn.Parameter(a.to(dtype))
        elif a is not None:
            self.register_buffer("A", a, persistent=config.init not in SEEDED)
        self.B = nn.Parameter(torch.zeros(outputs, config.r, dtype=dtype, device=self.a.device))
        inverse = None if config.correction == "none" else self._inverse()
        self.register_buffer("inverse", inverse, persistent=False)

    @property
    def a(self) -> Tensor:
        owner = self._owner[0]
        return self.A if owner is None else owner.A

    @property
    def b(self) -> Tensor:
        return self.B

    def _inverse(self) -> Tensor:
        """(A A^T)^-1 / s^2: constant, as A is."""
        a = self.a.double()
        return (torch.linalg.inv(a @ a.T) / self.scale**2).float()

    def corrected(self, gradient: Tensor) -> Tensor:
        """B's gradient g [M, R]; where asked for, nearest to the full one: g (A A^T)^-1 / s^2 (arXiv 2308.03303v2)."""
        return gradient if self.inverse is None else gradient @ self.inverse.to(gradient.dtype)

    def delta(self) -> Tensor:
        """s B A [M, N] in fp32: what merging adds to W."""
        return self.scale * (self.B.detach().float() @ self.a.detach().float())

    def extra_repr(self) -> str:
        return f"r={self.config.r}, alpha={self.config.alpha}, init={self.config.init}"


class Adapted:
    """Mixed into the class of a linear layer. `adapters` by name; at most one is active, none where disabled."""

    adapters: nn.ModuleDict
    active: str | None

    @property
    def adapter(self) -> Adapter | None:
        """The adapter that runs, if any."""
        if self.active is None or self.active not in self.adapters:
            return None
        found = self.adapters[self.active]
        assert isinstance(found, Adapter)
        return found

    def parameters_read(self) -> Iterator[nn.Parameter]:
        """The adapters' weights: `forward` reads them and does not call the adapters. See `blocks.block.Fused`."""
        for adapter in self.adapters.values():
            assert isinstance(adapter, Adapter)
            yield adapter.B
            if isinstance(adapter.a, nn.Parameter):
                yield adapter.a

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = run(Linears([self]), x)  # type: ignore[list-item]
        return y


class AdaptedLinear(Adapted, nn.Linear):
    """`nn.Linear` with adapters."""


_CLASSES: dict[type, type] = {nn.Linear: AdaptedLinear}


def adapted_class(plain: type) -> type:
    """The subclass of a linear layer's class that runs adapters."""
    if plain not in _CLASSES:
        _CLASSES[plain] = type(f"Adapted{plain.__name__}", (Adapted, plain), {})
    return _CLASSES[plain]


def adapt(layer: Any) -> Any:
    """Makes `layer` an `Adapted` one without adapters, in place, and returns it."""
    if not isinstance(layer, Adapted):
        layer.__class__ = adapted_class(type(layer))
        layer.adapters, layer.active = nn.ModuleDict(), None
    return layer


def restore(layer: Any) -> None:
    """Gives an adapted layer its own class back, in place; its adapters are gone."""
    del layer.adapters, layer.active
    layer.__class__ = next(cls for cls in type(layer).__mro__ if not issubclass(cls, Adapted))
