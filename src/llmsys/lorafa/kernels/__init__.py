"""Triton kernels for what pieces compute element by element, where a GPU and Triton are; plain torch elsewhere.

Plain torch reads and writes memory once an operator: RMSNorm's backward pass is eight of them. A kernel reads its
operands and writes its results once. It rounds where the plain version rounds, in the same order, so only sums and
exponentials differ, in their last bit; forward and backward pass must therefore both be a kernel's, or neither.

`LLMSYS_KERNELS=torch` forces plain torch; `triton` makes it an error that there is no Triton; else it serves where it
is installed (torch's CUDA wheels bring it). The log says once which. Tensors on a CPU are served in Triton's
interpreter alone (`TRITON_INTERPRET=1`), which is how tests compare the two.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

from llmsys import lazy

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIABLE = "LLMSYS_KERNELS"
_HOMES = {
    "rms_norm": "norm",
    "rms_norm_again": "norm",
    "rms_norm_backward": "norm",
    "gated": "gate",
    "gated_backward": "gate",
    "dropped": "mask",
}
WIDEST = 65536
"""Columns of the widest row that a program holds at once."""


def serve(x: Tensor) -> bool:
    """Whether kernels take `x` and what goes with it."""
    return (x.is_cuda or _interpreted()) and x.dtype in DTYPES and 0 < x.shape[-1] <= WIDEST and _chosen() == "triton"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _chosen() -> str:
    """`triton` or `torch`, logged. ValueError where that is forced which is not there."""
    asked, there = os.environ.get(VARIABLE, ""), importlib.util.find_spec("triton") is not None
    if asked not in ("", "torch", "triton"):
        raise ValueError(f"{VARIABLE}={asked}: must be torch or triton")
    if asked == "triton" and not there:
        raise ValueError(f"{VARIABLE}=triton: Triton is not installed: pip install triton")
    found = asked or ("triton" if there else "torch")
    reason = f"{VARIABLE}={asked}" if asked else "Triton is installed" if there else "Triton is not installed"
    logging.getLogger("llmsys").info("lorafa: norms, gates and dropout by %s (%s)", found, reason)
    return found


__getattr__ = lazy.attributes(__name__, _HOMES)
