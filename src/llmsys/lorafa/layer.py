"""A linear layer with adapters beside it, made of the layer itself.

The layer stays the object it is, with its weight under its old name: its class becomes a subclass that also runs
adapters. So whatever looks for an `nn.Linear`, or reads `layer.weight`, finds it, and taking adapters off again is
giving the class back. R low-rank width, M outputs, N inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.lorafa import basis
from llmsys.lorafa.config import SEEDED, LoRAFAConfig
from llmsys.lorafa.pieces.linears import Linears
from llmsys.lorafa.pieces.piece import run
from llmsys.models.classes import become, derived


class Adapter(nn.Module):
    """A [R, N] and B [M, R]. A frozen A is a buffer: no optimizer, `requires_grad_` or `set_adapter` can reach it.

    `path` is the name of A's draw: of the layer, as it was called when the adapter was made. `shared`: the adapter of
    another layer, whose A this one uses. A is no part of a state dict where a seed gives it: there `draw`, which tells
    one draw from another, is in its place, and is compared when one is loaded. `bias`: where the
    adapter trains one, it stands in for the layer's own, which stays as it is. `past`: the B's [M, R], on the host,
    that `refresh` has merged into the layer's weight.
    """

    A: Tensor
    B: nn.Parameter
    bias: nn.Parameter | None
    inverse: Tensor | None

    def __init__(
        self,
        config: LoRAFAConfig,
        path: str,
        a: Tensor | None,
        outputs: int,
        dtype: torch.dtype,
        *,
        shared: Adapter | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config, self.path, self.dropout, self.scale = config, path, config.dropout, config.scale
        self._owner = (shared,)  # in a tuple: A must have one home in the tree of modules
        self.past: list[Tensor] = []
        if a is not None and config.train_a:
            self.A = nn.Parameter(a.to(dtype))
        elif a is not None:
            self.register_buffer("A", a, persistent=config.init not in SEEDED)
        device = self.a.device
        self.B = nn.Parameter(torch.zeros(outputs, config.r, dtype=dtype, device=device))
        own = None if bias is None else nn.Parameter(bias.detach().to(device, dtype, copy=True))
        self.register_parameter("bias", own)
        inverse = None if config.correction == "none" else self._inverse()
        self.register_buffer("inverse", inverse, persistent=False)

    @property
    def owner(self) -> Adapter:
        """The adapter that A belongs to: this one, or that of the first layer that shares it."""
        return self._owner[0] or self

    @property
    def seeded(self) -> bool:
        """Whether A need not be stored."""
        return is_seeded(self.config)

    @property
    def a(self) -> Tensor:
        return self.owner.A

    @property
    def b(self) -> Tensor:
        return self.B

    def _inverse(self) -> Tensor:
        """(A A^T)^-1 / s^2: constant, as A is."""
        a = self.a.double()
        return (torch.linalg.inv(a @ a.T) / self.scale**2).float()

    def corrected(self, gradient: Tensor) -> Tensor:
        """B's gradient [M, R]; where asked for, closest to W's: g (A A^T)^-1 / s^2 (arXiv 2308.03303v2)."""
        return gradient if self.inverse is None else gradient @ self.inverse.to(gradient.dtype)

    def delta(self) -> Tensor:
        """s B A [M, N] in fp32, or fp64 where A or B has it: what merging adds to W."""
        wide = torch.promote_types(torch.promote_types(self.a.dtype, self.B.dtype), torch.float32)
        return self.scale * (self.B.detach().to(wide) @ self.a.detach().to(wide))

    @property
    def draw(self) -> Tensor:
        """[8] of what a seeded A is drawn from, whatever its epoch: bytes, which no change of a state dict's dtype
        rounds."""
        config, (r, n) = self.config, self.a.shape
        told = f"{config.init}/{r}/{n}/{config.seed}/{self.owner.path}"
        return torch.tensor(list(hashlib.sha256(told.encode()).digest()[:8]), dtype=torch.uint8)

    @torch.no_grad()
    def redraw(self, epoch: int) -> None:
        """Makes a seeded A (of the owner), in place, the draw number `epoch`, and what follows from A too."""
        r, n = self.a.shape
        self.a.copy_(basis.draw(self.config.init, r, n, self.config.seed, self.owner.path, epoch))
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """Makes what follows from A, in place, that of the A that is here now: for whoever has written another."""
        if self.inverse is not None:
            self.inverse.copy_(self._inverse())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.seeded:
            destination[prefix + "draw"] = self.draw
        if self.past:
            destination[prefix + "past"] = torch.stack(self.past)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        past, drawn = state_dict.pop(prefix + "past", None), state_dict.pop(prefix + "draw", None)
        if drawn is not None and not (self.seeded and torch.equal(drawn.cpu().to(torch.uint8), self.draw)):
            own = f"init={self.config.init}, r={self.config.r}, seed={self.config.seed}, {self.owner.path}"
            raise ValueError(f"{prefix}B: was trained beside another A than that of {own}; inject as it was then")
        if prefix + "B" in state_dict:
            before, self.past = len(self.past), [] if past is None else [b.cpu() for b in past.unbind()]
            if len(self.past) != before:
                self.redraw(len(self.past))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.follow()

    @torch.no_grad()
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As of any module. Where A comes to be in memory (`to_empty`), it is drawn, and B is 0."""
        inverse, device = self.inverse, self.B.device
        super()._apply(fn, recurse)
        if device.type == "meta" and not self.B.is_meta:
            self.B.zero_()
            if self.owner is self and self.config.init in SEEDED:
                self.redraw(len(self.past))
            elif inverse is not None:
                self.follow()
        return self

    def extra_repr(self) -> str:
        return f"r={self.config.r}, alpha={self.config.alpha}, init={self.config.init}"


