"""Bit-for-bit the same at fixed threads: seeds, deterministic kernels, and the random streams as data.

Equal bits need equal order of additions, so the number of threads is part of a run's identity and is set here too.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_aids: Any = torch.utils.deterministic


@contextlib.contextmanager
def reproducible(seed: int, threads: int, deterministic: bool) -> Iterator[None]:
    """Seeds every stream; within the block, `threads` (0: as before) and, if wanted, deterministic kernels only."""
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        _aids.fill_uninitialized_memory,
    )
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; without it torch refuses
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    # A debugging aid that writes NaN into every fresh tensor; it costs time and our results do not depend on it.
    _aids.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        _aids.fill_uninitialized_memory = before[2]


def streams() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The present random streams of torch (host and CUDA), numpy and Python: as tensors and as JSON."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    plain = {
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
    }
    return tensors, plain


def set_streams(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Makes the random streams go on from where `streams` read them."""
    torch.set_rng_state(tensors["torch"])
    cuda = [tensors[f"cuda.{i}"] for i in range(len(tensors) - 1)]
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    name, keys, position, has_gauss, gauss = plain["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = plain["python"]
    random.setstate((version, tuple(internal), gauss_next))
