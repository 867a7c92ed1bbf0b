"""Tiny layers and models with adapters, and the same adapters written out for autograd to differentiate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.lorafa.config import LoRAFAConfig
from llmsys.lorafa.injection import inject
from llmsys.lorafa.targets import adapted
from llmsys.profile.memory import saved_tensors

R = 3
LAYERS = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm_roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
    "t5": "T5",
    "t5_gated": "T5",
    "mt5": "MT5",
}
"""What tests call a family -> the beginning of its classes in transformers."""


def toy(dtype: torch.dtype = torch.float64, bias: bool = False, **shapes: tuple[int, int]) -> Any:
    """A model of one block of linear layers: name=(inputs, outputs)."""
    torch.manual_seed(0)
    model = nn.Module()
    block = nn.ModuleDict({name: nn.Linear(*shape, bias=bias) for name, shape in shapes.items()})
    model.layers = nn.ModuleList([block])
    return model.to(dtype)


def with_adapters(model: nn.Module, start: bool = False, **config: Any) -> Any:
    """`model`, in place, with adapters whose B is random, or 0 as at the `start`."""
    inject(model, LoRAFAConfig(**{"r": R, "alpha": 2 * R, "dtype": "model", **config}))
    generator = torch.Generator().manual_seed(1)
    for _, layer in adapted(model):
        if not start:
            layer.adapter.B.data.copy_(torch.randn(layer.adapter.B.shape, generator=generator) * 0.2)
    return model


def build(family: str, layers: int = 2, d: int = 32, f: int = 56, attention: str = "sdpa", **changes: Any) -> Any:
    """A random model of a family, 4 heads, no dropout unless `changes` says so."""
    import transformers

    torch.manual_seed(0)
    prefix = LAYERS[family]
    config = getattr(transformers, f"{prefix}Config")
    head = {"t5": "ForConditionalGeneration", "llama": "ForCausalLM"}
    if "t5" in family:
        shape = {"d_model": d, "d_kv": d // 4, "d_ff": f, "num_layers": layers, "num_heads": 4, "dropout_rate": 0.0}
        shape |= {"decoder_start_token_id": 0, "feed_forward_proj": "relu" if family == "t5" else "gated-gelu"}
        suffix = head["t5"]
    else:
        shape = {"hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers, "num_attention_heads": 4}
        suffix = head["llama"]
    if family in ("llama", "mistral", "qwen2", "qwen3"):
        shape |= {"num_key_value_heads": 2}
    elif "t5" not in family:
        shape |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        suffix = "ForMaskedLM"
    if family in ("mistral", "qwen3"):
        shape |= {"head_dim": d // 4}
    if family == "mistral":
        shape |= {"sliding_window": 5}
    if family == "electra":
        shape |= {"embedding_size": d}
    shape |= {"vocab_size": 64, "pad_token_id": 0, "use_cache": False, "attn_implementation": attention, **changes}
    return getattr(transformers, f"{prefix}{suffix}")(config(**shape)).requires_grad_(False)


def batch(family: str, padding: int = 5, size: int = 2, length: int = 16, target: int = 8) -> dict[str, Any]:
    """`size` examples, the last with `padding` masked positions at its end."""
    ids = torch.randint(3, 64, (size, length), generator=torch.Generator().manual_seed(2))
    found: dict[str, Any] = {
        "input_ids": ids,
        "labels": ids[:, :target].clone() if "t5" in family else ids,
        "use_cache": False,
    }
    if padding:
        found["attention_mask"] = torch.ones_like(ids)
        found["attention_mask"][-1, -padding:] = 0
    return found


class Written(nn.Module):
    """y = x W^T + b + s (x A^T) B^T, each product an operator of autograd's, nothing else."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        adapter = layer.adapter
        self.weight, self.bias, self.scale = layer.weight, layer.bias, adapter.scale
        self.A = nn.Parameter(adapter.a.detach().clone(), requires_grad=adapter.a.requires_grad)
        self.B = nn.Parameter(adapter.b.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.A.to(x.dtype), self.B.to(x.dtype)
        return nn.functional.linear(x, self.weight, self.bias) + self.scale * ((x @ a.T) @ b.T)


def written(model: nn.Module) -> Any:
    """A copy of an adapted model in transformers' own blocks with `Written` layers."""
    from llmsys.lorafa.blocks.block import unfuse

    other = copy.deepcopy(model)
    for module in list(other.modules()):
        unfuse(module)
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    for path, layer in list(adapted(other)):
        other.set_submodule(path, Written(layer))
    return other


def adapter_grads(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of A and B by layer, of adapted and `Written` layers alike."""
    found = {}
    for name, parameter in model.named_parameters():
        if name.endswith((".A", ".B")) and parameter.grad is not None:
            found[name.replace("adapters.default.", "")] = parameter.grad
    return found


def error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in fp64."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def kept(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that `forward` keeps for the backward pass, weights apart."""
    return saved_tensors(model, forward)


def tensors_of(thing: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that can be reached from an object by attributes, items and closures, modules left out."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (nn.Module, type, str, int, float)):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
        return
    parts: list[Any] = [getattr(thing, "__self__", None), getattr(thing, "func", None), getattr(thing, "args", None)]
    parts += list(getattr(thing, "__dict__", {}).values())
    parts += [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
    parts += list(thing.values()) if isinstance(thing, dict) else []
    parts += list(thing) if isinstance(thing, (list, tuple)) else []
    for part in parts:
        yield from tensors_of(part, seen)
