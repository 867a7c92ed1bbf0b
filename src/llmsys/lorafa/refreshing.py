"""Merge and draw anew: LoRA-FA whose sum over time is not confined to r directions.

An adapter moves W within the rows' span of one A. COLA (arXiv 2401.04151) and ReLoRA (arXiv 2307.05695) merge what was
learnt and go on with a fresh adapter, so that the updates of several add up to a higher rank:

    W <- W + s B A        A <- the next draw        B <- 0

The base is then no longer what it was. The adapter remembers its past B's (its past A's are draws), so that a file of
it fits the original base: `load_adapter` merges the same terms again, in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmsys.lorafa import merging
from llmsys.lorafa.adapters import changeable, names, plain
from llmsys.lorafa.layer import Adapter
from llmsys.lorafa.targets import adapted

FIRST = ("exp_avg", "momentum_buffer")
SECOND = ("exp_avg_sq", "max_exp_avg_sq")
"""States of torch's optimizers that are averages of the gradient, and of its squares."""


@torch.no_grad()
def refresh(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Merges the adapter into the weights and gives it the next A and B = 0, in place; returns `model`.

    Between two steps, and on all ranks alike: nothing is sent. `optimizer` is the one that trains B; its state is
    carried over to the new A, see `carried`. ValueError for a trained A and for one that no seed gives, for weights
    into which nothing can be added, where other adapters stand beside the same weights, and for an optimizer whose
    state is not known here; then nothing has changed.
    """
    inner = plain(model)
    changeable(inner, "refresh")
    layers = {path: layer for path, layer in adapted(inner) if layer.chosen is not None}
    if len(names(inner)) != 1 or not layers:
        raise ValueError(f"refresh: needs one adapter, and that active; there are {', '.join(names(inner)) or 'none'}")
    config = next(iter(layers.values())).chosen.config
    if config.train_a:
        raise ValueError("refresh: train_a=True: a trained A has no draw, and its file no way to the original base")
    if not next(iter(layers.values())).chosen.seeded:
        raise ValueError(f"refresh: init={config.init}: has no next draw; orthonormal, gaussian and select have")
    merging.refuse_unmergeable(inner, layers, "refresh")
    _check_state([layer.chosen for layer in layers.values()], optimizer)
    frames = {}
    for layer in layers.values():  # all of them first: a shared A is drawn anew once only
        adapter = layer.chosen
        frames[adapter] = (adapter.a.to(torch.float64, copy=True), _metric(adapter))
        merging.add(layer, adapter.delta())
    for adapter, (a, metric) in frames.items():
        adapter.past.append(adapter.B.detach().cpu().clone())
        adapter.redraw(len(adapter.past))
        adapter.B.zero_()
        if optimizer is not None and optimizer.state.get(adapter.B):
            turned = torch.linalg.solve(metric, torch.linalg.solve(a @ a.T, a @ adapter.a.double().T))
            _carry(optimizer.state[adapter.B], turned @ _metric(adapter))
    return model


def carried(first: Tensor, second: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
    """Adam's moments of B [M, R] in the new basis, from those in the old one and T = `turned` [R, R].

    With G [M, N] the gradient of W, that of B is s G A^T: G seen along A's rows. The best guess at the old gradients is
    their part in the span of A, G ~ m (A A^T)^-1 A / s, so of the first moment m T remains, T = (A A^T)^-1 A A'^T. (For
    orthonormal A that is A A'^T / c with A A^T = c I. Two random bases have little in common, |T|^2 ~ r / N each
    column: momentum is mostly gone, as it should be.)

    The second moment is a scale, and that of a fresh direction is not 0 but what an average direction has: a row of G
    has its own size, and random directions see it alike. Of the new direction j, the part T_j lies in the old span,
    where the squares are known, and the rest outside, where the row's mean stands for them:

        v'_j = sum_k T_kj^2 v_k + max(0, 1 - sum_k T_kj^2) mean_k v_k

    Zeroing it instead, at Adam's advanced step count, would make the first steps 1 / sqrt(1 - beta_2) = 31 times too
    long. With A' = A both stay as they are.
    """
    share = turned**2
    outside = (1 - share.sum(0)).clamp(min=0)
    return first @ turned, second @ share + second.mean(1, keepdim=True) * outside


def _metric(adapter: Adapter) -> Tensor:
    """K [R, R] of B's gradient G A^T K: s I, or what the correction makes of it."""
    if adapter.inverse is not None:
        return adapter.inverse.double() * adapter.scale
    return torch.eye(adapter.config.r, dtype=torch.float64, device=adapter.B.device) * adapter.scale


def _carry(state: dict[str, Tensor], turned: Tensor) -> None:
    for key, tensor in state.items():
        if key in (*FIRST, *SECOND) and tensor is not None:
            first, second = carried(tensor.double(), tensor.double(), turned)
            tensor.copy_(first if key in FIRST else second)


def _check_state(adapters: list[Adapter], optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"refresh: a {type(optimizer).__name__} is no torch.optim.Optimizer; pass the one inside it")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for adapter in adapters:
        if id(adapter.B) not in held:
            raise ValueError(f"refresh: the optimizer does not train B of {adapter.path}")
        for key, value in optimizer.state.get(adapter.B, {}).items():
            if isinstance(value, Tensor) and value.ndim and key not in (*FIRST, *SECOND):
                raise ValueError(f"refresh: {type(optimizer).__name__} keeps {key}, which cannot be carried to a new A")
