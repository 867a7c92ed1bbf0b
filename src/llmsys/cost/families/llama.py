"""LLaMA: pre-norm blocks of rotary attention with grouped heads and a gated MLP (arXiv 2302.13971).

Letters: L length, T = B L tokens, D model width, H heads, K width of keys and values, F feed-forward width, V
vocabulary, r low-rank width.

What one block keeps, in bytes over T*D for bf16 with fused attention, phi = F/D, kappa = K/D:

    two norms       2 x 4 (fp32 copies), and 2 x 2 (normalised x) if norm weights are trained
    attention       2 + 2 kappa + 2 (q, k, v, output), and 4 H/D (log-sum-exp)
    SwiGLU          3 x 2 phi (gate, silu(gate), up)
    linear inputs   full: 2 + 2 + 2 phi (attention's and the MLP's normed x, down's input; o's is attention's output)
                    LoRA in bf16: the same; in fp32: six copies of 4, one of 4 phi, because each adapter casts its own
                    LoRA-FA: none, for dA is not wanted
    adapters        z = A x: the width of the adapter x r/D each, seven of them

so full = 20 + 4 kappa + 8 phi and LoRA-FA = 12 + 4 kappa + 6 phi + 14 r/D, with 4 H/D to each: `tests/cost` asserts
the published rows. In fp32 the norm's "copy" is x itself and everything else doubles. Eager attention keeps, instead
of the log-sum-exp, B H L L probabilities: 4 bytes in fp32, and 2 more for their bf16 copy.

The first block is cheaper where the embedding is frozen: its input needs no gradient, so its first norm, and whatever
lies before the first trained weight, keeps nothing.

Qwen2 and Qwen3 are this family with `qkv_bias`, and with `qk_norm` and a head width of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsys import schema
from llmsys.cost.chains import Chain, run
from llmsys.cost.families.base import Linear, Shape, weights
from llmsys.cost.pieces import Activation, Linears, Norm, Piece

if TYPE_CHECKING:
    from llmsys.cost.notes import Tensor
    from llmsys.cost.walk import Walk


def linears(model: schema.Transformer) -> list[Linear]:
    d, f = model.hidden_size, model.intermediate_size
    q, k = model.head_width * model.num_heads, model.head_width * model.num_kv_heads
    return [
        Linear(f"model.layers.{i}.{name}", n_in, n_out, cut)
        for i in range(model.num_layers)
        for name, n_in, n_out, cut in (
            ("self_attn.q_proj", d, q, 0),
            ("self_attn.k_proj", d, k, 0),
            ("self_attn.v_proj", d, k, 0),
            ("self_attn.o_proj", q, d, 1),
            ("mlp.gate_proj", d, f, 0),
            ("mlp.up_proj", d, f, 0),
            ("mlp.down_proj", f, d, 1),
        )
    ]


def parameters(model: schema.Transformer, num_labels: int) -> dict[str, Shape]:
    d, table = model.hidden_size, {"model.embed_tokens.weight": (model.vocab_size, model.hidden_size)}
    norms: dict[str, Shape] = {
        f"model.layers.{i}.{name}.weight": (d,)
        for i in range(model.num_layers)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    for i in range(model.num_layers):
        if model.qk_norm:
            norms |= {f"model.layers.{i}.self_attn.{name}_norm.weight": (model.head_width,) for name in "qk"}
        if model.qkv_bias:
            heads = {"q": model.num_heads, "k": model.num_kv_heads, "v": model.num_kv_heads}
            norms |= {
                f"model.layers.{i}.self_attn.{name}_proj.bias": (n * model.head_width,) for name, n in heads.items()
            }
    head: dict[str, Shape] = {} if model.tie_embeddings else {"lm_head.weight": (model.vocab_size, d)}
    return {**table, **weights(linears(model), bias=False), **norms, "model.norm.weight": (d,), **head}


def buffer_bytes(model: schema.Transformer) -> int:
    """The rotary frequencies, in fp32, and the copy that transformers keeps of them."""
    return 2 * 4 * (model.head_width // 2)


def play(walk: Walk) -> None:
    m, tape, tokens = walk.transformer, walk.tape, walk.tokens
    tape.elsewhere("embedding")
    h = walk.embed(tokens * m.hidden_size, tape.new(tokens, 8, False))
    positions = tape.new(walk.length, 8, False)
    cos, sin = (tape.new(walk.length * m.head_width, walk.width, False) for _ in ("cos", "sin"))
    mask = walk.attention_mask(walk.length, walk.length, causal=True)
    for i in range(m.num_layers):
        tape.block(f"model.layers.{i}", h, positions, cos, sin, mask)
        h = _chained(walk, h, positions, cos, sin, mask) if walk.case.chained else _block(walk, h, cos, sin, mask)
    tape.elsewhere("head")
    x = tape.rms_norm(h, tokens, walk.trained)
    walk.loss(walk.head(x, m.hidden_size, m.vocab_size), tokens)


def _block(walk: Walk, h: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
    tape, tokens = walk.tape, walk.tokens
    x = tape.rms_norm(h, tokens, walk.trained)
    q = _rotate(walk, _head_norm(walk, walk.linear("self_attn.q_proj", x)), cos, sin)
    k = _rotate(walk, _head_norm(walk, walk.linear("self_attn.k_proj", x)), cos, sin)
    v = walk.linear("self_attn.v_proj", x)
    h = tape.like(h, walk.linear("self_attn.o_proj", walk.attention(q, k, v, mask)))
    x = tape.rms_norm(h, tokens, walk.trained)
    gate = tape.from_input(walk.linear("mlp.gate_proj", x))
    return tape.like(h, walk.linear("mlp.down_proj", tape.multiply(gate, walk.linear("mlp.up_proj", x))))


def _chained(walk: Walk, h: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
    """As chains of pieces: `llmsys.lorafa.blocks.llama`."""
    tape = walk.tape

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return walk.attention(_rotate(walk, q, cos, sin), _rotate(walk, k, cos, sin), v, mask)

    into = Chain(Norm(walk), Linears(walk, *(f"self_attn.{name}_proj" for name in "qkv")))
    h = tape.like(h, walk.attend(core, [cos, sin, mask, positions], into, Linears(walk, "self_attn.o_proj"), h))
    gates: list[Piece] = [Norm(walk), Linears(walk, "mlp.gate_proj", "mlp.up_proj")]
    onward: list[Piece] = [Activation(walk), Linears(walk, "mlp.down_proj")]
    if walk.again_mlp:
        (y,) = run(tape, Chain(*gates, *onward), h)
    else:
        (y,) = run(tape, Chain(*onward), *run(tape, Chain(*gates), h))
    return tape.like(h, y)


def _head_norm(walk: Walk, x: Tensor) -> Tensor:
    """Qwen3's RMSNorm of each head of queries and keys."""
    if not walk.transformer.qk_norm:
        return x
    return walk.tape.rms_norm(x, x.numel // walk.transformer.head_width, walk.trained)


def _rotate(walk: Walk, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate(x) sin: the derivative by x reads cos and sin, one row a position, shared by all layers."""
    if x.grad:
        walk.tape.save(cos, sin)
    return walk.tape.rotate(x, cos)
