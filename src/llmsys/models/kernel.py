"""Which attention kernel really ran.

`model.attention` is a wish: SDPA chooses among its kernels by device, dtype, mask and dropout, and says nothing. A
dispatch mode sees every operator below autograd, so one forward under it settles the question for the record. (The
profiler would too, but its library writes to standard error.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

OPS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": "sdpa_flash_cpu",
    "aten::_scaled_dot_product_flash_attention": "sdpa_flash",
    "aten::_scaled_dot_product_efficient_attention": "sdpa_efficient",
    "aten::_scaled_dot_product_cudnn_attention": "sdpa_cudnn",
    "aten::_scaled_dot_product_fused_attention_overrideable": "sdpa_overrideable",
}
"""Fused operator -> the word in the record. Without any of these the scores are a tensor that passes a softmax."""


class _Names(TorchDispatchMode):
    """Collects the names of the operators that run under it, `namespace::name`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def observed(model: Any, batch: dict[str, Any]) -> str:
    """The kernel of one forward over `batch` in the model's present mode, e.g. `sdpa_flash_cpu` or `eager`.

    With gradients on, since they decide which kernels can serve; call it in the autocast context of the run. Where
    something else ran than was asked for, the answer says so; where several did (T5: in self- and in cross-attention),
    it names all. Empty for a network for images. Random state and gradients are left as they were.
    """
    if "pixel_values" in batch:
        return ""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _Names() as seen:
        model(**batch)
    ran = sorted({word for op, word in OPS.items() if op in seen.names})
    built: str = _config(model)._attn_implementation
    if not ran and any(name.startswith("flash_attn") for name in seen.names):
        ran = ["flash_attention_2"]
    # Ours are the only softmaxes besides the loss's log_softmax; SDPA's math kernel is made of the same operators.
    softmax = "aten::_softmax" in seen.names or "aten::_safe_softmax" in seen.names
    if softmax or not ran:
        ran.append({"eager": "eager", "sdpa": "sdpa_math"}.get(built, built) if softmax else built)
    word = "+".join(ran)
    asked = getattr(model, "attention_asked", built)
    return f"{word} (asked: {asked})" if asked == "flash_attention_2" != word else word


def _config(model: nn.Module) -> Any:
    """The transformers configuration of a model, also where a method or an engine has wrapped it."""
    return next(module.config for module in model.modules() if hasattr(module, "config"))
