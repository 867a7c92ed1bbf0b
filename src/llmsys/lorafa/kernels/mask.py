"""Dropout whose mask is a function of its seed and an element's place alone: Philox (Salmon et al., SC 2011).

So no mask is ever in memory, not even for a moment: plain torch draws one of a byte an element. One counter gives four
random words, for elements a block apart. The mask of a seed is another one than torch's; an element is dropped with a
probability of floor(p 2^32) / 2^32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsys.lorafa.kernels.launch import BLOCK, OPTIONS, blocks, on


@triton.jit
def _keep(x, y, at, numel, random, threshold, scale):
    inside = at < numel
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    kept = random.to(tl.uint32, bitcast=True).to(tl.int64) >= threshold
    tl.store(y + at, tl.where(kept, value * scale, 0.0).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _dropped(x, y, numel, seed, threshold, scale, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    first, second, third, fourth = tl.randint4x(seed, program * BLOCK + lane)
    at = program * (4 * BLOCK) + lane
    _keep(x, y, at, numel, first, threshold, scale)
    _keep(x, y, at + BLOCK, numel, second, threshold, scale)
    _keep(x, y, at + 2 * BLOCK, numel, third, threshold, scale)
    _keep(x, y, at + 3 * BLOCK, numel, fourth, threshold, scale)


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """x with every element 0 with probability p, else divided by 1 - p; the same for the same seed and shape."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if y.numel():
        with on(y):
            grid = blocks(y.numel(), 4 * BLOCK)
            _dropped[grid](x, y, y.numel(), seed, int(p * 2**32), 1 / (1 - p), BLOCK=BLOCK, **OPTIONS)
    return y
