"""Tensor parallelism over DTensor: the matrices of a block are cut over all ranks, which see the same examples.

In pairs, as Megatron-LM does it (arXiv 1909.08053): the first matrix by its output features (query, key, value; gate,
up), so that each rank computes some of the heads and some of the hidden units; the second by its input features
(output, down), whose partial results are summed over the ranks. Two all-reduces a block and direction. An adapter's
B goes with a matrix that is cut by outputs, its A with one that is cut by inputs; the other half is whole on each rank.
Norms, embeddings and biases of summed results are whole everywhere and, computed from the same numbers, stay equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmsys import schema
from llmsys.comm import collectives
from llmsys.comm.place import Place
from llmsys.train.engines.local import Local, local
from llmsys.train.protocols import Fill, Make, filled

BY_OUTPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "self.query", "self.key", "self.value")
BY_INPUT = ("o_proj", "down_proj", "attention.output.dense")
BERT_MLP = {"intermediate.dense": "output", "output.dense": "input"}
HEAD = "lm_head"


class TP(Local):
    """All ranks are one share of the data."""

    cuts_weights = True

    def __init__(self, config: schema.Config, place: Place, device: torch.device) -> None:
        super().__init__(config, place, device)
        self.data_rank, self.data_world = 0, 1

    def wrap(self, model: nn.Module, make: Make, fill: Fill = filled) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        from llmsys.models.surgery import blocks

        mesh = init_device_mesh(self.device.type, (self.world,))
        for _, block in blocks(model):
            fill(block)
            parallelize_module(block, mesh, plan(block))
        fill(model)
        if hasattr(model, HEAD) and not self._tied():
            parallelize_module(model, mesh, {HEAD: ColwiseParallel(output_layouts=Replicate())})
        return super().wrap(model, make)

    def _tied(self) -> bool:
        return isinstance(self.config.model, schema.Transformer) and self.config.model.tie_embeddings

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Pieces of cut gradients are summed over the ranks; whole ones, equal on all ranks, count once."""
        pieces: list[Tensor] = []
        same: list[Tensor] = []
        for parameter in self.trained:
            if parameter.grad is not None:
                (pieces if _cut(parameter.grad) else same).append(local(parameter.grad))
        squares = _squares(pieces, self.device)
        collectives.all_reduce(squares)
        return (squares + _squares(same, self.device)).sqrt()

    def _total(self, values: Tensor) -> Tensor:
        """Every rank has the same values; the mean is taken so that a flag which only one has raised is seen by all."""
        return super()._total(values).div_(self.world)


def plan(block: nn.Module) -> dict[str, Any]:
    """Module name inside the block -> how it is cut."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    found: dict[str, Any] = {}
    for name, module in block.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        layer, _, adapter = name.partition(".lora_")
        layer = layer.removesuffix(".base_layer")
        side = BERT_MLP.get(layer)
        by_output = side == "output" or layer.endswith(BY_OUTPUT)
        assert by_output or side == "input" or layer.endswith(BY_INPUT), f"no plan for {name}"
        if adapter.startswith("A" if by_output else "B"):
            continue  # whole on each rank
        found[name] = ColwiseParallel() if by_output else RowwiseParallel()
    return found


def _cut(tensor: Tensor) -> bool:
    return any(placement.is_shard() for placement in getattr(tensor, "placements", ()))


def _squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    return nn.utils.get_total_norm(tensors).double() ** 2
