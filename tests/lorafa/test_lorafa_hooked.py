"""Models that others have had their hands on: accelerate's hooks, overridden blocks, files, checkpointing, training."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lorafa_harness import batch, build, with_adapters
from torch import Tensor, nn

from llmsys.cost.shapes import SHARING
from llmsys.lorafa import LoRAFAConfig, inject, set_adapter, unload
from llmsys.lorafa.blocks import check_policies
from llmsys.lorafa.blocks.llama import LlamaBlock
from llmsys.lorafa.injection import GROUPS
from llmsys.models import blocks, chunk_loss
from llmsys.schema.coherence import CUT_FAMILIES
from llmsys.schema.recompute import POLICIES

INPUTS = batch("llama")


def logits(model: Any) -> Tensor:
    return model(**INPUTS).logits.detach()


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Gets one entry for each call of a fused block: whether it leaves its layers to run one by one."""
    calls: list[bool] = []
    apart = LlamaBlock.apart
    monkeypatch.setattr(LlamaBlock, "apart", lambda self: calls.append(apart(self)) or calls[-1])
    return calls


def hook(module: nn.Module, **settings: Any) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", **settings))


@pytest.mark.parametrize("hooked", ["blocks", "layers", "both", "offloaded"])
def test_adapters_run_in_a_model_that_accelerate_has_hooked(hooked: str, fused: list[bool]) -> None:
    """Its hooks keep a `forward` in each object, which a change of class does not reach; `offloaded` leaves weights on
    `meta` but while their modules are called."""
    expected, base = logits(with_adapters(build("llama"))), logits(build("llama"))
    model = build("llama")
    for _, block in blocks(model):
        if hooked in ("blocks", "both"):
            hook(block, io_same_device=True, place_submodules=True)
        for module in block.modules():
            if isinstance(module, nn.Linear) and hooked != "blocks":
                hook(module, offload=hooked == "offloaded")
    assert torch.equal(logits(model), base)
    if hooked == "offloaded":
        with pytest.raises(ValueError, match=r"init=weight_svd: the weight of model\.layers\.0.* is not here"):
            inject(model, LoRAFAConfig(r=2, init="weight_svd"))
    with_adapters(model)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(expected, base)
    assert fused == [False, False, *[hooked == "offloaded"] * 2]
    if hooked == "offloaded":
        with pytest.raises(ValueError, match="backward: accelerate has offloaded weights"):
            model(**INPUTS).loss.backward()
    unload(model)
    assert torch.equal(logits(model), base)


def test_adapters_can_be_offloaded_with_their_model_and_fetched_again() -> None:
    import accelerate

    model = with_adapters(build("llama"))
    expected, base = logits(model), logits(build("llama"))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    assert torch.equal(logits(model), expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(unload(model)), base)


def test_a_layer_or_block_whose_forward_was_replaced_is_refused() -> None:
    for path in ("model.layers.1", "model.layers.1.mlp.up_proj"):
        model = build("llama")
        module: Any = model.get_submodule(path)
        module.forward = lambda *args, **kwargs: None
        with pytest.raises(ValueError, match=r"forward` .*has been replaced on the object"):
            inject(model, LoRAFAConfig(r=2))
        assert "Adapted" not in repr(model)


@pytest.mark.parametrize("part", ["", "mlp"])
def test_an_overridden_forward_runs(part: str) -> None:
    model = build("llama")
    block = model.model.layers[0]
    changed: Any = block.get_submodule(part)
    plain = type(changed)
    own = {"forward": lambda self, *args, **kwargs: plain.forward(self, *args, **kwargs) * 2, "__module__": "theirs"}
    changed.__class__ = type("Own" + plain.__name__, (plain,), own)
    expected = logits(model)
    assert torch.equal(logits(with_adapters(model, start=True)), expected)
    assert [isinstance(block, LlamaBlock) for _, block in blocks(model)] == [False, True]


def test_blocks_that_were_wrapped_later_are_not_unloaded() -> None:
    """FSDP2 makes a class of its own out of a block's."""
    model = with_adapters(build("llama"))
    block: Any = model.model.layers[0]
    block.__class__ = type("Wrapped", (type(block),), {})
    set_adapter(model, "default")
    with pytest.raises(ValueError, match="unload: blocks have been wrapped"):
        unload(model)


