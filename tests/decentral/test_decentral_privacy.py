"""What leaks is measured by attacks that find it, and what is pinned stays with those who are trusted."""

from __future__ import annotations

import pytest
import torch
from decentral_harness import model, traced
from decentral_running import MICRO_BATCHES

from llmsys import schema
from llmsys.decentral import owner, privacy
from llmsys.decentral.chain import chain
from llmsys.decentral.cost import Workload
from llmsys.decentral.fleet import Fleet
from llmsys.decentral.plan import plan

WIDTH, VOCABULARY, COUNT = 32, 20, 600


def hidden(seed: int, mix: torch.Tensor, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of random tokens, and these: the embedding's rows, mixed."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (COUNT,), generator=draw)
    return embedding[tokens] @ mix, tokens


@pytest.fixture
def embedding() -> torch.Tensor:
    return torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))


def test_the_embedding_itself_is_read_at_once(embedding: torch.Tensor) -> None:
    states, tokens = hidden(1, torch.eye(WIDTH), embedding)
    assert privacy.recovered(privacy.nearest(embedding), states, tokens) == 1.0


def test_who_has_the_layers_before_reads_what_the_embedding_does_not_show(embedding: torch.Tensor) -> None:
    """Behind a rotation the nearest row is any; a decoder that has seen public text through it finds them all."""
    mix = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2)))[0]
    public, private = hidden(3, mix, embedding), hidden(4, mix, embedding)
    found = privacy.decoders(*public, embedding, seed=0)
    rates = {name: privacy.recovered(decode, *private) for name, decode in found.items()}
    assert rates["nearest"] < 0.3
    assert min(rates["ridge"], rates["mlp"]) > 0.99


def test_noise_takes_something_away_and_chance_is_left(embedding: torch.Tensor) -> None:
    states, tokens = hidden(5, torch.eye(WIDTH), embedding)
    rates = [
        privacy.recovered(privacy.nearest(embedding), privacy.noisy(states, share, seed=6), tokens)
        for share in (0.0, 2.0, 1000.0)
    ]
    assert rates[0] > rates[1] > rates[2]
    assert rates[2] == pytest.approx(1 / VOCABULARY, abs=0.05)


def test_the_models_ends_are_trusted_providers_alone() -> None:
    """Embedding and first layer, last layer, head and loss: in the graph of a real model, and so in the plan."""
    own = owner.traced(model("llama"), {**_batch(), "weight": torch.tensor(1.0)})
    cost = chain(own.graph)
    first, last = owner.pins(cost, [1, 1])
    blocks = [own.graph.by_name[name].module for name in cost.names]
    assert all("layers.0" in each or "layers" not in each for each in blocks[:first])
    assert any("layers.0" in each for each in blocks[:first])
    assert not any("layers.0" in each for each in blocks[first:])
    assert any("layers.3" in each for each in blocks[len(blocks) - last :])
    assert not any("layers.3" in each for each in blocks[: len(blocks) - last])
    task = schema.DecentralTrain(private=[1, 1], trusted=2, providers=4, stages=4, mem_gib=1.0)
    work = Workload(micro_batches=MICRO_BATCHES, most=1, private=(first, last))
    machines = owner.machines(task, cost, work)
    assert [each.trusted for each in machines] == [True, True, False, False]
    (pipeline,) = plan(cost, Fleet(providers=tuple(machines)), work).pipelines
    for at, p in enumerate(pipeline.order):
        if not machines[p].trusted:
            assert pipeline.cuts[at] >= first
            assert pipeline.cuts[at + 1] <= len(blocks) - last


def _batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(2, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}


def test_nothing_is_pinned_where_nothing_is_asked_for_and_not_everything() -> None:
    cost = chain(traced("llama").graph)
    assert owner.pins(cost, []) == (0, 0)
    with pytest.raises(ValueError, match=r"task.private=\[3, 1\]: the model has 4 layers"):
        owner.pins(cost, [3, 1])
