"""How much of a memory a rank may fill: by this `train.recompute=auto` is chosen, in a run and in a prediction of it.

Of a GPU's memory, as CUDA reports it, what is there before the first tensor is taken off, and `SLACK` of the rest; of
a host's, where that is the device, its ranks' shares are equal, and the same slack is left.
"""

from __future__ import annotations

GIB = 2**30
CONTEXT_GIB = 0.6
"""A GPU's context and libraries: 0.3 since CUDA loads kernels as they are first used (pytorch issue 107667), and as
much again, assumed, for those that a step uses."""
NCCL_GIB = 0.6
"""NCCL's buffers, where there are several ranks: 544 to 688 MB on A100s (nccl issue 964)."""
SLACK = 0.05
"""Assumed: what the allocator cannot use, since blocks of other sizes are free than are asked for, and what a predicted
peak leaves out."""


def room(nbytes: float, *, cuda: bool, ranks: int) -> float:
    """Bytes of each of `ranks`: of a GPU with `nbytes` of memory, one of them each, or of a host, which all share."""
    if not cuda:
        return (1 - SLACK) * nbytes / ranks
    return (1 - SLACK) * (nbytes - taken(ranks) * GIB)


def taken(ranks: int) -> float:
    """GiB of a GPU that are used before there is a tensor."""
    return CONTEXT_GIB + NCCL_GIB * (ranks > 1)
