"""What peft saved is loaded, what we saved peft loads, with the same logits; and what peft's own LoRA-FA gets wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_harness import IDS, MLP, TARGETS, learnt, matrices, mlp, outputs, tiny
from torch import nn

from llmsys.lorafa import (
    LoRAFAConfig,
    disable_adapter,
    from_peft,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    to_peft,
)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's call


def close(mine: Any, theirs: Any) -> None:
    a, b = outputs(mine), outputs(theirs)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.std()))


def peft_model(base: Any, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder)).eval()


def saved(base: Any, folder: Path, **config: Any) -> Any:
    """A peft model that has learnt something, and is saved."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        base, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(TARGETS), **config})
    ).eval()
    generator = torch.Generator().manual_seed(1)
    for path, parameter in model.named_parameters():
        if "lora_" in path or "modules_to_save" in path:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"share_a": True}),
        ("llama", {"quant": "nf4"}),
        ("llama", {"quant": "int8"}),
        ("llama", {"init": "pca", "alpha": 2.5, "dropout": 0.1}),
        ("llama", {"train_a": True}),
        ("gpt2", {"bias": "lora_only"}),
        ("bert", {"targets": ["query", "dense"], "bias": "lora_only"}),
        ("t5", {}),
    ],
)
def test_there_and_back(tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    """The same logits in peft, and again here; the second file is the first, tensor for tensor."""
    from safetensors.torch import load_file

    quant = config.pop("quant", "none")
    base = tiny(family, quant=quant)
    model = learnt(inject(copy.deepcopy(base), LoRAFAConfig(r=4, **config), batches=[IDS]))
    to_peft(model, tmp_path / "a")
    close(peft_model(copy.deepcopy(base), tmp_path / "a"), model)
    back = from_peft(base, tmp_path / "a")
    close(back, model)
    to_peft(back, tmp_path / "b")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_new_head_goes_along(tmp_path: Path) -> None:
    model = mlp(bias="lora_only").eval()
    nn.init.ones_(model.head.weight)
    to_peft(model, tmp_path, modules=["head"])
    close(peft_model(MLP(), tmp_path), model)
    close(from_peft(MLP().eval(), tmp_path), model)


def test_a_bf16_model_keeps_the_given_a_in_fp32(tmp_path: Path) -> None:
    """peft's A has entries that bf16 lacks; what is exported again is what came."""
    from safetensors.torch import load_file

    saved(MLP(), tmp_path / "a")
    to_peft(from_peft(MLP(torch.bfloat16), tmp_path / "a"), tmp_path / "b")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape.*lora_B.bias")  # peft's alarm at its own bias
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"lora_bias": True},
        {"lora_bias": True, "target_modules": ["second"], "modules_to_save": ["head"]},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.2},
    ],
    ids=lambda config: "-".join(config) or "default",
)
def test_pefts_own_adapters_are_taken_over(tmp_path: Path, config: dict[str, Any]) -> None:
    theirs = saved(MLP(), tmp_path / "peft", **config)
    mine = from_peft(MLP().eval(), tmp_path / "peft", "theirs")
    close(mine, theirs)
    merged = outputs(merge(copy.deepcopy(mine)))
    torch.testing.assert_close(merged, outputs(mine), rtol=0, atol=1e-5)
    modules = config.get("modules_to_save", ())
    save_adapter(mine, tmp_path / "ours", "theirs", modules=modules)
    close(load_adapter(MLP().eval(), tmp_path / "ours"), theirs)
    assert not any(".A" in path for path, p in mine.named_parameters() if p.requires_grad)


def test_pefts_trained_biases_are_taken_over(tmp_path: Path) -> None:
    theirs = saved(MLP(), tmp_path, bias="lora_only")
    theirs.base_model.model.first.base_layer.bias.data += 1
    theirs.save_pretrained(tmp_path)
    close(from_peft(MLP(), tmp_path), theirs)


