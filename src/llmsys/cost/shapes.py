"""Every parameter of a family by name, from the published shape: the arithmetic that the other cost models stand on.

Letters: D model width, F feed-forward width, V vocabulary, K = D * num_kv_heads / num_heads width of keys and values,
r low-rank width.
"""

from __future__ import annotations

from typing import NamedTuple

from llmsys import schema

ADAPTERS = ("lora_peft", "lorafa_peft")
UNTRAINED = ("majority", "probe")
METHODS = ("full", *ADAPTERS, *UNTRAINED)


class Linear(NamedTuple):
    """A linear layer of a block: its name inside the block, its input and output widths, whether it has a bias."""

    name: str
    n_in: int
    n_out: int
    bias: bool


def linears(model: schema.Model) -> list[Linear]:
    """The linear layers of one block, in the order in which the forward pass meets them."""
    d, f = model.hidden_size, model.intermediate_size
    k = d // model.num_heads * model.num_kv_heads
    if model.family == "llama":
        return [
            Linear("self_attn.q_proj", d, d, False),
            Linear("self_attn.k_proj", d, k, False),
            Linear("self_attn.v_proj", d, k, False),
            Linear("self_attn.o_proj", d, d, False),
            Linear("mlp.gate_proj", d, f, False),
            Linear("mlp.up_proj", d, f, False),
            Linear("mlp.down_proj", f, d, False),
        ]
    return [
        Linear("attention.self.query", d, d, True),
        Linear("attention.self.key", d, d, True),
        Linear("attention.self.value", d, d, True),
        Linear("attention.output.dense", d, d, True),
        Linear("intermediate.dense", d, f, True),
        Linear("output.dense", f, d, True),
    ]


def adapted(model: schema.Model, method: schema.Method) -> set[str]:
    """Names inside the block of the linear layers that get an adapter, by the rule of `models.surgery.linear_names`."""
    if method.kind not in ADAPTERS:
        return set()
    assert isinstance(method, schema.Adapter)
    names = [linear.name for linear in linears(model)]
    if not method.targets:
        return set(names)
    chosen: set[str] = set()
    for target in method.targets:
        fits = {name for name in names if name == target or name.endswith("." + target)}
        if not fits:
            there = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
            raise ValueError(f"method.targets={target}: no such linear layer in the blocks; there are {there}")
        chosen |= fits
    return chosen


def parameters(model: schema.Model, num_labels: int = 0) -> dict[str, int]:
    """Name -> number of elements of every parameter, as the built model names them; tied tensors once.

    BERT: the encoder without its pooler, and with `num_labels` > 0 the linear classifier on the mean of its tokens.
    """
    d, table = model.hidden_size, {}
    if model.family == "llama":
        table["model.embed_tokens.weight"] = model.vocab_size * d
        norms, prefix = ("input_layernorm", "post_attention_layernorm"), "model.layers"
    else:
        for name, rows in (("word", model.vocab_size), ("position", model.max_length), ("token_type", 2)):
            table[f"bert.embeddings.{name}_embeddings.weight"] = rows * d
        table |= {f"bert.embeddings.LayerNorm.{leaf}": d for leaf in ("weight", "bias")}
        norms, prefix = ("attention.output.LayerNorm", "output.LayerNorm"), "bert.encoder.layer"
    for i in range(model.num_layers):
        for name, n_in, n_out, bias in linears(model):
            table[f"{prefix}.{i}.{name}.weight"] = n_in * n_out
            if bias:
                table[f"{prefix}.{i}.{name}.bias"] = n_out
        for name in norms:
            table[f"{prefix}.{i}.{name}.weight"] = d
            if model.family == "bert":
                table[f"{prefix}.{i}.{name}.bias"] = d
    if model.family == "llama":
        table["model.norm.weight"] = d
        if not model.tie_embeddings:
            table["lm_head.weight"] = model.vocab_size * d
    elif num_labels:
        table |= {"classifier.weight": num_labels * d, "classifier.bias": num_labels}
    return table


def adapter_parameters(model: schema.Model, method: schema.Method) -> tuple[list[int], list[int]]:
    """Elements of each A (r x n_in) and of each B (n_out x r) over all blocks."""
    chosen = adapted(model, method)
    if not chosen:
        return [], []
    assert isinstance(method, schema.Adapter)
    layers = [linear for linear in linears(model) if linear.name in chosen] * model.num_layers
    return [method.r * linear.n_in for linear in layers], [method.r * linear.n_out for linear in layers]
