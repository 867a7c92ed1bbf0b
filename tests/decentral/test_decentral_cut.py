"""Claims about cut graphs: they are the model, bit for bit, wherever they are cut, and send no more than they must."""

from __future__ import annotations

import math
import random

import pytest
import torch
from decentral_harness import FAMILIES, crossing, eager, example, model, named, quarters, staged, traced

from llmsys.decentral import cut as cuts
from llmsys.decentral.graph import WIDTHS
from llmsys.decentral.trace import trace


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """Bits are those of one number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(family: str, boundaries: list[int]) -> None:
    own = traced(family)
    stages = cuts.cut(own.graph, cuts.contiguous(own.graph, boundaries))
    loss, gradients, _, _ = staged(own.graph, stages, own.tensors, example(family))
    expected, wanted = eager(family)
    assert torch.equal(loss, expected)
    found = named(own.graph, gradients)
    different = [name for name, gradient in wanted.items() if not torch.equal(found[name], gradient)]
    assert not different, boundaries
    assert {*wanted} <= {*found}


@pytest.mark.parametrize("count", [1, 2, 4, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_models_bit_for_bit(family: str, count: int) -> None:
    same(family, quarters(traced(family).graph, count))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_operator_may_be_where_a_stage_begins(family: str) -> None:
    """Between the parts of attention, within a norm, before the sum of a residual: 12 random cuts in up to 5 stages."""
    places = random.Random(family)
    total = len(traced(family).graph.operators)
    for _ in range(12):
        same(family, sorted(places.sample(range(1, total), places.randint(1, 4))))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_tied_embeddings_are_one_parameter(family: str) -> None:
    own = traced(family)
    assert own.graph.aliases
    assert len(own.graph.parameters) == len(list(model(family).parameters()))


@pytest.mark.parametrize("count", [2, 4])
def test_what_depends_on_no_input_is_not_sent(count: int) -> None:
    """Masks and positions' sines: of a small LLaMA with eager attention two fifths and more of what crosses."""
    inputs = example("llama", length=64)
    own = trace(model("llama"), inputs)
    owner = cuts.contiguous(own.graph, quarters(own.graph, count))
    stages = cuts.cut(own.graph, owner)
    *_, sent = staged(own.graph, stages, own.tensors, inputs)
    assert sent == crossing(own.graph, stages)
    every = 0
    for node in own.graph.operators:
        readers = {owner[each.name] for each in own.graph.operators if node.name in each.reads} - {owner[node.name]}
        every += len(readers) * sum(WIDTHS[value.dtype] * math.prod(value.shape) for value in node.values)
    assert sent <= 0.6 * every


def test_running_statistics_are_the_models() -> None:
    """Variables: batch norms' means, variances and counts behind a step."""
    own = traced("resnet")
    stages = cuts.cut(own.graph, cuts.contiguous(own.graph, quarters(own.graph, 3)))
    _, _, updates, _ = staged(own.graph, stages, own.tensors, example("resnet"))
    stepped = model("resnet")
    stepped(**example("resnet"))
    buffers = dict(stepped.named_buffers())
    assert {*updates} == {*own.graph.variables} == {*buffers}
    assert all(torch.equal(updates[key], buffer) for key, buffer in buffers.items())


def test_a_pipeline_goes_one_way() -> None:
    graph = traced("gpt2").graph
    assignment = cuts.contiguous(graph, [40])
    first, last = graph.operators[60], graph.operators[-1]
    with pytest.raises(ValueError, match=r"which runs later"):
        cuts.cut(graph, {**assignment, last.name: 0})
    with pytest.raises(ValueError, match=f"operator {first.name}: has no stage"):
        cuts.cut(graph, {name: stage for name, stage in assignment.items() if name != first.name})
    with pytest.raises(ValueError, match="stage 1: has no operator"):
        cuts.cut(graph, {name: 2 * stage for name, stage in assignment.items()})
    with pytest.raises(ValueError, match=r"boundaries=\[40, 40\]: must rise"):
        cuts.contiguous(graph, [40, 40])
