"""The FLOP count equals torch's own counter, and scales as arithmetic must."""

import itertools
from typing import Any

import pytest
import torch
from cost_harness import CLASSES, FULL, LOCAL, autocast, batch, build, counted_flops, method, shape, training

from llmsys import schema
from llmsys.cost import step_flops
from llmsys.cost.flops import model_flops


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta", "t5"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flops_are_those_that_torch_counts(family: str, attention: str) -> None:
    model, padded = shape(family, attention=attention, num_layers=2), family not in ("llama", "gpt2")
    for kind, recompute in itertools.product(("full", "lora_peft", "lorafa_peft"), ("none", "block")):
        train, how = training(recompute=recompute), method(kind)
        torch.manual_seed(0)
        counted = counted_flops(build(model, train, how), batch(model, train, padded), autocast(model, train))
        predicted = step_flops(model, train, how, LOCAL, num_labels=CLASSES, padded=padded)
        assert predicted == pytest.approx(counted, rel=0.01), (kind, recompute)


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "bert", "pooling": "cls"},
        {"family": "roberta", "pooling": "cls"},
        {"family": "resnet"},
        {"family": "resnet", "block": "bottleneck", "stem": "imagenet", "image_size": 65},
        {"family": "vgg"},
    ],
)
def test_flops_of_heads_and_convolutions_are_exact(changes: dict[str, Any]) -> None:
    model, train = shape(**changes), training()
    counted = counted_flops(build(model, train, FULL), batch(model, train, False), autocast(model, train))
    assert step_flops(model, train, FULL, LOCAL, num_labels=CLASSES, padded=False) == counted


@pytest.mark.parametrize("kind", ["full", "lora_peft", "lorafa_peft"])
def test_what_a_model_needs_is_what_plain_autograd_does(kind: str) -> None:
    """Whatever is computed again beside it, and by whichever kernel: the same number, which torch counts once."""
    train, how = training(), method(kind)
    torch.manual_seed(0)
    eager = shape(attention="eager")
    counted = counted_flops(build(eager, train, how), batch(eager, train, False), autocast(eager, train))
    for attention, recompute in itertools.product(("eager", "sdpa"), ("none", "block")):
        changed = training(recompute=recompute)
        needed = model_flops(shape(attention=attention), changed, how, LOCAL)
        assert needed == pytest.approx(counted, rel=0.01)
        done = step_flops(shape(attention=attention), changed, how, LOCAL)
        assert (done > needed) == (attention == "sdpa" or recompute == "block")


def test_an_adapter_needs_the_same_whoever_computes_it() -> None:
    for kind in ("lora", "lorafa"):
        ours, peft = (model_flops(shape(), training(), method(name), LOCAL) for name in (kind, f"{kind}_peft"))
        assert ours == peft
        assert step_flops(shape(), training(recompute="attn+mlp"), method(kind), LOCAL) > ours


def test_published_flops_of_resnet_50() -> None:
    # 4.1 G multiply-adds for an image of 224x224 (as torchvision lists it: 4.09), 2 FLOPs each; the backward pass is
    # twice that, less the gradient of the image itself
    model = schema.ConvNet(
        kind="convnet", family="resnet", depths=[3, 4, 6, 3], widths=[256, 512, 1024, 2048], block="bottleneck",
        stem="imagenet", image_size=224, num_classes=1000,
    )  # fmt: skip
    train = schema.Train(micro_batch=1, global_batch=1)
    assert step_flops(model, train, FULL, LOCAL) == pytest.approx(3 * 2 * 4.09e9, rel=0.02)


def test_tensor_parallel_ranks_divide_the_blocks_and_the_head() -> None:
    """Two ranks do together what one does alone: all products of a llama with heads of its own are cut."""
    alone = step_flops(shape(), training(), FULL, LOCAL)
    cut = step_flops(shape(), training(world=2), FULL, schema.Engine(kind="tp"))
    assert 2 * cut == pytest.approx(alone, rel=1e-9)


def test_a_step_of_more_micro_batches_is_that_many_times_the_work() -> None:
    once, four = (step_flops(shape(), training(global_batch=size), FULL, LOCAL) for size in (2, 8))
    assert four == 4 * once


def test_seven_billion_parameters_cost_six_flops_a_parameter_and_token() -> None:
    # 6 N T (Kaplan et al., arXiv 2001.08361) without the embedding, which multiplies nothing, plus attention
    model = schema.Transformer(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, num_kv_heads=32,
        max_length=4096, attention="eager",
    )  # fmt: skip
    train = schema.Train(micro_batch=1, global_batch=1, length=512)
    products = 6 * (6_738_415_616 - 32000 * 4096 - 65 * 4096) * 512
    attention = 3 * 32 * 4 * 512 * 512 * 4096
    assert step_flops(model, train, FULL, LOCAL) == pytest.approx(products + attention, rel=1e-9)


def test_freezing_saves_the_weight_gradients() -> None:
    kinds = ("full", "lora_peft", "lorafa_peft")
    full, lora, fa = (step_flops(shape(), training(), method(kind), LOCAL) for kind in kinds)
    assert fa < lora < full
    assert step_flops(shape(), training(), schema.Method(kind="majority"), LOCAL) == 0
    with pytest.raises(ValueError, match=r"method.kind=galore"):
        step_flops(shape(), training(), schema.Method(kind="galore"), LOCAL)
