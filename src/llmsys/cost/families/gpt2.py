"""GPT-2: pre-norm blocks with one projection to q, k and v, and a tied head (Radford et al., 2019).

q, k and v are thirds of one tensor [T, 3 D], so keeping one of them keeps all. GELU is the tanh approximation written
out in Python, which keeps four tensors of T*F where a fused one keeps one: its input, the tanh, and both factors of the
last product. Letters: L length, T = B L tokens, D model width, F feed-forward width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsys import schema
from llmsys.cost.families.base import Linear, Shape, norms

if TYPE_CHECKING:
    from llmsys.cost.notes import Tensor
    from llmsys.cost.walk import Walk


def linears(model: schema.Transformer) -> list[Linear]:
    d, f = model.hidden_size, model.intermediate_size
    return [
        Linear(f"transformer.h.{i}.{name}", n_in, n_out)
        for i in range(model.num_layers)
        for name, n_in, n_out in (
            ("attn.c_attn", d, 3 * d),
            ("attn.c_proj", d, d),
            ("mlp.c_fc", d, f),
            ("mlp.c_proj", f, d),
        )
    ]


def parameters(model: schema.Transformer, num_labels: int) -> dict[str, Shape]:
    """Linear weights are stored transposed, [n_in, n_out]."""
    d = model.hidden_size
    table: dict[str, Shape] = {
        "transformer.wte.weight": (model.vocab_size, d),
        "transformer.wpe.weight": (model.max_length, d),
    }
    for layer in linears(model):
        table |= {f"{layer.name}.weight": (layer.n_in, layer.n_out), f"{layer.name}.bias": (layer.n_out,)}
    table |= norms((f"transformer.h.{i}.{name}" for i in range(model.num_layers) for name in ("ln_1", "ln_2")), d)
    table |= norms(["transformer.ln_f"], d)
    return table if model.tie_embeddings else {**table, "lm_head.weight": (model.vocab_size, d)}


def buffer_bytes(model: schema.Transformer) -> int:
    return 0


def play(walk: Walk) -> None:
    m, tape, tokens, p = walk.transformer, walk.tape, walk.tokens, walk.model.dropout
    tape.elsewhere("embedding")
    positions = tape.new(walk.length, 8, False)
    h = tape.dropout(walk.embed(tokens * m.hidden_size, tape.new(tokens, 8, False), positions), p)
    mask = walk.attention_mask(walk.length, walk.length, causal=True)
    for i in range(m.num_layers):
        tape.block(f"transformer.h.{i}", h, mask, positions)
        x = tape.layer_norm(h, tokens, walk.trained)
        qkv = walk.linear("attn.c_attn", x)
        q, k, v = (tape.view(qkv, qkv.numel // 3) for _ in "qkv")
        h = tape.like(h, tape.dropout(walk.linear("attn.c_proj", walk.attention(q, k, v, mask)), p))
        x = _gelu(walk, walk.linear("mlp.c_fc", tape.layer_norm(h, tokens, walk.trained)))
        h = tape.like(h, tape.dropout(walk.linear("mlp.c_proj", x), p))
    tape.elsewhere("head")
    x = tape.layer_norm(h, tokens, walk.trained)
    walk.loss(walk.head(x, m.hidden_size, m.vocab_size), tokens)


def _gelu(walk: Walk, x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(c (x + 0.044715 x^3))). On CUDA autocast computes the power, and what follows it, in fp32."""
    tape = walk.tape
    base = tape.cast(x, 4) if tape.autocast and tape.cuda else x
    if x.grad:
        tape.save(base)
    tanh = tape.from_output(base)
    return tape.multiply(tape.like(x), tape.like(tanh))
