"""A quantised base is as near the full one as its format promises, is never trained, and stores what is said."""

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from llmsys import schema, wiring
from llmsys.models import linear_names, load
from llmsys.models.quant import linear_weights_trained, parameter_count
from llmsys.profile import memory
from rank_pool import briefly

CPU = torch.device("cpu")
FORMATS = ["nf4", "int8"]


def make(quant: str, family: str = "llama", **changes: Any) -> Any:
    cfg = schema.Transformer(family=family, quant=quant, tie_embeddings=family == "t5", **changes)
    return load(cfg, objective=cfg.objective, num_labels=3, device=CPU, seed=0, folder=None)


def adapted(quant: str, kind: str = "lora_peft", family: str = "llama", **changes: Any) -> Any:
    dtype = changes.pop("adapters", "fp32")
    torch.manual_seed(0)
    return wiring.method(schema.Adapter(kind=kind, r=4, dtype=dtype)).prepare(make(quant, family, **changes))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(32).reshape(2, 16) % 300
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("family", ["llama", "bert", "roberta", "t5"])
@pytest.mark.parametrize(("quant", "low", "high"), [("nf4", 0.085, 0.1), ("int8", 0.003, 0.01)])
def test_error_is_that_of_the_format(quant: str, low: float, high: float, family: str) -> None:
    """|W - Q(W)| / |W| of normal weights, in every layer: also where rows (176 wide) and runs of 64 do not align."""
    full, coarse = make("none", family), make(quant, family)
    names = linear_names(full, [])
    assert any(full.get_submodule(name).in_features % 64 for name in names)
    for name in names:
        weight, layer = full.get_submodule(name).weight, coarse.get_submodule(name)
        assert low < (layer.dequantised(torch.float32) - weight).norm() / weight.norm() < high, name


def test_runs_keep_their_own_scale() -> None:
    """Ten times larger weights leave the others' error at a format's: nf4 scales 64 in a run together, int8 a row."""
    from llmsys.models import quant_layers

    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    large = torch.zeros(6 * 96, dtype=torch.bool)
    large[64:128] = True
    weight.view(-1)[large] *= 10.0
    linear = nn.Linear(96, 6, bias=False)
    linear.weight.data.copy_(weight)
    error = (quant_layers.nf4()(linear).dequantised(torch.float32) - weight).view(-1)
    for part in (large, ~large):
        assert error[part].norm() / weight.view(-1)[part].norm() < 0.12  # 64 values only
    error = quant_layers.int8(linear).dequantised(torch.float32) - weight
    assert error[2:].norm() / weight[2:].norm() < 0.01


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quant", FORMATS)
def test_product_and_gradient_are_those_of_the_dequantised_weight(quant: str, bias: bool) -> None:
    from llmsys.models import quant_layers

    torch.manual_seed(0)
    linear = nn.Linear(96, 48, bias=bias)
    layer = (quant_layers.nf4() if quant == "nf4" else quant_layers.int8)(copy.deepcopy(linear))
    plain = nn.Linear(96, 48, bias=bias)
    plain.load_state_dict({**linear.state_dict(), "weight": layer.dequantised(torch.float32)})
    x, dy = torch.randn(2, 5, 96), torch.randn(2, 5, 48)
    for training in (True, False):
        results = []
        for module in (layer.train(training), plain):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.backward(dy)
            results.append((y, leaf.grad))
        assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
        assert torch.allclose(results[0][1], results[1][1], atol=1e-5)


@pytest.mark.parametrize("quant", FORMATS)
def test_products_are_in_bf16_under_autocast_and_leave_the_layer_as_it_was(quant: str) -> None:
    model = make(quant, "bert")
    layer = model.get_submodule(linear_names(make("none", "bert"), [])[0])
    before = {name: tensor.clone() for name, tensor in layer.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 64)).dtype is torch.bfloat16
    assert layer(torch.randn(3, 64)).dtype is torch.float32
    assert make(quant, dtype="bf16")(**batch()).logits.dtype is torch.bfloat16
    for name, tensor in layer.named_parameters():
        assert tensor.dtype is before[name].dtype
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))


@pytest.mark.parametrize("quant", FORMATS)
def test_only_the_linear_layers_of_the_blocks_are_quantised(quant: str) -> None:
    full, coarse = make("none", "bert"), make(quant, "bert")
    names = set(linear_names(full, []))
    for name, module in full.named_modules():
        kind = type(coarse.get_submodule(name))
        if name in names:
            assert kind is not type(module)
            assert issubclass(kind, nn.Linear)
        else:
            assert kind is type(module), name
    assert torch.equal(full.classifier.weight, coarse.classifier.weight)
    assert parameter_count(coarse) == parameter_count(full) == sum(p.numel() for p in full.parameters())


