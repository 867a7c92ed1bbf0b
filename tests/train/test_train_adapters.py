"""Our peft baselines are peft's: their files are its files, and the update is eq. 4 of arXiv 2308.03303."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import train_harness as harness

from llmsys import models, schema
from llmsys.lorafa.peft_baselines import LoRA, LoRAFA


def tiny(family: str = "llama", dtype: str = "fp32", pooling: str = "mean") -> torch.nn.Module:
    cfg = schema.Transformer(family=family, dtype=dtype, pooling=pooling, tie_embeddings=family in ("gpt2", "t5"))
    return models.load(
        cfg,
        objective=cfg.objective,
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


def test_gpt2s_transposed_layers_have_the_same_update() -> None:
    """Its weight is stored [N, M]; A [R, N] and B [M, R] are as ever; the output is x (W + alpha / r A^T B^T) + b."""
    method = LoRA(schema.Adapter(kind="lora_peft", r=2, alpha=6.0, targets=["c_attn"]))
    model = method.prepare(tiny("gpt2"))
    layer = model.get_submodule("transformer.h.0.attn.c_attn")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.shape, b.shape) == ((2, 64), (192, 2))
    torch.nn.init.normal_(b)
    x = torch.randn(5, 64)
    base = layer.base_layer
    expected = torch.addmm(base.bias, x, base.weight + 3.0 * a.T @ b.T)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", [LoRA, LoRAFA])
@pytest.mark.parametrize(
    ("family", "pooling", "layers", "head"),
    [
        ("llama", "mean", 14, set()),
        ("gpt2", "mean", 8, set()),
        ("t5", "mean", 32, set()),
        ("bert", "mean", 12, {"classifier.weight", "classifier.bias"}),
        ("bert", "cls", 12, {"classifier.weight", "classifier.bias"}),
        ("roberta", "mean", 12, {"classifier.weight", "classifier.bias"}),
        ("roberta", "cls", 12, {f"classifier.{n}.{p}" for n in ("dense", "out_proj") for p in ("weight", "bias")}),
    ],
)
def test_adapters_and_the_head_are_trained_and_nothing_else(
    kind: type[LoRA], family: str, pooling: str, layers: int, head: set[str]
) -> None:
    """A head is new to every task, BERT's pooler is not: it was trained with the encoder."""
    method = kind(schema.Adapter(kind="lora_peft", r=2))
    model = method.prepare(tiny(family, pooling=pooling))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == head
    assert len(trained - head) == layers * (1 if kind is LoRAFA else 2)
    assert method.state(model).keys() == {name for name, _ in model.named_parameters() if "lora_" in name} | head


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize(("family", "pooling"), [("gpt2", "mean"), ("t5", "mean"), ("roberta", "cls"), ("bert", "cls")])
def test_peft_reads_adapters_of_every_family(tmp_path: Path, family: str, pooling: str) -> None:
    from peft import PeftModel

    method = LoRA(schema.Adapter(kind="lora_peft", r=4))
    ours = method.prepare(tiny(family, pooling=pooling)).eval()
    torch.manual_seed(0)
    for value in method.state(ours).values():
        torch.nn.init.normal_(value, std=0.1)
    method.save(method.state(ours), tmp_path / "weights", {})
    theirs = PeftModel.from_pretrained(tiny(family, pooling=pooling), str(tmp_path / "weights")).eval()
    ids = torch.arange(16)[None]
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if family == "t5" else {})}
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
        assert not torch.equal(ours(**inputs).logits, tiny(family, pooling=pooling).eval()(**inputs).logits)
