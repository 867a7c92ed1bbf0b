"""Attention with dropout on its probabilities where no fused kernel has that: on a CPU.

torch's SDPA there keeps the probabilities, what dropout made of them and its mask, three times [B, H, L, L], and spends
most of the time drawing the mask. Shapes: B batch, H heads, H' of keys and values, L and L' lengths, W width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmsys.lorafa.pieces.dropout import draw_seed, kept, thinned
from llmsys.lorafa.pieces.piece import Extra


class Scores:
    """out = m P v / (1 - p), P = softmax(scale q k^T + mask), for q [B, H, L, W] and k, v [B, H', L', W].

    Backward, with P and m computed again: dv = (m P / (1 - p))^T dout, dP = m (dout v^T) / (1 - p),
    dS = P (dP - sum(P dP)), dq = scale dS k, dk = scale dS^T q. Keeps: q, k, v, the mask (one tensor for all blocks)
    and the seed of m, a number. Half-precision inputs are multiplied in fp32, as torch has it on a CPU.
    """

    def __init__(self, mask: Tensor | None, causal: bool, scale: float, p: float) -> None:
        self.causal, self.scale, self.p = causal, scale, p
        self._given = [] if mask is None else [mask]

    def trained(self) -> list[Tensor]:
        return []

    def forward(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Extra]]:
        extras: list[Extra] = [draw_seed(), *self._given]
        self._given = []  # from here on an extra, which saved-tensor hooks see, and no attribute
        return self.again(inputs, extras), extras

    def again(self, inputs: Sequence[Tensor], extras: Sequence[Extra]) -> tuple[Tensor, ...]:
        q, k, v = self._wide(inputs)
        probabilities = self._probabilities(q, k, extras)
        thinned(probabilities, *kept(probabilities, self.p, int(extras[0])))
        return ((probabilities @ v).to(inputs[0].dtype),)

    def _wide(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """In fp32 or wider, keys and values once for each of their heads' queries."""
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in inputs)
        repeats = q.shape[1] // k.shape[1]
        return [q, *(x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (k, v))]

    def _probabilities(self, q: Tensor, k: Tensor, extras: Sequence[Extra]) -> Tensor:
        scores = (q @ k.transpose(-1, -2)).mul_(self.scale)
        for mask in extras[1:]:
            scores += mask
        if self.causal:
            above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
            scores.masked_fill_(above, float("-inf"))
        found: Tensor = torch.ops.aten._safe_softmax(scores, -1)  # zeros in a row that is masked whole
        return found

    def reads_inputs(self, wanted: bool) -> bool:
        return wanted

    def backward(
        self, inputs: Sequence[Tensor] | None, extras: Sequence[Extra], grads: Sequence[Tensor], wanted: bool
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
        if not wanted:
            return (None, None, None), []
        assert inputs is not None
        q, k, v = self._wide(inputs)
        probabilities = self._probabilities(q, k, extras)
        mask = kept(probabilities, self.p, int(extras[0]))
        dout = grads[0].to(q.dtype)
        dp = thinned(dout @ v.transpose(-1, -2), *mask)
        ds = torch.ops.aten._softmax_backward_data(dp, probabilities, -1, dp.dtype).mul_(self.scale)
        dv = thinned(probabilities, *mask).transpose(-1, -2) @ dout
        found = [ds @ k, *(self._per_head(dx, inputs[1]) for dx in (ds.transpose(-1, -2) @ q, dv))]
        return tuple(dx.to(x.dtype) for dx, x in zip(found, inputs, strict=True)), []

    @staticmethod
    def _per_head(dx: Tensor, k: Tensor) -> Tensor:
        """[B, H, L', W] -> [B, H', L', W], summed over the queries of a head."""
        return dx if dx.shape == k.shape else dx.unflatten(1, (k.shape[1], -1)).sum(2)
