"""Claims about FLOPs by module: together they are the step's, each is where the model has it, and what is computed
again ends where the backward pass reads no more.
"""

from __future__ import annotations

from typing import Any

import pytest

from llmsys import schema
from llmsys.cost import flops, modules, shapes

METHODS = ("full", "lora_peft", "lora", "lorafa")
T = 4 * 64
"""Tokens of a micro-batch."""


def parts(family: str = "llama", method: str = "full", recompute: str = "none", **settings: Any) -> tuple[Any, ...]:
    tied = family in ("t5", "gpt2")
    model = schema.Transformer(family=family, num_layers=3, tie_embeddings=tied, **settings)
    train = schema.Train(length=64, recompute=recompute, global_batch=8, micro_batch=4)
    kinds = {"lora": schema.LoRA, "lorafa": schema.LoRA, "lora_peft": schema.Adapter}
    return model, train, kinds[method](kind=method, r=4) if method in kinds else schema.Method(), schema.Engine()


CASES = [
    (family, method, recompute)
    for family in ("llama", "bert", "t5", "gpt2")
    for method in METHODS
    for recompute in ("none", "block", "attn+mlp")
    if recompute != "attn+mlp" or (method in ("lora", "lorafa") and family != "gpt2")  # which is for chains
]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "method", "recompute"), CASES)
def test_all_modules_together_are_the_step(family: str, method: str, recompute: str, attention: str) -> None:
    given = parts(family, method, recompute, attention=attention)
    found = modules.by_module(*given)
    assert sum(sum(each) for each in found.values()) == pytest.approx(flops.step_flops(*given))
    assert all(min(each) >= 0 for each in found.values())


def test_a_layer_has_its_product_and_two_derivatives() -> None:
    model, *rest = parts()
    found = modules.by_module(model, *rest)
    for layer in shapes.linears(model):
        product = 2 * 2.0 * T * layer.n_in * layer.n_out  # of two micro-batches
        assert found[layer.name] == (product, 2 * product, 0)
    assert found["lm_head"].forward == 2 * 2.0 * T * model.hidden_size * model.vocab_size


def test_a_frozen_layer_has_its_adapter_beside_it() -> None:
    """Forward 2 r (N + M) more a token; backward no derivative by the weight, and in the first block none by x."""
    model, train, method, engine = parts(method="lora_peft")
    found = modules.by_module(model, train, method, engine)
    for layer in shapes.linears(model)[7:]:
        product, thin = 4.0 * T * layer.n_in * layer.n_out, 4.0 * T * method.r * (layer.n_in + layer.n_out)
        assert found[layer.name] == (product + thin, product + 2 * thin, 0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_recomputation_ends_at_the_last_tensor_that_is_read(attention: str) -> None:
    """All of a block's products once more but `down_proj`'s, and nothing of the head."""
    found = modules.by_module(*parts(recompute="block", attention=attention))
    for name, each in found.items():
        again = 0.0 if name == "lm_head" or name.endswith("down_proj") else each.forward
        assert each.recompute == again, name


def test_attention_is_told_apart_in_chains_too() -> None:
    """As it is where modules are called one by one: also where a chain computes it again."""
    plain = modules.by_module(*parts(method="lora_peft", attention="eager"))
    for recompute in ("none", "attn+mlp"):
        chained = modules.by_module(*parts(method="lora", recompute=recompute, attention="eager"))
        for what in ("scores", "context"):
            name = f"model.layers.1@{what}"
            again = plain[name].forward if recompute == "attn+mlp" else 0.0
            assert chained[name] == plain[name]._replace(recompute=again)
        assert "model.layers.1" in chained
        assert "model.layers.1.self_attn.q_proj" not in chained
