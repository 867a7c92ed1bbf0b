"""What is predicted of a step's traffic is what two ranks really say to each other, by torch's own dispatcher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from llmsys import compose
from llmsys.comm.group import group
from llmsys.comm.place import Place
from llmsys.comm.traffic import Traffic
from rank_pool import ENGINES, Pool

TINY = [
    "model=llama_tiny",
    "data=synthetic",
    "train.steps=3",
    "train.global_batch=16",
    "train.micro_batch=4",
    "train.length=32",
    "train.world=2",
    "train.threads=1",
    "hardware.device=cpu",
]
SLACK = 4096
"""Bytes of norms, losses and flags."""


def measured(place: Place, overrides: list[str]) -> dict[str, int]:
    """Payload by kind of the third step, when every engine knows the order of the layers."""
    from llmsys import schema, wiring
    from llmsys.models import load, recompute_blocks
    from llmsys.train import optimizer

    config = schema.build(compose.compose([*TINY, *overrides]))
    device = torch.device("cpu")
    with group(place, device):
        model = load(config.model, objective="causal_lm", num_labels=0, device=device, seed=0, folder=None)
        model = wiring.method(config.method).prepare(model)
        if config.train.recompute == "block":
            recompute_blocks(model)
        engine = wiring.engine(config, place, device)
        wrapped = engine.wrap(model, lambda whole: optimizer.adamw(whole, config.train, 1e-3))
        ids = torch.arange(4 * 32).reshape(4, 32)
        micro = schema.accumulation(config.train, config.engine)
        for _ in range(3):
            with Traffic() as traffic:
                for i in range(micro):
                    with engine.accumulate(last=i + 1 == micro):
                        loss = wrapped(input_ids=ids, labels=ids).loss
                        engine.backward(loss)
                engine.step(loss.reshape(1), 1.0)
    return dict(traffic.bytes)


@pytest.mark.parametrize("name", [name for name in ENGINES if "offload" not in name])
def test_two_ranks_say_what_is_predicted(pool: Pool, name: str) -> None:
    """To the byte, but for norms and losses."""
    from llmsys import schema
    from llmsys.cost import traffic

    config = schema.build(compose.compose([*TINY, *ENGINES[name]]))
    predicted = traffic.step_payload(config.model, config.train, config.method, config.engine)
    found: list[dict[str, Any]] = pool.call(f"{__name__}:measured", ENGINES[name])
    for said in found:
        for kind in {*predicted, *said}:
            assert 0 <= said.get(kind, 0) - predicted.get(kind, 0) < SLACK, (kind, said, predicted)


def test_one_rank_has_told_nobody_anything() -> None:
    """Though DDP makes its calls there too: a column of what is exchanged would have a number for nothing."""
    with group(Place(), torch.device("cpu")), Traffic() as traffic:
        dist.all_reduce(torch.ones(8))
        assert traffic.calls == {"all_reduce": 1}
        assert traffic.summary == {}
