"""What no file holds: random parameters as each family's paper draws them, and computed buffers.

Each parameter draws from a generator seeded by (seed, its name): the first layers of a truncated model equal those of
the full one, and the numbers do not depend on the order of construction. Standard deviations are transformers' own:

    llama, bert, roberta   0.02 for every matrix
    gpt2                   0.02, and 0.02 / sqrt(2 num_layers) where a sub-layer writes to the residual stream, so that
                           its sum over the depth does not grow; a truncated model scales its draws by its own depth
    t5                     1 for embeddings and d^-1/2 for matrices, d their input width (queries (d d_kv)^-1/2, since
                           T5's attention does not divide by sqrt(d_kv))
    resnet, vgg            sqrt(2 / fan_out) for convolutions (He et al., arXiv 1502.01852)

Biases are 0, norms 1, padding rows 0. The head of a network for images, weight and bias, is uniform up to d^-1/2, as
torch's own linear layer.
"""

from __future__ import annotations

import hashlib
import math
import re

import torch
from torch import nn

from llmsys import schema

STD = 0.02


@torch.no_grad()
def initialise(parameter: nn.Parameter, name: str, module: nn.Module, cfg: schema.Model, seed: int) -> None:
    """Fills `parameter`, which is `name` in the model and belongs to `module`, in place."""
    generator = _generator(seed, name, parameter.device)
    if isinstance(cfg, schema.ConvNet) and isinstance(module, nn.Linear):
        bound = module.in_features**-0.5
        parameter.uniform_(-bound, bound, generator=generator)
    elif name.endswith("bias"):
        parameter.zero_()
    elif parameter.ndim == 1:
        assert "norm" in type(module).__name__.lower(), f"no initialiser for {name} of {type(module).__name__}"
        parameter.fill_(1.0)
    else:
        parameter.normal_(0.0, _std(name, module, cfg), generator=generator)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            parameter[module.padding_idx].zero_()


def _std(name: str, module: nn.Module, cfg: schema.Model) -> float:
    """The standard deviation of a matrix or a convolution's kernel."""
    if isinstance(module, nn.Conv2d):
        return math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size)))
    assert isinstance(cfg, schema.Transformer), f"no initialiser for {name} of {type(module).__name__}"
    if cfg.family == "gpt2" and name.endswith("c_proj.weight"):
        return STD / math.sqrt(2 * cfg.num_layers)
    if cfg.family == "t5":
        return _t5_std(name, module, cfg)
    return STD


def _t5_std(name: str, module: nn.Module, cfg: schema.Transformer) -> float:
    if name == "shared.weight":
        return 1.0
    if isinstance(module, nn.Embedding):  # relative positions
        return float(cfg.hidden_size**-0.5)
    assert isinstance(module, nn.Linear), name
    width = module.in_features
    return float((width * (cfg.hidden_size // cfg.num_heads) if re.search(r"Attention\.q\.", name) else width) ** -0.5)


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device=device)
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return generator


def fill_buffers(model: nn.Module, device: torch.device) -> None:
    """Gives all buffers memory on `device`, and what no file holds. Rotary modules are built anew there, in fp32."""
    for prefix, module in list(model.named_modules()):
        if type(module).__name__.endswith("RotaryEmbedding"):
            with torch.device(device):
                model.set_submodule(prefix, type(module)(module.config))
            continue
        for leaf, shape in list(module.named_buffers(recurse=False)):
            buffer = torch.empty_like(shape, device=device)
            setattr(module, leaf, buffer)
            if leaf == "position_ids":
                buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand_as(buffer))
            elif leaf in ("token_type_ids", "running_mean", "num_batches_tracked"):
                buffer.zero_()
            elif leaf == "running_var":
                buffer.fill_(1)
            else:
                raise AssertionError(f"no value for the buffer {prefix}.{leaf}")
