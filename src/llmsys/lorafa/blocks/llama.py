"""LLaMA's block (pre-norm, rotary, grouped heads, SwiGLU) as chains of pieces. D model width, F feed-forward width.

Kept in bf16, over (batch x length x D) bytes, k = kv heads / heads, apart from z (2R/D a layer), lse (4H/D) and the
norms' rstd (8/D); with a trained A the same, since what its gradient reads is computed again from the same inputs:

    none      4 (the two norms' inputs) + 4 + 4k (q, k, v, out) + 4F/D (gate, up)
    mlp       4 + 4 + 4k
    attn+mlp  4

Under a padding mask transformers gives SDPA keys and values repeated for all heads: k = 1. Dropout on the probabilities
takes a CPU's fused kernel away: instead of out and lse nothing is kept (2 + 4k), and the scores are computed again.
Mistral's, Qwen2's and Qwen3's blocks are the same; Qwen3 keeps for its two more norms 2 + 2k (their inputs).
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from llmsys.lorafa.blocks.block import Fused, asks_for_attentions
from llmsys.lorafa.blocks.kernel import attend, beside, heads
from llmsys.lorafa.pieces.activation import Activation
from llmsys.lorafa.pieces.linears import Linears
from llmsys.lorafa.pieces.norm import RMSNorm
from llmsys.lorafa.pieces.piece import Chain, Piece, run, uncompiled


class LlamaBlock(Fused):
    """In place of `LlamaDecoderLayer.forward`; the same numbers, bit for bit, with adapters at their start."""

    input_layernorm: Any
    post_attention_layernorm: Any
    self_attn: Any
    mlp: Any

    @uncompiled
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states [B, L, D] -> the same shape."""
        attention, x = self.self_attn, hidden_states
        if asks_for_attentions(attention.config, kwargs) or self.apart():
            whole: Tensor = super().forward(  # type: ignore[misc]  # of the family's own class
                x, attention_mask, position_ids, past_key_values, use_cache, position_embeddings, **kwargs
            )
            return whole
        assert position_embeddings is not None, "transformers' model computes the rotation once for all blocks"
        cache, (cos, sin) = self.cache(past_key_values), position_embeddings
        p, learnt = attention.attention_dropout if self.training else 0.0, _learnt(attention)
        x = x + self.attend(
            functools.partial(_core, attention, p, cache),
            p,
            {
                "cos": cos,
                "sin": sin,
                "mask": attention_mask,
                "position_ids": position_ids,
                **learnt,
                **kwargs,
            },
            Chain(RMSNorm(self.input_layernorm), Linears([attention.q_proj, attention.k_proj, attention.v_proj])),
            Linears([attention.o_proj]),
            x,
            cut=cache is not None,
        )
        into: list[Piece] = [RMSNorm(self.post_attention_layernorm), Linears([self.mlp.gate_proj, self.mlp.up_proj])]
        onward: list[Piece] = [Activation(self.mlp.act_fn), Linears([self.mlp.down_proj])]
        if self.again_mlp:
            return x + run(Chain(*into, *onward), x)
        return x + run(Chain(*onward), *run(Chain(*into), x))


def _learnt(attention: Any) -> dict[str, Tensor]:
    """The weights of the heads' norms that are trained: where attention is computed again, they get their gradient as
    what it is given does."""
    weights = {name: getattr(attention, name).weight for name in ("q_norm", "k_norm") if hasattr(attention, name)}
    return {name: weight for name, weight in weights.items() if weight.requires_grad}


def _head_norm(norm: Any, weight: Tensor | None) -> RMSNorm:
    """`norm`, with `weight` in place of its own where there is one."""
    if weight is None:
        return RMSNorm(norm)
    return RMSNorm(SimpleNamespace(weight=weight, variance_epsilon=norm.variance_epsilon))


def _core(
    module: Any,
    p: float,
    cache: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /,  # what transformers says in `kwargs` may have such names
    *,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> Tensor:
    """q [B, L, H W], k, v [B, L, kv W] -> [B, L, H W]."""
    q, k, v = (heads(x, module.head_dim) for x in (q, k, v))
    if hasattr(module, "q_norm"):  # over the width of a head
        q = run(_head_norm(module.q_norm, kwargs.pop("q_norm", None)), q)
        k = run(_head_norm(module.k_norm, kwargs.pop("k_norm", None)), k)
    q, k = beside(module, "apply_rotary_pos_emb")(q, k, cos, sin)
    if cache is not None:
        k, v = cache.update(k, v, module.layer_idx)
    window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    if window is not None:
        kwargs["sliding_window"] = window
    return attend(module, q, k, v, mask, p, **kwargs)