def test_hooks_that_a_fused_block_does_not_run_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda *args: None)
    with_adapters(model)
    assert caplog.text.count("hooks of LlamaMLP do not run") == 1


def test_classes_made_at_run_time_pass_for_the_plain_ones(tmp_path: Path) -> None:
    """To auto-wrap, which finds blocks by the names of their classes; in files; and to pickle, which knows no class
    that no import leads to."""
    model = chunk_loss(with_adapters(build("llama"), targets=("q_proj",)))
    assert {type(block).__name__ for _, block in blocks(model)} == {"LlamaDecoderLayer"}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
        assert torch.equal(other(**INPUTS).loss, model(**INPUTS).loss)
        other.model.layers[0].self_attn.q_proj.adapters["default"].B.data.add_(1)
        assert not torch.equal(other(**INPUTS).loss, model(**INPUTS).loss)


@pytest.mark.filterwarnings("ignore:.(is_gradient_checkpointing|gradient_checkpointing_enable).:FutureWarning")
def test_checkpointing_is_what_it_was_before(caplog: pytest.LogCaptureFixture) -> None:
    def flags(model: Any) -> dict[str, bool]:
        found = {path: getattr(module, "gradient_checkpointing", None) for path, module in model.named_modules()}
        return {path: flag for path, flag in found.items() if flag is not None}

    for family in ("llama", "t5"):
        model = build(family)
        plain = flags(model)
        with_adapters(model, recompute="block")
        assert all(block.gradient_checkpointing for _, block in blocks(model))
        inject(model, LoRAFAConfig(r=2), "b")
        assert flags(unload(model)) == plain
        assert "gradient checkpointing is on" not in caplog.text
    model = build("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    chosen = flags(model)
    with_adapters(model)
    assert "gradient checkpointing is on: 2 blocks" in caplog.text
    inject(model, LoRAFAConfig(r=2, recompute="mlp:1,block:1"), "b")
    set_adapter(model, "default")
    assert flags(model) == chosen
    assert flags(unload(model)) == chosen


@pytest.mark.parametrize("policy", ["none", "attn+mlp"])
def test_a_base_layer_without_an_adapter_can_be_trained(policy: str, caplog: pytest.LogCaptureFixture) -> None:
    grads = []
    for ours in (False, True):
        model = build("llama")
        if ours:
            inject(model, LoRAFAConfig(r=2, targets=("q_proj",), recompute=policy))
        weight = model.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
        model(**INPUTS).loss.backward()
        grads.append(weight.grad)
    assert torch.equal(*grads)
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="the weight of an adapted AdaptedLinear is trained"):
        model(**INPUTS)
    with torch.no_grad():
        model(**INPUTS)


def test_targets_and_recompute_can_be_text() -> None:
    assert LoRAFAConfig(targets="q_proj").targets == ("q_proj",)  # type: ignore[arg-type]
    assert LoRAFAConfig(targets="all-linear").targets == ()  # type: ignore[arg-type]
    model = inject(build("llama"), LoRAFAConfig(r=2, recompute="mlp:1,none:1"))
    assert [block.policy for _, block in blocks(model)] == ["mlp", "none"]
    for wrong in ("mpl", "auto", "mlp:0"):
        with pytest.raises(ValueError, match=rf"^recompute={wrong}: must be one of none, mlp, attn\+mlp, block, or"):
            LoRAFAConfig(recompute=wrong)
    with pytest.raises(ValueError, match=r"^recompute=mlp:3: counts 3 blocks, and the model has 2"):
        inject(build("llama"), LoRAFAConfig(r=2, recompute="mlp:3"))


def test_what_schema_and_cost_know_of_blocks_is_what_lorafa_does() -> None:
    """They may not import it."""
    from adapter_harness import tiny

    assert GROUPS == SHARING
    for family in ("llama", "bert", "roberta", "t5", "gpt2"):
        found = {chains is not None for _, chains, _ in check_policies(tiny(family), POLICIES[0])}
        assert found == {family in CUT_FAMILIES}