def test_a_of_pefts_adapter_goes_on_being_trained_where_asked_for(tmp_path: Path) -> None:
    saved(MLP(), tmp_path / "peft")
    model = from_peft(MLP(), tmp_path / "peft", train_a=True)
    model(torch.ones(2, 16)).sum().backward()
    assert model.first.adapters["default"].A.grad.any()
    save_adapter(model, tmp_path / "ours")
    assert torch.equal(outputs(load_adapter(MLP(), tmp_path / "ours")), outputs(model))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora=True: LoRA-FA's adapters have nothing like it"),
        ({"rank_pattern": {"first": 8}}, "rank_pattern={'first': 8}"),
        ({"alpha_pattern": {"first": 8}}, "alpha_pattern="),
        ({"layer_replication": [[0, 1]]}, "layer_replication="),
        ({"knob_of_tomorrow": 1}, "knob_of_tomorrow=1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa: changes the base too"),
        ({"bias": "all"}, "bias=all: only biases of adapted layers"),
        ({"peft_type": "IA3"}, "peft_type=IA3: only LORA"),
        ({"r": None}, "damaged, or not of LoRA"),
        ({"r": 8}, r"first\.B has shape \(32, 4\), not \(32, 8\)"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_its_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    saved(MLP(), tmp_path)
    edit(tmp_path, **changes)
    model = MLP()
    with pytest.raises(ValueError, match=message) as caught:
        from_peft(model, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(hasattr(module, "adapters") for module in model.modules())


@pytest.mark.parametrize("kind", ["embedding", "convolution", "dora", "missing", "pickle", "another model"])
def test_what_is_not_for_a_linear_layer_of_this_model_is_refused(tmp_path: Path, kind: str) -> None:
    model: Any = MLP()
    if kind == "embedding":
        saved(nn.Sequential(nn.Embedding(9, 16)), tmp_path, target_modules=["0"])
        message = "lora_embedding_A is of an embedding; only linear layers take adapters"
    elif kind == "convolution":
        saved(nn.Sequential(nn.Conv2d(1, 8, 3)), tmp_path, target_modules=["0"])
        message = r"0\.lora_A\.weight is of a convolution"
    elif kind == "dora":
        saved(MLP(), tmp_path, use_dora=True)
        edit(tmp_path, use_dora=False)
        message = r"lora_magnitude_vector: LoRA-FA's adapters have nothing like it"
    elif kind == "missing":
        message = "adapter_config.json: no such file"
    elif kind == "pickle":
        saved(MLP(), tmp_path)
        (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
        message = r"adapter_model\.safetensors: no such file; .* \(a pickle is not read\)"
    else:
        saved(MLP(), tmp_path)
        model, message = tiny(), "is for another model: first is no linear layer of this one"
    with pytest.raises(ValueError, match=message):
        from_peft(model, tmp_path)


# What follows is what peft 0.21's LoRA-FA, an optimizer beside its LoRA, gets wrong (create_lorafa_optimizer).


def step(model: Any) -> torch.optim.Optimizer:
    """One of plain AdamW on whatever is trained."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    dtype = next(model.parameters()).dtype
    model(torch.ones(4, 16, dtype=dtype)).square().sum().backward()
    optimizer.step()
    return optimizer


def lora_bias() -> None:
    model = mlp(bias="lora_only")
    before = model.first.adapters["default"].bias.clone()
    step(model)
    assert not torch.equal(model.first.adapters["default"].bias, before)


def two_adapters_one_active() -> None:
    model = mlp()
    before = [adapter.B.clone() for adapter in model.first.adapters.values()]
    inject(model, LoRAFAConfig(r=3, targets=TARGETS), "b")
    step(model)
    assert torch.equal(model.first.adapters["default"].B, before[0])
    assert model.first.adapters["b"].B.any()


def a_layer_that_is_not_used() -> None:
    model = mlp()
    model.forward = lambda x: model.head(model.first(x)[..., :16])
    step(model)
    assert model.second.adapters["default"].B.grad is None


def a_convolution() -> None:
    with pytest.raises(ValueError, match="is a Conv2d; only linear layers"):
        inject(nn.Sequential(nn.Conv2d(1, 8, 3)), LoRAFAConfig(r=1, targets=("0",)))


def an_embedding() -> None:
    with pytest.raises(ValueError, match="is an Embedding"):
        inject(nn.Sequential(nn.Embedding(9, 8)), LoRAFAConfig(r=1, targets=("0",)))


def dora() -> None:
    with pytest.raises(ValueError, match="DoRA"):
        LoRAFAConfig(use_dora=True)


def choosing_an_adapter() -> None:
    model, optimizer = mlp(), None
    optimizer = step(model)
    before = matrices(model)
    set_adapter(model, "default")
    optimizer.step()
    after = matrices(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(path.endswith(".A") for path, p in model.named_parameters())


def a_reference_pass() -> None:
    model = mlp()
    with disable_adapter(model):
        outputs(model)
    model(torch.ones(2, 16)).sum().backward()
    assert not any(path.endswith(".A") for path, p in model.named_parameters())


def moments_of_a_bf16_base() -> None:
    model = mlp(dtype=torch.bfloat16)
    optimizer = step(model)
    assert {moments["exp_avg"].dtype for moments in optimizer.state.values()} == {torch.float32}


def resuming_the_optimizer() -> None:
    """peft's state has strings for keys, which torch leaves on the device they were saved from."""
    model = mlp()
    optimizer = step(model)
    assert all(isinstance(key, int) for key in optimizer.state_dict()["state"])
    other = torch.optim.AdamW([p for p in mlp().parameters() if p.requires_grad])
    other.load_state_dict(optimizer.state_dict())
    assert len(other.state) == 2


def flat_partitions() -> None:
    """ZeRO-1 and 2 hand an optimizer one flat piece of the parameters, which have no names and come in no pairs."""
    model, whole = mlp(), mlp()
    trained = [p for p in model.parameters() if p.requires_grad]
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in trained]))
    model(torch.ones(4, 16)).square().sum().backward()
    flat.grad = torch.cat([p.grad.flatten() for p in trained])
    torch.optim.AdamW([flat], lr=0.1).step()
    step(whole)
    assert torch.equal(flat, torch.cat([p.flatten() for p in whole.parameters() if p.requires_grad]))


@pytest.mark.parametrize(
    "use",
    [
        dora,
        lora_bias,
        two_adapters_one_active,
        a_layer_that_is_not_used,
        a_convolution,
        an_embedding,
        choosing_an_adapter,
        a_reference_pass,
        moments_of_a_bf16_base,
        resuming_the_optimizer,
        flat_partitions,
    ],
    ids=lambda use: use.__name__,
)
def test_what_pefts_lorafa_gets_wrong(use: Callable[[], None]) -> None:
    use()
