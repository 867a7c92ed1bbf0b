"""BERT's and RoBERTa's block (post-norm, biases, GELU) as chains of pieces. D model width, F feed-forward width.

    s = x + o(attention(q(x), k(x), v(x)))       n = norm(s)       t = n + output(gelu(intermediate(n)))       norm(t)

A norm's output goes both ways, on and past the MLP: so n is neither kept for the one nor for the other. Dropout behind
o and output keeps a seed. Kept in bf16, over (batch x length x D) bytes, apart from z (2R/D a layer), lse (4H/D) and
the norms' mean and rstd (4 x 2/D each, as torch keeps them for bf16; 4 x 4/D in fp32):

    none      2 + 2 (s, t) + 8 (q, k, v, out) + 2F/D (gelu's input)
    mlp       2 + 2 + 8
    attn+mlp  2 + 2 + 2 (x)

A trained A keeps x too (2) where it is not kept anyway, nothing else: the other linear layers' inputs are computed
again, element by element. Dropout on the probabilities takes a CPU's fused kernel away: instead of out and lse nothing
is kept (6 for 8; with a trained A still 8), and the scores are computed again.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from llmsys.lorafa.blocks.block import Fused, asks_for_attentions, hidden_dropout
from llmsys.lorafa.blocks.kernel import attend, filled, heads
from llmsys.lorafa.pieces.activation import Activation
from llmsys.lorafa.pieces.join import Beside, Branch, Residual
from llmsys.lorafa.pieces.linears import Linears
from llmsys.lorafa.pieces.norm import LayerNorm
from llmsys.lorafa.pieces.piece import Chain, Piece, run, uncompiled


class BertBlock(Fused):
    """In place of `BertLayer.forward`; the same numbers, bit for bit, with adapters at their start.

    A decoder with cross-attention keeps for that what it keeps for self-attention, and the encoder's output, one tensor
    for all blocks. `chunk_size_feed_forward` is not looked at.
    """

    attention: Any
    crossattention: Any
    intermediate: Any
    output: Any
    is_decoder: bool

    @uncompiled
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states [B, L, D] -> the same shape."""
        x, memory, here = hidden_states, encoder_hidden_states, self.attention
        if asks_for_attentions(here.self.config, kwargs) or self.apart():
            whole: Tensor = super().forward(  # type: ignore[misc]  # of the family's own class
                x, attention_mask, memory, encoder_attention_mask, past_key_values, **kwargs
            )
            return whole
        cache = self.cache(past_key_values)
        x = x + self._attention(here, x, None, attention_mask, cache, kwargs)
        if self.is_decoder and memory is not None:
            x = run(LayerNorm(here.output.LayerNorm), x)
            here = self.crossattention
            x = x + self._attention(here, x, memory, encoder_attention_mask, cache, kwargs)
        norm, into = LayerNorm(here.output.LayerNorm), Linears([self.intermediate.dense])
        onward: list[Piece] = [
            Activation(self.intermediate.intermediate_act_fn),
            Linears([self.output.dense]),
            *hidden_dropout(self.output.dropout),
        ]
        if self.again_mlp:
            x = run(Chain(norm, Residual(Chain(into, *onward))), x)
        else:
            x, gate = run(Chain(norm, Branch(into)), x)
            x = x + run(Chain(*onward), gate)
        normed: Tensor = run(LayerNorm(self.output.LayerNorm), x)
        return normed

    def _attention(
        self, module: Any, x: Tensor, memory: Tensor | None, mask: Tensor | None, cache: Any, kwargs: dict[str, Any]
    ) -> Tensor:
        """Of x to itself, or to `memory` [B, L', D]; before the residual and its norm."""
        own = module.self
        p = own.dropout.p if own.training else 0.0
        out = Chain(Linears([module.output.dense]), *hidden_dropout(module.output.dropout))
        into: Piece = Linears([own.query, own.key, own.value])
        inputs = (x,) if memory is None else (x, memory)
        if memory is not None:
            into = Beside(Linears([own.query]), Linears([own.key, own.value]))
            if cache is not None and cache.is_updated.get(own.layer_idx):  # holds the memory's keys and values
                into, inputs = Linears([own.query]), (x,)
        core = functools.partial(_core, own, p, cache, memory is not None)
        return self.attend(core, p, {"mask": mask, **kwargs}, into, out, *inputs, cut=cache is not None)


def _core(module: Any, p: float, cache: Any, cross: bool, *qkv: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    """[B, L, D] each, key and value missing where the cache has them -> [B, L, D]."""
    q, *kv = (heads(x, module.attention_head_size) for x in qkv)
    if cache is not None:
        kv = filled(cache, module.layer_idx, cross, kv)
    return attend(module, q, kv[0], kv[1], mask, p, **kwargs)