@pytest.mark.parametrize("quant", FORMATS)
def test_same_weights_give_the_same_bits(quant: str) -> None:
    ids = batch()["input_ids"]
    assert torch.equal(make(quant)(input_ids=ids).logits, make(quant)(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("quant", FORMATS)
def test_bytes_are_those_of_the_formula(quant: str, dtype: str) -> None:
    """The formula at the head of `models/quant.py`; 4.13 and 8.1 bits a weight where matrices are large."""
    full, coarse = make("none", dtype=dtype, hidden_size=128), make(quant, dtype=dtype, hidden_size=128)
    weights = [full.get_submodule(name).weight for name in linear_names(full, [])]

    def held(model: nn.Module) -> int:
        return sum(memory.num_bytes(t) for t in [*model.parameters(), *model.buffers()])

    def formula(weight: torch.Tensor) -> int:
        n, rows = weight.numel(), weight.shape[0]
        if quant == "int8":
            return n + 4 * rows
        scales = -(-n // 64)
        return -(-n // 2) + scales + 4 * -(-scales // 256) + 4

    expected = held(full) - sum(memory.num_bytes(w) for w in weights) + sum(formula(w) for w in weights)
    assert held(coarse) == expected + (1088 if quant == "nf4" else 0)


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("kind", ["lora_peft", "lorafa_peft"])
def test_peft_puts_its_own_quantised_layers_around_ours(quant: str, kind: str) -> None:
    import peft.tuners.lora.bnb as theirs

    model = adapted(quant, kind)
    wanted = theirs.Linear4bit if quant == "nf4" else theirs.Linear8bitLt
    assert type(model.get_submodule("model.layers.1.mlp.up_proj")) is wanted
    assert not linear_weights_trained(model)
    model(**batch()).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in trained} == ({"lora_B"} if "fa" in kind else {"lora_A", "lora_B"})


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("family", ["llama", "bert", "roberta", "t5"])
@pytest.mark.parametrize("quant", FORMATS)
def test_every_family_trains_over_it_in_every_precision(quant: str, family: str, precision: str) -> None:
    """The loss is near the full base's, and its gradient points the same way. (T5 casts to the dtype of a weight.)"""
    losses, gradients = {}, {}
    for name in ("none", quant):
        model = adapted(name, family=family, dtype="bf16" if precision == "bf16" else "fp32")
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:  # zero at the start, which would leave A without a gradient
                torch.nn.init.normal_(parameter, 0.0, 0.02, generator=torch.Generator().manual_seed(0))
        ids = batch()["input_ids"]
        labels = torch.tensor([0, 2]) if family in ("bert", "roberta") else ids
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        losses[name] = loss.item()
        gradients[name] = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
    assert losses[quant] == pytest.approx(losses["none"], rel=0.03)
    assert torch.cosine_similarity(gradients[quant], gradients["none"], dim=0) > 0.9


@pytest.mark.parametrize("quant", FORMATS)
def test_adapters_have_the_models_dtype_where_that_is_asked(quant: str) -> None:
    for adapters, wanted in (("model", torch.bfloat16), ("fp32", torch.float32)):
        model = adapted(quant, dtype="bf16", adapters=adapters)
        assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {wanted}


@pytest.mark.parametrize("quant", briefly(["none", *FORMATS], "nf4"))
def test_lorafa_does_not_keep_an_adapted_layers_input(quant: str) -> None:
    """LoRA stores every input x [B, L, N] for the gradient of A; LoRA-FA only x A^T, and a quantised base nothing."""
    import gc
    import weakref

    saved = {}
    for kind in ("lora_peft", "lorafa_peft"):
        model = adapted(quant, kind)
        layer = model.get_submodule("model.layers.0.mlp.down_proj")
        x = torch.randn(2, 16, 176, requires_grad=True) * 1.0
        kept = weakref.ref(x)
        y = layer(x)
        del x
        gc.collect()
        saved[kind] = kept() is not None
        y.sum().backward()
    assert saved == {"lora_peft": True, "lorafa_peft": False}


@pytest.mark.parametrize("quant", FORMATS)
def test_a_quantised_base_saves_no_more_than_a_frozen_one(quant: str) -> None:
    def saved(kind: str) -> int:
        model = adapted(kind, "lorafa_peft")
        return memory.saved_tensors(model, lambda: model(**batch()).loss)

    assert saved(quant) == saved("none")


def test_which_weights_are_trained() -> None:
    full = make("none")
    assert linear_weights_trained(full)
    assert not linear_weights_trained(full.requires_grad_(False))
    full.model.norm.weight.requires_grad_(True)
    full.model.layers[0].input_layernorm.weight.requires_grad_(True)
    full.lm_head.weight.requires_grad_(True)
    assert not linear_weights_trained(full)
    full.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    assert linear_weights_trained(full)
    assert not linear_weights_trained(adapted("none"))
    for kind in ("lora", "lorafa"):
        assert not linear_weights_trained(wiring.method(schema.LoRA(kind=kind, r=4)).prepare(make("none")))
    assert not linear_weights_trained(make("nf4"))


@pytest.mark.parametrize(
    "cfg",
    [
        schema.Transformer(name="gpt2_tiny", family="gpt2", quant="nf4", intermediate_size=256),
        schema.ConvNet(kind="convnet", name="vgg_tiny", family="vgg", block="plain", stem="cifar", quant="nf4"),
    ],
    ids=["gpt2", "vgg"],
)
def test_what_has_no_such_layers_is_refused(cfg: schema.Model) -> None:
    with pytest.raises(ValueError, match=rf"^model.quant=nf4: is not for model {cfg.name} \({cfg.family}\): .*"):
        load(cfg, objective=cfg.objective, num_labels=3, device=CPU, seed=0, folder=None)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(LookupError, match=r"pip install 'llmsys\[train\]'"):
        make("nf4")
