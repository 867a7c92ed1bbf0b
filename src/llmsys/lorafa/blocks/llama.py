"""LLaMA's block (pre-norm, rotary, grouped heads, SwiGLU) as chains of pieces. D model width, F feed-forward width.

Kept in bf16, over (batch x length x D) bytes, k = kv heads / heads, apart from z (2R/D a layer) and lse (4H/D):

    none      4 (the two norms' inputs) + 4 + 4k (q, k, v, out) + 4F/D (gate, up)
    mlp       4 + 4 + 4k
    attn+mlp  4
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmsys.lorafa.blocks.block import Fused
from llmsys.lorafa.pieces.activation import Activation
from llmsys.lorafa.pieces.attention import Core
from llmsys.lorafa.pieces.linears import Linears
from llmsys.lorafa.pieces.norm import RMSNorm
from llmsys.lorafa.pieces.piece import Chain, Piece, run


class LlamaBlock(Fused):
    """In place of `LlamaDecoderLayer.forward`; the same numbers, bit for bit, with adapters at their start."""

    input_layernorm: Any
    post_attention_layernorm: Any
    self_attn: Any
    mlp: Any
    training: bool

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

        def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _attend(attention, q, k, v, position_embeddings, attention_mask, past_key_values, kwargs)

        into: list[Piece] = [
            RMSNorm(self.input_layernorm),
            Linears([attention.q_proj, attention.k_proj, attention.v_proj]),
        ]
        out = Linears([attention.o_proj])
        if self.again_attention and past_key_values is None:
            random = self.training and attention.attention_dropout > 0
            x = x + run(Chain(*into, Core(core, x.device, random), out), x)
        else:
            x = x + run(out, core(*run(Chain(*into), x)))
        into = [RMSNorm(self.post_attention_layernorm), Linears([self.mlp.gate_proj, self.mlp.up_proj])]
        onward: list[Piece] = [Activation("silu"), Linears([self.mlp.down_proj])]
        if self.again_mlp:
            return x + run(Chain(*into, *onward), x)
        return x + run(Chain(*onward), *run(Chain(*into), x))


def _attend(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    cache: Any,
    kwargs: dict[str, Any],
) -> Tensor:
    """q [B, L, H x head], k, v [B, L, kv x head] -> [B, L, H x head], by the kernel that the model is set to."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

    assert rotary is not None, "transformers' model computes the rotation once for all blocks"
    q, k, v = (x.view(*x.shape[:-1], -1, module.head_dim).transpose(1, 2) for x in (q, k, v))
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    if cache is not None:
        k, v = cache.update(k, v, module.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)
    dropout = module.attention_dropout if module.training else 0.0
    out, _ = attend(module, q, k, v, mask, dropout=dropout, scaling=module.scaling, **kwargs)
    flat: Tensor = out.reshape(*out.shape[:-2], -1)
    return flat
