"""Our peft baselines are peft's: their files are its files, and the update is eq. 4 of arXiv 2308.03303."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import train_harness as harness

from llmsys import models, schema
from llmsys.lorafa.peft_baselines import LoRA, LoRAFA


def tiny(family: str = "llama", dtype: str = "fp32") -> torch.nn.Module:
    objective = "classification" if family == "bert" else "causal_lm"
    return models.load(
        schema.Model(family=family, dtype=dtype),
        objective=objective,
        num_labels=3,
        device=torch.device("cpu"),
        seed=0,
        folder=None,
    )


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's call, transformers' name
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_peft_reads_what_a_run_leaves(tmp_path: Path, family: str) -> None:
    """Whoever has the base can go on in peft without this package."""
    from peft import PeftModel

    result = harness.run(tmp_path, harness.config("lorafa_peft", family))
    method = LoRAFA(schema.Adapter(kind="lorafa_peft", r=4))
    ours = method.prepare(tiny(family))
    from safetensors.torch import load_file

    saved = load_file(tmp_path / result["files"]["weights"] / "adapter_model.safetensors")
    names = {
        name.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default"): t for name, t in saved.items()
    }
    method.load_state(ours, {name.removeprefix("base_model.model."): tensor for name, tensor in names.items()})
    base = tiny(family)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / result["files"]["weights"]))
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(ours.eval()(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)


def test_b_has_the_gradient_of_the_formula_and_a_has_none() -> None:
    """dB = alpha / r dy^T (x A^T): needs x A^T [., R] alone."""
    method = LoRAFA(schema.Adapter(kind="lorafa_peft", r=2, alpha=6.0, targets=["q_proj"]))
    model = method.prepare(tiny())
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    x, dy = torch.randn(5, 64), torch.randn(5, 64)
    layer(x).backward(dy)
    a = layer.lora_A["default"].weight
    assert a.grad is None
    assert torch.allclose(layer.lora_B["default"].weight.grad, 3.0 * dy.T @ (x @ a.T), rtol=1e-5, atol=1e-5)


def test_adapter_dtype() -> None:
    """`fp32` is peft's default for a bf16 base; `model` is the base's."""
    for dtype, wanted in (("fp32", torch.float32), ("model", torch.bfloat16)):
        method = LoRA(schema.Adapter(kind="lora_peft", r=2, dtype=dtype))
        assert {t.dtype for t in method.state(method.prepare(tiny(dtype="bf16"))).values()} == {wanted}


def test_unknown_targets_are_named() -> None:
    with pytest.raises(ValueError, match="q_prj"):
        LoRA(schema.Adapter(kind="lora_peft", targets=["q_prj"])).prepare(tiny())
