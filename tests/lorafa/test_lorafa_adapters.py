"""Several adapters, none for a while, merged and back: what runs changes, and A never does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapter_harness import IDS, MLP, TARGETS, learnt, matrices, mlp, outputs, tiny

from llmsys.lorafa import (
    LoRAFAConfig,
    delete_adapter,
    disable_adapter,
    inject,
    merge,
    names,
    save_adapter,
    set_adapter,
    unload,
    unmerge,
)
from llmsys.lorafa.blocks.block import Fused


def trained(model: torch.nn.Module) -> set[str]:
    return {path for path, p in model.named_parameters() if p.requires_grad}


def test_each_adapter_has_its_own_configuration_and_output() -> None:
    """Another rank, other layers, another dropout and recomputation: as if each were alone."""
    first = LoRAFAConfig(r=4, share_a=True)
    second = LoRAFAConfig(
        r=2, alpha=9, targets=("down_proj",), init="gaussian", recompute="mlp", correction="closed_form"
    )
    model = learnt(inject(tiny(), first, "first"), "first")
    one = outputs(model)
    learnt(inject(model, second, "second"), "second", seed=2)
    two = outputs(model)
    assert torch.equal(two, outputs(learnt(inject(tiny(), second, "second"), "second", seed=2)))
    assert trained(model) == {f"model.layers.{i}.mlp.down_proj.adapters.second.B" for i in (0, 1)}
    assert {m.policy for m in model.modules() if isinstance(m, Fused)} == {"mlp"}
    set_adapter(model, "first")
    assert torch.equal(outputs(model), one)
    assert all(".first.B" in path for path in trained(model))
    assert len(trained(model)) == 14
    assert {m.policy for m in model.modules() if isinstance(m, Fused)} == {"none"}
    delete_adapter(model, "first")
    assert names(model) == ["second"]
    assert torch.equal(outputs(model), outputs(tiny())), "none is active until one is chosen"
    set_adapter(model, "second")
    assert torch.equal(outputs(model), two)
    delete_adapter(model, "second")
    assert [type(m) for m in model.modules()] == [type(m) for m in tiny().modules()]


def test_a_reference_pass_sees_the_base_and_training_goes_on_as_if_it_had_not_been() -> None:
    """DPO's loss needs both in one step."""
    model, base = learnt(inject(tiny(), LoRAFAConfig(r=4))), outputs(tiny())
    before = outputs(model)
    with disable_adapter(model):
        assert torch.equal(outputs(model), base)
        with disable_adapter(model):
            assert torch.equal(outputs(model), base)
        assert torch.equal(outputs(model), base)
    with pytest.raises(KeyError), disable_adapter(model):
        raise KeyError
    assert torch.equal(outputs(model), before)
    assert len(trained(model)) == 14


def test_a_backward_pass_after_the_context_is_that_of_the_forward_pass_inside_it() -> None:
    model = mlp()
    x = torch.ones(1, 16, requires_grad=True)
    with disable_adapter(model):
        y = model(x)
    y.sum().backward()
    plain = torch.ones(1, 16, requires_grad=True)
    MLP()(plain).sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)
    assert model.first.adapters["default"].B.grad is None


def test_a_is_the_same_and_without_gradient_through_a_whole_life(tmp_path: Any) -> None:
    model = learnt(inject(tiny(), LoRAFAConfig(r=4)))
    before = matrices(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    state = copy.deepcopy(model.state_dict())
    inject(model, LoRAFAConfig(r=2), "other")
    set_adapter(model, "default")
    with disable_adapter(model):
        outputs(model)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    merge(model)
    save_adapter(model, tmp_path)
    unmerge(model)
    delete_adapter(model, "other")
    model.load_state_dict(state)
    model.requires_grad_(True)
    after = matrices(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(buffer.requires_grad or buffer.grad is not None for buffer in model.buffers())


def test_an_unknown_name_is_told_which_there_are() -> None:
    for change in (set_adapter, delete_adapter):
        with pytest.raises(ValueError, match=r"name=x: there is no adapter of this name; there are default"):
            change(mlp(), "x")
    with pytest.raises(ValueError, match="there are none"):
        set_adapter(MLP(), "x")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_is_the_same_model_and_unmerged_the_same_bits(family: str, dtype: str) -> None:
    """In fp32 to its rounding; in bf16 every weight is rounded, once, to 2^-9 of itself."""
    bias = {"bias": "lora_only"} if family == "gpt2" else {}
    model = learnt(inject(tiny(family, dtype), LoRAFAConfig(r=4, **bias)))
    beside, weights = outputs(model), {name: p.clone() for name, p in model.named_parameters()}
    merge(model)
    merged = outputs(model)
    assert (merged - beside).norm() < {"fp32": 1e-5, "bf16": 0.05}[dtype] * beside.norm()
    assert not torch.equal(merged, outputs(tiny(family, dtype)))
    unmerge(model)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(outputs(model), beside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_merging_rounds_once(dtype: torch.dtype) -> None:
    model = mlp(dtype=dtype)
    adapter, before = model.first.adapters["default"], model.first.weight.double()
    exact = before + adapter.scale * adapter.B.double() @ adapter.A.double()
    merge(model)
    assert torch.equal(model.first.weight, exact.to(dtype))


def test_a_merged_model_runs_no_adapter_and_lets_none_be_changed() -> None:
    model = merge(mlp())
    model.first.adapters["default"].B.data.fill_(100.0)
    torch.testing.assert_close(outputs(model), outputs(mlp()))
    for what, call in {
        "merge": lambda: merge(model),
        "set_adapter": lambda: set_adapter(model, "default"),
        "delete_adapter": lambda: delete_adapter(model, "default"),
        "disable_adapter": lambda: disable_adapter(model).__enter__(),
        "inject": lambda: inject(model, LoRAFAConfig(r=2, targets=TARGETS), "b"),
    }.items():
        with pytest.raises(ValueError, match=f"{what}: the "):
            call()


def test_what_cannot_be_merged_or_unmerged_says_so() -> None:
    with pytest.raises(ValueError, match="unmerge: the model is not merged"):
        unmerge(mlp())
    with pytest.raises(ValueError, match=r"unmerge: merge\(keep=False\) has not kept the original weights"):
        unmerge(merge(mlp(), keep=False))
    with pytest.raises(ValueError, match="merge: no adapter is active"):
        merge(MLP())


def test_a_learnt_model_without_adapters_is_left_by_merge_and_unload() -> None:
    model = learnt(inject(tiny(), LoRAFAConfig(r=4)))
    merged = outputs(merge(model, keep=False))
    unload(model)
    assert list(model.state_dict()) == list(tiny().state_dict())
    assert torch.equal(outputs(model), merged)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_quantised_base_is_not_merged(quant: str) -> None:
    model = learnt(inject(tiny(quant=quant), LoRAFAConfig(r=4)))
    before = outputs(model)
    with pytest.raises(ValueError, match=r"merge: model\.layers\.0\.self_attn\.q_proj is quantised"):
        merge(model)
    assert torch.equal(outputs(model), before)
