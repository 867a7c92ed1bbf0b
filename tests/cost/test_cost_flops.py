"""The FLOP count equals torch's own counter, and scales as arithmetic must."""

import itertools

import pytest
import torch
from cost_harness import CLASSES, FULL, autocast, batch, build, counted_flops, method, shape, training

from llmsys import schema
from llmsys.cost import step_flops


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flops_are_those_that_torch_counts(family: str, attention: str) -> None:
    model, padded = shape(family=family, attention=attention, num_layers=2), family == "bert"
    for kind, recompute in itertools.product(("full", "lora_peft", "lorafa_peft"), ("none", "block")):
        train, how = training(recompute=recompute), method(kind)
        torch.manual_seed(0)
        counted = counted_flops(build(model, train, how), batch(model, train, padded), autocast(model, train))
        predicted = step_flops(model, train, how, num_labels=CLASSES, padded=padded)
        assert predicted == pytest.approx(counted, rel=0.01), (kind, recompute)


def test_a_step_of_more_micro_batches_is_that_many_times_the_work() -> None:
    assert step_flops(shape(), training(global_batch=8), FULL) == 4 * step_flops(shape(), training(), FULL)


def test_seven_billion_parameters_cost_six_flops_a_parameter_and_token() -> None:
    # 6 N T (Kaplan et al., arXiv 2001.08361) without the embedding, which multiplies nothing, plus attention
    model = schema.Model(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, num_kv_heads=32,
        max_length=4096, attention="eager",
    )  # fmt: skip
    train = schema.Train(micro_batch=1, global_batch=1, length=512)
    products = 6 * (6_738_415_616 - 32000 * 4096 - 65 * 4096) * 512
    attention = 3 * 32 * 4 * 512 * 512 * 4096
    assert step_flops(model, train, FULL) == pytest.approx(products + attention, rel=1e-9)


def test_freezing_saves_the_weight_gradients() -> None:
    full, lora, fa = (step_flops(shape(), training(), method(kind)) for kind in ("full", "lora_peft", "lorafa_peft"))
    assert fa < lora < full
    assert step_flops(shape(), training(), schema.Method(kind="majority")) == 0
    with pytest.raises(ValueError, match=r"method.kind=galore"):
        step_flops(shape(), training(), schema.Method(kind="galore"))