def is_seeded(config: LoRAFAConfig) -> bool:
    """Whether A follows from the configuration and a layer's name and width."""
    return config.init in SEEDED and not config.train_a


class Adapted:
    """Mixed into the class of a linear layer. `adapters` by name; at most one is active, none where disabled.

    `merged`: what `merging.unmerge` needs, where the active adapter is part of the weight; then none runs beside it.
    """

    adapters: nn.ModuleDict
    active: str | None
    merged: Any
    weight: Tensor

    @property
    def adapter(self) -> Adapter | None:
        """The adapter that runs, if any."""
        return None if self.merged is not None else self.chosen

    @property
    def chosen(self) -> Adapter | None:
        """The active adapter, merged or not."""
        if self.active is None or self.active not in self.adapters:
            return None
        found = self.adapters[self.active]
        assert isinstance(found, Adapter)
        return found

    def parameters_read(self) -> Iterator[nn.Parameter]:
        """The adapters' weights: `forward` reads them and does not call the adapters. See `blocks.block.Fused`."""
        for adapter in self.adapters.values():
            assert isinstance(adapter, Adapter)
            yield from adapter.parameters()
            if isinstance(adapter.a, nn.Parameter):  # another layer's, perhaps
                yield adapter.a

    def forward(self, x: Tensor) -> Tensor:
        adapter: Any = self.adapter
        if adapter is None and self.weight.requires_grad:  # the layer is trained itself
            whole: Tensor = super().forward(x)  # type: ignore[misc]
            return whole
        away = [] if adapter is None else [each for each in {adapter, adapter.owner} if offloads(each)]
        for each in away:  # no adapter is called: its hook has to be
            each._hf_hook.pre_forward(each)
        try:
            y: Tensor = run(Linears([self]), x if x.ndim > 1 else x.unsqueeze(0))  # type: ignore[list-item]
        finally:
            for each in away:
                each._hf_hook.post_forward(each, None)
        if y.requires_grad and (away or offloads(self)):
            y.register_hook(_refuse_offloaded)
        return y if x.ndim > 1 else y.squeeze(0)


def hooks(module: Any) -> tuple[Any, ...]:
    """accelerate's, which move a module's inputs, or its weights from wherever they are offloaded to."""
    hook = vars(module).get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def offloads(module: Any) -> bool:
    """Whether a hook of accelerate's has the module's weights only while the module is called."""
    return any(getattr(hook, "offload", False) for hook in hooks(module))


def device(layer: Any) -> torch.device:
    """Where the layer computes: where its weight is, or is brought to by accelerate."""
    brought = [hook.execution_device for hook in hooks(layer) if getattr(hook, "execution_device", None) is not None]
    return torch.device(brought[0]) if brought and layer.weight.is_meta else layer.weight.device


def _refuse_offloaded(gradient: Tensor) -> None:
    raise ValueError("backward: accelerate has offloaded weights again that it reads; train without offloading")


class AdaptedLinear(Adapted, nn.Linear):
    """`nn.Linear` with adapters."""


_CLASSES: dict[type, type] = {nn.Linear: AdaptedLinear}


def adapted_class(plain: type) -> type:
    """The subclass of a linear layer's class that runs adapters."""
    if plain not in _CLASSES:
        _CLASSES[plain] = derived(adapted_class, plain, bases=(Adapted, plain))
    return _CLASSES[plain]


def adapt(layer: Any) -> Any:
    """Makes `layer` an `Adapted` one without adapters, in place, and returns it."""
    if not isinstance(layer, Adapted):
        become(layer, adapted_class(type(layer)))
        layer.adapters, layer.active, layer.merged = nn.ModuleDict(), None, None
    return layer


def restore(layer: Any) -> None:
    """Gives an adapted layer its own class back, in place; its adapters are gone. Its weight stays as it is."""
    del layer.adapters, layer.active, layer.merged
    become(layer, next(cls for cls in type(layer).__mro__ if not issubclass(cls, Adapted)))
