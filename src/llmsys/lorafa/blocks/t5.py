"""T5's blocks (pre-norm RMS, position bias, ReLU or gated GELU) as chains of pieces.

D model width, F feed-forward width, I width of all heads together, l length of the encoder over that of the decoder.
Kept in bf16, over (batch x length x D) bytes, apart from z (2R/D a layer), lse (4H/D an attention) and the norms' rstd
(4/D each), where A is frozen and where it is trained:

                   encoder                                decoder adds                      trained A
    none           4 (the norms' inputs) + 8I/D           2 + 4I/D (q, out)                 MLP: 2F/D for F/8D
                   (q, k, v, out) + F/8D (signs), or,     + 4lI/D (k, v)
                   gated, 4F/D (both products)
    mlp            4 + 8I/D                               2 + 4I/D + 4lI/D                  the same
    attn+mlp       4                                      2                                 the same

and once for all of a decoder's blocks the encoder's output (2l), where one of them reads it: under `attn+mlp`, or
where its A is trained. Once for all blocks of a stack, too, the sum of position bias and mask, and under `attn+mlp` and
`block` the bias itself, which the first block makes and hands to the others. Dropout on the probabilities takes a CPU's
fused kernel away: instead of out and lse nothing is kept (6I/D for 8I/D, 2I/D for 4I/D; with a trained A as before),
and the scores are computed again.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from llmsys.lorafa.blocks.block import Fused, asks_for_attentions, hidden_dropout
from llmsys.lorafa.blocks.kernel import attend, computed, filled, heads
from llmsys.lorafa.pieces.activation import Activation, kind
from llmsys.lorafa.pieces.join import Beside, run_apart
from llmsys.lorafa.pieces.linears import Linears
from llmsys.lorafa.pieces.norm import T5Norm
from llmsys.lorafa.pieces.piece import Chain, Piece, run, uncompiled
from llmsys.lorafa.pieces.relu import ReLU


class T5Block(Fused):
    """In place of `T5Block.forward`, of encoder and decoder; the same numbers, bit for bit, with adapters at their
    start. In fp16 the clamps of transformers run too, by plain autograd, which keeps 2 more for each."""

    layer: Any
    is_decoder: bool

    @uncompiled
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        encoder_decoder_position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden_states [B, L, D] -> the same shape, and the biases of self- and cross-attention [1, H, L, L'] for the
        next block."""
        x, memory = hidden_states, encoder_hidden_states
        if asks_for_attentions(self.layer[0].SelfAttention.config, kwargs) or self.apart():
            whole: tuple[Tensor, Tensor, Tensor | None] = super().forward(  # type: ignore[misc]  # of the family's class
                x,
                attention_mask,
                position_bias,
                memory,
                encoder_attention_mask,
                encoder_decoder_position_bias,
                past_key_values,
                **kwargs,
            )
            return whole
        cache = self.cache(past_key_values)
        here = self.layer[0]
        x, bias = self._attention(here, here.SelfAttention, x, None, attention_mask, position_bias, cache, kwargs)
        crossed = None
        if self.is_decoder and memory is not None:
            here, mask, given = self.layer[1], encoder_attention_mask, encoder_decoder_position_bias
            x, crossed = self._attention(here, here.EncDecAttention, x, memory, mask, given, cache, kwargs)
        return self._mlp(self.layer[-1], x), bias, crossed

    def _attention(
        self,
        layer: Any,
        module: Any,
        x: Tensor,
        memory: Tensor | None,
        mask: Tensor | None,
        bias: Tensor | None,
        cache: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """x + attention of x to itself, or to `memory` [B, L', D]; and the bias, made where there is none yet."""
        norm, p = T5Norm(layer.layer_norm), module.dropout if module.training else 0.0
        out = Chain(Linears([module.o]), *hidden_dropout(layer.dropout))
        into: Piece = Chain(norm, Linears([module.q, module.k, module.v]))
        inputs = (x,) if memory is None else (x, memory)
        if memory is not None:
            into = Beside(Chain(norm, Linears([module.q])), Linears([module.k, module.v]))
        if cache is not None:
            return self._filling(module, into, out, inputs, mask, bias, cache, kwargs)
        if bias is None:
            bias = _bias(module, x.shape[1], inputs[-1].shape[1], 0, x.device, computed(norm.dtype(x), x.device))
        core = functools.partial(_core, module, p)
        y = self.attend(core, p, {"mask": mask, "position_bias": bias, **kwargs}, into, out, *inputs)
        return _clamped(x + y), bias

    def _filling(
        self,
        module: Any,
        into: Piece,
        out: Piece,
        inputs: tuple[Tensor, ...],
        mask: Tensor | None,
        bias: Tensor | None,
        cache: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """`_attention` in generation: as many keys as the cache has once it is filled."""
        index, p = module.layer_idx, module.dropout if module.training else 0.0
        seen = cache.get_seq_length(index)
        seen = seen.clone() if isinstance(seen, Tensor) else seen  # a static cache counts on in place
        if isinstance(into, Beside) and getattr(cache, "is_updated", {}).get(index):  # has the memory's keys and values
            into, inputs = into.pieces[0], inputs[:1]
        q, *kv = (heads(y, module.key_value_proj_dim) for y in run_apart(into, *inputs))
        kv = filled(cache, index, isinstance(into, Beside) or not kv, kv)
        if bias is None:
            bias = _bias(module, q.shape[2], kv[0].shape[2], seen, q.device, q.dtype)
        y = attend(module, q, kv[0], kv[1], mask, p, position_bias=bias, **kwargs)
        return _clamped(inputs[0] + run(out, y)), bias

    def _mlp(self, layer: Any, x: Tensor) -> Tensor:
        dense = layer.DenseReluDense
        gates = [dense.wi_0, dense.wi_1] if hasattr(dense, "wi_0") else [dense.wi]
        wo = Linears([dense.wo], dtype=_kept_wide(dense.wo))
        act: Piece = Activation(dense.act)
        if kind(dense.act) == "relu" and len(gates) == 1 and not self.again_mlp and not wo.reads_inputs(True):
            act = ReLU()
        into: list[Piece] = [T5Norm(layer.layer_norm), Linears(gates)]
        onward: list[Piece] = [act, *hidden_dropout(dense.dropout), wo, *hidden_dropout(layer.dropout)]
        if self.again_mlp:
            return _clamped(x + run(Chain(*into, *onward), x))
        products = run(Chain(*into), x)
        return _clamped(x + run(Chain(*onward), *([products] if len(gates) == 1 else products)))


def _core(module: Any, p: float, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    """q [B, L, I], k, v [B, L', I] -> [B, L, I]."""
    q, k, v = (heads(x, module.key_value_proj_dim) for x in (q, k, v))
    return attend(module, q, k, v, kwargs.pop("mask"), p, **kwargs)


def _bias(module: Any, length: int, keys: int, seen: int | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[1, H, length, keys], learnt in a stack's first self-attention, else zeros."""
    if module.has_relative_attention_bias:
        bias: Tensor = module.compute_bias(length, keys, device=device, past_seen_tokens=seen)
        return bias
    return torch.zeros(1, module.n_heads, length, keys, device=device, dtype=dtype)


def _kept_wide(wo: Any) -> torch.dtype | None:
    """transformers holds T5's last matrix in fp32 beside half-precision ones, and casts its input."""
    packed = hasattr(wo, "dequantised") or not wo.weight.is_floating_point()
    return None if packed else wo.weight.dtype


def _clamped(x: Tensor) -> Tensor:
    """Within fp16's range, as transformers clamps it; other dtypes as they are."""
    if x.dtype != torch.float16:
        return x
    top = torch.finfo(x.dtype).max
    bound = torch.where(torch.isinf(x).any(), top - 1000, top)
    return torch.clamp(x, min=-bound, max=bound)
