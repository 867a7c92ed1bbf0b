"""Keys and values are variables of a graph: a cut model generates what the whole one does."""

from __future__ import annotations

import re

import pytest
import torch
from decentral_harness import model, quarters

from llmsys.decentral import cut as cuts
from llmsys.decentral.chain import chain
from llmsys.decentral.decode import trace_decoder
from llmsys.decentral.planes.torch import Run

LENGTH, NEW = 24, 12


@pytest.mark.parametrize(
    ("count", "family"),
    [(1, "llama"), (3, "gpt2"), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, "gpt2"), (3, "llama")))],
)
def test_a_cut_model_generates_the_models_tokens(family: str, count: int) -> None:
    own = model(family).eval()
    prompt = torch.randint(2, 64, (2, 5), generator=torch.Generator().manual_seed(3))
    expected = own.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    traced = trace_decoder(own, 2, LENGTH)
    graph, tensors = traced.graph, dict(traced.tensors)
    assert graph.variables, "caches are variables"
    assert graph.loss is None
    stages = cuts.cut(graph, cuts.contiguous(graph, quarters(graph, count)))
    tokens = prompt
    for position in range(prompt.shape[1] + NEW - 1):
        inputs = {"input_ids": tokens[:, position : position + 1], "cache_position": torch.tensor([position])}
        sent: dict[str, torch.Tensor] = {}
        for stage in stages:
            run = Run(graph, stage, tensors, train=False)
            sent |= run.forward(inputs, sent)
            tensors |= run.updates
            logits = run.outputs.get(graph.outputs[0])
        assert logits is not None
        if position + 1 == tokens.shape[1]:
            tokens = torch.cat([tokens, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(tokens, expected)


def test_a_cache_is_memory_of_the_stage_that_has_it() -> None:
    traced = trace_decoder(model("llama"), 2, LENGTH)
    own = chain(traced.graph)
    kept = {**traced.graph.variables, **traced.graph.constants}
    read = {key for node in traced.graph.operators for key in node.tensors}
    assert own.held.sum() == sum(value.nbytes for key, value in kept.items() if key in read)
    assert own.held.sum() >= 4 * 2 * 2 * 2 * LENGTH * 8 * 4, (
        "layers x (keys, values) x rows x heads x length x width, fp32"
    )
    assert own.saved.sum() == 0


def test_between_layers_a_hidden_state_goes_on_and_nothing_else() -> None:
    """Masks and angles follow from the position, which the owner tells each stage: a single number."""
    graph = trace_decoder(model("llama"), 2, LENGTH).graph
    own = chain(graph, "layer")
    layers = [int(at) for at in own.places[1:-1] if re.search(r"layers\.\d+$", own.blocks[at])]
    stages = cuts.cut(graph, own.at(layers[1:]))
    assert len(stages) == 4
    for stage in stages[:-1]:
        assert [graph.by_name[name].values[0].shape for name in stage.sends] == [(2, 1, 32)]
    assert [stage.inputs for stage in stages[1:]] == [("cache_position",)] * 3


def test_a_token_is_not_told_to_every_stage() -> None:
    """A row of one token is a number, too, but none that stages but the first may see."""
    graph = trace_decoder(model("llama"), 1, LENGTH).graph
    stages = cuts.cut(graph, cuts.contiguous(graph, quarters(graph, 4)))
    assert [("input_ids" in stage.inputs) for stage in stages] == [True, False, False, False]
