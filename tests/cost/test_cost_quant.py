"""A quantised base: its packed weights and their scales, and that nothing is saved for a frozen weight's gradient."""

import itertools
from typing import Any

import pytest
import torch
from cost_harness import CLASSES, LOCAL, autocast, batch, build, case, method, saved_bytes, shape, training

from llmsys.cost import estimate
from llmsys.cost.memory import ledger

FORMATS = ["nf4", "int8"]
QUICK = (("llama", "nf4"), ("bert", "int8"))


@pytest.mark.parametrize(
    ("family", "quant"),
    [
        pytest.param(family, quant, marks=[] if (family, quant) in QUICK else pytest.mark.slow)
        for family in ("llama", "bert", "roberta", "t5")
        for quant in FORMATS
    ],
)
def test_a_quantised_base_is_exact(family: str, quant: str) -> None:
    """Weights with every scale and table, gradients, and saved tensors."""
    kinds = ("full", "lora_peft", "lorafa_peft")  # full: the layers are frozen, biases too, and the rest is trained
    for kind, precision in itertools.product(kinds, (("fp32", "fp32"), ("bf16", "bf16"))):
        dtype, products = precision
        model, train, how = shape(family, dtype=dtype, quant=quant), training(precision=products), method(kind)
        torch.manual_seed(0)
        built = build(model, train, how)
        padded = family in ("bert", "roberta", "t5")
        found = estimate(model, train, how, LOCAL, num_labels=CLASSES)
        tensors = {t.untyped_storage().data_ptr(): t for t in [*built.parameters(), *built.buffers()]}
        assert found["weights"] == sum(t.untyped_storage().nbytes() for t in tensors.values())
        assert found["gradients"] == sum(p.nbytes for p in built.parameters() if p.requires_grad)
        measured = saved_bytes(built, batch(model, train, padded), autocast(model, train))
        parts = ledger(case(model, train, how, padded=padded))
        assert abs(parts.kept + parts.logits - measured) <= 4, (kind, precision)


@pytest.mark.parametrize("quant", FORMATS)
def test_under_autocast_no_copy_of_a_quantised_weight_is_kept(quant: str) -> None:
    """A full fp32 weight has a bf16 copy saved wherever its input needs a gradient."""
    train = training(precision="bf16")
    saved = {}
    for name in ("none", quant):
        model = shape(quant=name)
        how = method("lorafa_peft")
        measured = saved_bytes(build(model, train, how), batch(model, train, False), autocast(model, train))
        parts = ledger(case(model, train, how))
        saved[name] = parts.kept + parts.logits
        assert abs(saved[name] - measured) <= 4
    assert saved[quant] < saved["none"]


def test_a_70b_base_in_nf4_is_35_gb() -> None:
    # QLoRA (arXiv 2305.14314): 4.127 bits a weight of the blocks; embeddings and head stay in bf16
    changes: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "num_layers": 80}
    changes |= {"num_heads": 64, "num_kv_heads": 8, "max_length": 4096, "dtype": "bf16", "quant": "nf4"}
    train = training(length=512, micro_batch=1, global_batch=1, precision="bf16")
    found = estimate(shape(**changes), train, method("lora_peft"), LOCAL, device="cuda")
    blocks = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    adapters = 4 * 8 * 80 * (3 * (8192 + 28672) + 2 * (8192 + 8192) + 2 * (8192 + 1024))
    rest = 2 * (2 * 32000 * 8192 + 161 * 8192)
    assert found["weights"] == pytest.approx(blocks * 4.127 / 8 + adapters + rest, rel=1e-3)
