"""`train.recompute=auto` takes what fits and computes least again."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from cost_harness import LOCAL, case, method, shape, training

from llmsys import schema
from llmsys.cost import peak_bytes, policy
from llmsys.cost.flops import recomputed
from llmsys.cost.walk import run
from llmsys.schema import recompute

MODEL = shape(num_layers=8, vocab_size=128)
TRAIN = training(length=96)


def chosen(memory: float, kind: str = "lorafa", model: Any = MODEL) -> policy.Choice:
    return policy.cheapest(lambda peak: peak <= memory, model, TRAIN, method(kind), LOCAL)


def peak(text: str, kind: str = "lorafa") -> int:
    return peak_bytes(MODEL, dataclasses.replace(TRAIN, recompute=text), method(kind), LOCAL)


def again(text: str, kind: str = "lorafa") -> float:
    asked = case(MODEL, dataclasses.replace(TRAIN, recompute=text), method(kind))
    return recomputed(asked, run(asked))


@pytest.mark.parametrize("kind", ["lora", "lorafa", "lorafa_peft", "full"])
def test_it_fits_and_less_memory_never_computes_less_again(kind: str) -> None:
    """Between the leanest and `none`, where all fits; the same again when asked again."""
    ends = [peak("none", kind), min(peak(text, kind) for text in ("none", "block"))]
    before = 0.0
    for fifth in range(6):
        memory = ends[0] + (ends[1] - ends[0]) * fifth / 5
        found = chosen(memory, kind)
        assert found.peak == peak(found.text, kind) <= memory
        assert found.again == again(found.text, kind) >= before
        assert found == chosen(memory, kind)
        assert kind in ("lora", "lorafa") or set(recompute.named(found.text)) <= {"none", "block"}
        before = found.again
    assert chosen(ends[0], kind).text == "none"


def test_one_block_fewer_does_not_fit() -> None:
    seen = set()
    for twelfth in range(1, 12):
        memory = peak("none") + (peak("block") - peak("none")) * twelfth / 12
        each = recompute.policies(chosen(memory).text, MODEL.num_layers)
        lean = each.count(each[0])
        if lean < len(each):
            cheaper = [each[0]] * (lean - 1) + [each[-1]] * (len(each) - lean + 1)
            assert peak(recompute.text(cheaper)) > memory
            seen.add((each[0], each[-1]))
    assert len(seen) >= 3, "several mixtures were looked at"


def test_nothing_that_was_looked_at_is_cheaper() -> None:
    """Against all mixtures of two policies, in both orders."""
    memory = (2 * peak("none") + peak("attn+mlp")) / 3
    found = chosen(memory)
    for first, second in itertools.permutations(recompute.POLICIES, 2):
        for k in range(MODEL.num_layers + 1):
            text = recompute.text([first] * k + [second] * (MODEL.num_layers - k))
            assert peak(text) > memory or again(text) >= found.again, text


def test_where_nothing_fits_it_is_the_leanest() -> None:
    found = chosen(0)
    assert found.peak == min(peak(text) for text in recompute.POLICIES)


def test_the_ladder_at_the_size_of_7b() -> None:
    """A batch of 8 x 1024 fits into 24 GiB without a block that is computed again whole."""
    model = schema.Transformer(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, num_kv_heads=32,
        max_length=4096, dtype="bf16",
    )  # fmt: skip
    train = schema.Train(micro_batch=8, global_batch=8, length=1024, precision="bf16")
    found = {
        gib: policy.cheapest(
            lambda need, gib=gib: need <= gib * 2**30, model, train, method("lorafa"), LOCAL, device="cuda"
        )
        for gib in (40, 24, 17.95)
    }
    assert found[40].text == "none"
    assert "block" not in found[24].text
    assert "attn+mlp" in found[24].text
    assert "block" in found[17.95].text
