"""The kernel of attention that a transformers model is set to, with masks made once for all of its blocks.

SDPA takes a boolean mask [B, 1, L, L], makes a float one of it and keeps that for the backward pass: one a block, that
is 2 L/D bytes over (batch x length x D) in bf16. T5 adds its position bias to the mask in each block anew, for all
heads: [B, H, L, L], 2 H L/D bytes, more than everything else in the block together. Both are the same tensor in every
block, so here the first block's serves all. Shapes: B batch, H heads, L length, W width of a head.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from llmsys.lorafa.pieces.piece import run
from llmsys.lorafa.pieces.scores import Scores

_ADDITIVE: Any = WeakTensorKeyDictionary()
"""Boolean mask -> ((dtype, its state), the float mask)."""
_BIASED: Any = WeakTensorKeyDictionary()
"""Position bias -> ((the mask added to it, dtype, causal, their state), the mask, their sum)."""


def heads(x: Tensor, width: int) -> Tensor:
    """[B, L, H W] -> [B, H, L, W], a view."""
    return x.view(*x.shape[:-1], -1, width).transpose(1, 2)


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, **kwargs: Any) -> Tensor:
    """q [B, H, L, W], k, v [B, H or fewer, L', W] -> [B, L, H W]; p: of dropout on the probabilities.

    `kwargs` are those of transformers' attention functions, which this calls with `module`.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    bias = kwargs.pop("position_bias", None)
    name = module.config._attn_implementation
    if name == "sdpa":  # whether autograd is on or not: a piece computes again what it computed without
        causal = mask is None and module.is_causal and q.shape[2] > 1
        if bias is not None and not bias.requires_grad and not (causal and q.shape[2] < k.shape[2]):
            mask, bias, causal = _biased(bias, mask, causal, q, k), None, False
        elif bias is None and mask is not None and mask.dtype == torch.bool:
            mask = _additive(mask, computed(q.dtype, q.device))
        if p and q.device.type == "cpu" and bias is None and (q.shape[2] == k.shape[2] or not causal):
            q, k, v = (x.to(computed(x.dtype, x.device)) for x in (q, k, v))
            with torch.autocast("cpu", enabled=False):
                return _flat(run(Scores(mask, causal, module.scaling, p), q, k, v).transpose(1, 2))
    if bias is not None:
        kwargs["position_bias"] = bias
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, beside(module, "eager_attention_forward"))
    out, _ = function(module, q, k, v, mask, dropout=p, scaling=module.scaling, **kwargs)
    return _flat(out)


def _flat(out: Tensor) -> Tensor:
    """[B, L, H, W] -> [B, L, H W]."""
    return out.reshape(*out.shape[:-2], -1)


def filled(cache: Any, layer: int, cross: bool, kv: list[Tensor]) -> list[Tensor]:
    """All keys and values of a layer [B, H, L', W], once the new ones `kv`, if any, are in its cache."""
    if not hasattr(cache, "cross_attention_cache"):
        return list(cache.update(*kv, layer))
    if not cross:
        return list(cache.self_attention_cache.update(*kv, layer))
    if kv:
        cache.cross_attention_cache.update(*kv, layer)
        cache.is_updated[layer] = True
    held = cache.cross_attention_cache.layers[layer]
    return [held.keys, held.values]


def beside(module: Any, name: str) -> Any:
    """A function of the file of `module`'s class: each family of transformers has its own."""
    return next(
        getattr(sys.modules[cls.__module__], name)
        for cls in type(module).__mro__
        if hasattr(sys.modules[cls.__module__], name)
    )


def computed(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which products of tensors of `dtype` are computed: that, or autocast's."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a boolean mask lets through, -inf elsewhere, as SDPA makes it."""
    state = _state(mask)
    found = None if state is None else _ADDITIVE.get(mask)
    if found is not None and found[0] == (dtype, state):
        made: Tensor = found[1]
        return made
    made = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
    if state is not None:
        _ADDITIVE[mask] = ((dtype, state), made)
    return made


def _state(*tensors: Tensor | None) -> tuple[int, ...] | None:
    """Which of their contents tensors have: it counts up when they are written to. None where nobody counts, and what
    is made must not be kept: under `torch.inference_mode`."""
    if torch.is_inference_mode_enabled() or any(t is not None and t.is_inference() for t in tensors):
        return None
    return tuple(-1 if t is None else t._version for t in tensors)


def _biased(bias: Tensor, mask: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Tensor:
    """Bias [1, H, L, L'] and mask as one additive mask, as transformers makes it in each block."""
    from transformers.integrations.sdpa_attention import create_position_bias_mask

    dtype, state = computed(q.dtype, q.device), _state(bias, mask)
    key = (None if mask is None else id(mask), dtype, causal, state)
    found = None if state is None else _BIASED.get(bias)
    if found is not None and found[0] == key and (mask is None or found[1]() is mask):
        made: Tensor = found[2]
        return made
    made = create_position_bias_mask(bias, mask, causal, q, k).contiguous().to(dtype)
    if made is not bias and state is not None:  # else it would keep itself alive
        _BIASED[bias] = (key, None if mask is None else weakref.ref(mask), made)
    return made
