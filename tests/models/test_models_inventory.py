"""Claims about the table of a model's modules."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from llmsys.models import inventory


def test_its_columns_add_up_to_the_model_also_where_weights_are_shared_or_frozen() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(3, 5, bias=False))
    model[2].weight = model[0].weight
    model[1][0].weight.requires_grad = False
    assert inventory.rows(model) == [("0", "Embedding", 15, 15), ("1.0", "Linear", 16, 4)]


def test_a_packed_weight_counts_for_the_weights_that_it_stands_for() -> None:
    packed = nn.Parameter(torch.zeros(6, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = SimpleNamespace(shape=torch.Size((3, 4)))  # type: ignore[attr-defined]  # bitsandbytes'
    assert inventory.count(packed) == 12
