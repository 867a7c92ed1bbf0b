"""The shapes of the paper's models give the paper's sizes, by arithmetic and in the buffers that are asked for."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from simulated import Ranks

from llmsys import compose, schema
from llmsys.compress.config import CompressConfig
from llmsys.compress.paper_models import MODELS
from llmsys.cost import compressed, shapes, step_flops

TABLE = {
    "resnet50": (25.557, 66.5, 155.5, 93.3, 116.6),
    "resnet152": (60.193, 52.9, 131.1, 72.4, 93.3),
    "bert_base": (110.11, 16.7, 28.6, 37.8, 32.6),
    "bert_large": (336.23, 21.4, 39.6, 44.4, 41.9),
}
"""Parameters in millions; how many times fewer bytes a step: Power-SGD, ACP-SGD on even and odd steps, on average."""


def paper(name: str, method: str) -> CompressConfig:
    return CompressConfig(method=method, r=MODELS[name].r, min_rate=0)


def sent(name: str, method: str, step: int) -> int:
    gradients = [(parameter, shape, 4) for parameter, shape in MODELS[name].shapes]
    return compressed.step_bytes(gradients, paper(name, method), 2, step)["all_reduce"]


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_ratios_are_those_of_the_papers_table(name: str) -> None:
    whole = sent(name, "none", 0)
    power, *acp = (sent(name, "powersgd", 0), sent(name, "acpsgd", 0), sent(name, "acpsgd", 1))
    params, *ratios = TABLE[name]
    assert whole / 4e6 == pytest.approx(params, abs=0.5 * 10 ** -(3 if params < 100 else 2))
    found = [whole / power, whole / acp[0], whole / acp[1], 2 * whole / sum(acp)]
    assert [round(ratio, 1) for ratio in found] == ratios


@pytest.mark.parametrize(("method", "rounds"), [("none", 1), ("powersgd", 2), ("acpsgd", 1)])
def test_buffers_that_are_asked_for_have_these_bytes(method: str, rounds: int) -> None:
    """ResNet-50, of which the method really makes what it sends: one collective a step with ACP-SGD, two with Power."""
    named = dict(MODELS["resnet50"].shapes)
    ranks = Ranks(paper("resnet50", method), 1, named)
    zeros = {name: torch.zeros(shape) for name, shape in named.items()}
    for step in range(2 if method == "acpsgd" else 1):
        ranks.step([zeros])
        found = [request.buffer.numel() * request.buffer.element_size() for request in ranks.asked]
        assert len(found) == rounds
        assert sum(found) == sent("resnet50", method, step)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_flops_are_those_of_the_models_that_can_be_built(name: str) -> None:
    """Of BERT, transformers' classifier has the encoder alone: no heads of pre-training, and a vocabulary unpadded."""
    data = "digits" if name.startswith("resnet") else "code_packages"
    overrides = [f"model={name}", f"data={data}", "train.micro_batch=1", "train.global_batch=1"]
    config = schema.build(compose.compose(overrides))
    config.train.length = 64
    ours = [p for p in MODELS[name].parameters if not p.name.startswith("cls.")]
    built = Counter(shapes.parameters(config.model).values())
    if isinstance(config.model, schema.Transformer):
        built[30528, config.model.hidden_size] = built.pop((30522, config.model.hidden_size))
    assert Counter(p.shape for p in ours) == built
    flops = step_flops(config.model, config.train, config.method, config.engine)
    layers = sum(p.flops for p in ours)
    assert 3 * layers == pytest.approx(flops, rel=0.01)
