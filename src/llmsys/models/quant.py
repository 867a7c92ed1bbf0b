"""A frozen base in few bits: the linear layers of the blocks as bitsandbytes' 4-bit NormalFloat or 8-bit integers.

Adapters train beside weights that never change, so those can be stored coarsely and read back for each product:

    nf4    each run of 64 weights is scaled by its largest magnitude and rounded to one of 16 quantiles of a normal
           distribution; the scales, in runs of 256, are quantised to 8 bits in turn (QLoRA, arXiv 2305.14314, section
           3: "double quantisation", its default and ours)
    int8   each row of a weight [M, N] is scaled by its largest magnitude and rounded to -127 ... 127 (LLM.int8(),
           arXiv 2208.07339, section 2)

Bytes of a weight with n = M N elements, beside the bias, which stays as it was:

    nf4    ceil(n / 2) + b + 4 ceil(b / 256) + 4   with b = ceil(n / 64) scales, and 1088 once per model for the tables
           of the 16 and the 256 values: 4.13 bits a weight
    int8   n + 4 M

What is not quantised: embeddings, norms, biases and heads, which are small, sensitive or trained.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable

import torch
from torch import nn

from llmsys import schema
from llmsys.errors import MissingPackage
from llmsys.models import inventory
from llmsys.models.surgery import BLOCK, is_linear, is_transposed

log = logging.getLogger(__name__)

ADAPTER = re.compile(r"\.lora_|\.adapters\.")

# On some CPUs bitsandbytes warns, when it is imported (peft does), that a kernel for 4-bit inference is not installed:
# one that is never called here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@torch.no_grad()
def quantise(model: nn.Module, cfg: schema.Model, fill: Callable[[nn.Module], None]) -> list[str]:
    """Replaces, in place, the linear layers of the blocks as `cfg.quant` says; returns their names.

    `fill` gives a layer its final weight in `cfg.dtype`, if it has none yet. One layer at a time: when the next one is
    filled, the full weight of the one before is freed. The same weights give the same bits. Products are computed in
    the dtype of a layer's input, bf16 under autocast, as those of the layers they replace. With `none` nothing is done.

    Raises LookupError where bitsandbytes is missing, ValueError for a model without such layers, and for GPT-2's
    (`Conv1D`).
    """
    if cfg.quant == "none":
        return []
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackage(f"model.quant={cfg.quant}: needs bitsandbytes; pip install 'llmsys[train]'")
    names = [name for name, module in model.named_modules() if is_linear(module) and BLOCK.search(name)]
    odd = [name for name in names if is_transposed(model.get_submodule(name))]
    if odd or not names:
        what = f"{odd[0]} is a Conv1D" if odd else "its blocks have no linear layer"
        raise ValueError(f"model.quant={cfg.quant}: is not for model {cfg.name} ({cfg.family}): {what}")
    from llmsys.models import quant_layers

    make = quant_layers.nf4() if cfg.quant == "nf4" else quant_layers.int8
    for name in names:
        fill(model.get_submodule(name))
        model.set_submodule(name, make(model.get_submodule(name)))
    # How peft knows which of its own layers to put around ours.
    setattr(model, "is_loaded_in_4bit" if cfg.quant == "nf4" else "is_loaded_in_8bit", True)
    log.info("model.quant=%s: %d linear layers", cfg.quant, len(names))
    return names


def is_quantised(module: nn.Module) -> bool:
    """Whether `module` is one of the frozen layers that `quantise` makes."""
    return hasattr(module, "dequantised")


def linear_weights_trained(model: nn.Module) -> bool:
    """Whether a weight matrix of the blocks is trained: False where only adapters, heads or norms are.

    Adapters are known by their names: `lora_` in those of peft's layers, `.adapters.` in ours.
    """
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}  # T5's position bias
    return any(
        parameter.requires_grad and parameter.ndim >= 2 and BLOCK.search(name) and not ADAPTER.search(name)
        for name, parameter in model.named_parameters()
        if parameter not in tables
    )


def parameter_count(model: nn.Module) -> int:
    """Parameters of `model`, a packed weight counted by what it stands for: the number that the literature gives."""
    return sum(map(inventory.count, model.parameters()))
