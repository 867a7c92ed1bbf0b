"""What LoRA-FA does to a model, as plain values. Imports nothing heavier than the standard library."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmsys.schema import recompute, train

INITS = (*train.INITS, "given")
SEEDED = ("orthonormal", "gaussian", "select")
"""Inits whose A follows from seed, name and shape alone, so that a file needs no A."""
CORRECTIONS = ("none", "closed_form")
BIAS = ("none", "lora_only")
DTYPES = ("fp32", "model")


@dataclass(frozen=True, kw_only=True)
class LoRAFAConfig:
    """Adapters y = x W^T + (alpha / r) dropout(x) A^T B^T beside linear layers, A frozen and B trained.

    `targets`: last parts of the names of layers, or more of them; a text is one of these; none, or `all-linear`, for
    every linear layer of the blocks, outside of which only a layer is meant whose name fits none inside. `init`: how A
    is drawn, see `basis`; `given` is what comes from a file. `share_a`: layers that read the same input (query, key,
    value; gate, up) have one A. `correction` of B's gradient: `closed_form` is (A A^T)^-1 / s^2 (the paper's second
    version). `bias`: `lora_only` trains a copy of the biases of adapted layers too. `dtype` of B: `fp32`, or the
    model's own. `train_a` makes it LoRA (arXiv 2106.09685). `recompute`: what the blocks compute again in the backward
    pass, as `train.recompute` but for `auto` (see `schema.recompute`). ValueError for values out of range.
    """

    r: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    init: str = "orthonormal"
    recompute: str = "none"
    share_a: bool = False
    seed: int = 0
    correction: str = "none"
    bias: str = "none"
    dtype: str = "fp32"
    train_a: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        given: tuple[str, ...] = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        object.__setattr__(self, "targets", () if given == ("all-linear",) else given)
        for key, number, kinds in (
            ("r", self.r, (int,)),
            ("seed", self.seed, (int,)),
            ("alpha", self.alpha, (int, float)),
            ("dropout", self.dropout, (int, float)),
        ):
            if isinstance(number, bool) or not isinstance(number, kinds) or not math.isfinite(number):
                raise ValueError(f"{key}={number!r}: must be a{' whole' if kinds == (int,) else ''} number")
        if not isinstance(self.recompute, str):
            raise ValueError(f"recompute={self.recompute!r}: must be text, none say")
        recompute.check(self.recompute, key="recompute")
        for key, value, known in (
            ("init", self.init, INITS),
            ("correction", self.correction, CORRECTIONS),
            ("bias", self.bias, BIAS),
            ("dtype", self.dtype, DTYPES),
        ):
            if value not in known:
                raise ValueError(f"{key}={value}: must be one of {', '.join(known)}")
        if self.r < 1:
            raise ValueError(f"r={self.r}: must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must lie in [0, 1)")
        if self.use_dora:
            raise ValueError("use_dora=True: DoRA rescales W + B A by the norms of its columns, for which x is needed")
        if self.train_a and self.correction != "none":
            raise ValueError(f"correction={self.correction}: is for a frozen A")

    @property
    def scale(self) -> float:
        return self.alpha / self.r
