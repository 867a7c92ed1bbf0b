"""A chain is its graph: what it says crosses a cut, is kept and is computed is what stages send, keep and compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decentral_harness import FAMILIES, crossing, example, model, traced

from llmsys.decentral.chain import chain
from llmsys.decentral.cut import cut
from llmsys.decentral.planes.torch import Run
from llmsys.decentral.trace import trace
from rank_pool import briefly


@pytest.mark.parametrize("family", FAMILIES)
def test_two_stages_send_what_the_chain_says(family: str) -> None:
    graph = traced(family).graph
    own = chain(graph)
    for place in own.places[1:-1][::7]:
        stages = cut(graph, own.at([int(place)]))
        assert crossing(graph, stages) == own.ahead[place]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_counts_once(family: str) -> None:
    graph = traced(family).graph
    assert chain(graph).weight_bytes == sum(value.nbytes for value in graph.parameters.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_for_the_backward_pass_is_what_autograd_keeps(family: str) -> None:
    """Storages of saved tensors of a real forward pass, but for parameters, constants and variables."""
    own = traced(family)
    (stage,) = cut(own.graph, dict.fromkeys((node.name for node in own.graph.operators), 0))
    known = {each.untyped_storage().data_ptr() for each in own.tensors.values()}
    kept: dict[int, tuple[torch.Tensor, int]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    run = Run(own.graph, stage, own.tensors)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run.forward(example(family), {})
    assert chain(own.graph).saved.sum() == sum(nbytes for _, nbytes in kept.values())


def test_work_is_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model("llama")(**example("llama"))
    assert chain(traced("llama").graph).work.sum() == counter.get_total_flops()


@pytest.mark.parametrize("family", briefly(("llama", "gpt2", "bert"), "llama"))
def test_a_model_with_more_layers_is_the_one_with_few_lengthened(family: str) -> None:
    short, long = (chain(trace(model(family, layers=n), example(family)).graph) for n in (3, 6))
    (block,) = [each for each in dict.fromkeys(short.blocks) if each.endswith(("s.1", "h.1", "r.1"))]
    begin = short.blocks.index(block)
    end = short.blocks.index(block[:-1] + "2")
    more = short.repeated(begin, end, 4)
    for name in ("work", "weights", "saved", "ahead", "back", "places"):
        assert np.array_equal(getattr(more, name), getattr(long, name)), name
    assert more.ties == long.ties


def test_only_what_repeats_is_repeated() -> None:
    own = chain(traced("llama").graph)
    with pytest.raises(ValueError, match="another amount crosses them"):
        own.repeated(int(own.places[3]), int(own.places[4]), 2)


def test_layers_are_cut_between_and_nowhere_else() -> None:
    own = chain(traced("gpt2").graph, "layer")
    inner = own.places[1:-1]
    assert 0 < len(inner) < len(chain(traced("gpt2").graph).places)
    assert all(own.blocks[at] != own.blocks[at - 1] for at in inner)
    with pytest.raises(ValueError, match="level=block: must be one of operator, layer"):
        chain(traced("gpt2").graph, "block")


def test_no_place_that_is_left_out_would_be_better() -> None:
    """Each cut of the graph has one among `places` behind which as much is computed, and over which no more goes."""
    graph = traced("llama").graph
    own = chain(graph)
    flops, weights = np.cumsum(own.work), np.cumsum(own.weights)
    kept = set(own.places.tolist())
    for at in range(1, own.count):
        same = [
            p for p in kept if 0 < p < own.count and (flops[p - 1], weights[p - 1]) == (flops[at - 1], weights[at - 1])
        ]
        assert any(own.ahead[p] <= own.ahead[at] and own.back[p] <= own.back[at] for p in same), at
