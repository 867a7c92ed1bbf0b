"""Compressed gradients in the shared training loop: `GradSync` (train/protocols.py) for DDP and for DeepSpeed.

Under DDP a communication hook compresses while the backward pass goes on. DeepSpeed has no such hook: it is told to
leave its own exchange out, and gradients are exchanged when the last micro-batch's are there.

    stage 0   `engine.enable_backward_allreduce` off: gradients stay in `.grad`, which our update reads
    stage 1   off too. Then DeepSpeed's own way from whole gradients to this rank's slice of them is gone
              (`allreduce_gradients`), with the reduction in it replaced by nothing: they are the mean already

Stages 2 and 3 cut gradients as they are made: no rank has a whole one to compress.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.compress.aggregate import Aggregator
from llmsys.compress.config import CompressConfig
from llmsys.compress.hook import register
from llmsys.compress.state import CompressionState


class DDPSync:
    """A communication hook of DistributedDataParallel."""

    compression: CompressionState
    """There from `attach` on."""

    def __init__(self, config: CompressConfig) -> None:
        self.config = config

    def attach(self, model: Any) -> None:
        self.compression = register(model, self.config)

    def aggregate(self, model: nn.Module) -> None:
        pass

    def state(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        return self.compression.tensors(), self.compression.plain()

    def load_state(self, states: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> None:
        self.compression.load(states)

    def held(self) -> list[Tensor]:
        return list(self.compression.tensors().values())


class DeepSpeedSync(DDPSync):
    """DeepSpeed's ZeRO of stage 0 or 1, which `attach` changes in place so that it exchanges no gradients itself."""

    compression: Aggregator

    def attach(self, model: Any) -> None:
        self._zero: Any = model.optimizer if model.zero_optimization() else None
        model.enable_backward_allreduce = False
        if self._zero is not None:
            assert hasattr(self._zero, "reduce_scatter"), "this DeepSpeed has another way to reduce gradients"
            assert hasattr(self._zero, "gradient_reduction_w_predivide"), "and another place for it"
            self._zero.reduce_scatter = False  # the way of a whole bucket at a time, which has one place to reduce it
            self._zero.gradient_reduction_w_predivide = lambda bucket, dtype: bucket
        self._trained = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        self.compression = Aggregator(self._trained.items(), self.config)

    def aggregate(self, model: Any) -> None:
        self.compression.aggregate([self._gradient(p) for p in self._trained.values()])
        if self._zero is not None:
            model.allreduce_gradients()

    def _gradient(self, parameter: Any) -> Tensor:
        """What DeepSpeed would reduce; zeros where no loss has reached the parameter, as it has it too."""
        found = parameter.grad if self._zero is None else self._zero.get_gradient_for_reduction(parameter)
        if found is None:
            parameter.grad = found = torch.zeros_like(parameter)
        gradient: Tensor = found
        return gradient
