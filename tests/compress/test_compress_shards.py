"""Under FSDP2: what crosses the replicate axis is compressed, shard by shard, and nothing else is different."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hook_harness import config_of, descend, everywhere
from torch import Tensor, nn

from llmsys.comm.place import Place
from llmsys.compress import ShardAggregator, load_state, save_state
from llmsys.compress.reference import Reference
from rank_pool import Pool

HERE = "test_compress_shards"


@pytest.fixture(scope="module")
def four() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()


def net() -> nn.Sequential:
    """Rows that do not divide evenly, and a bias of one row: of two shards the second is empty. fp64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 1))
    return model.double()


def sharded(mesh: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = net()
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    return model


def mesh_of(replicas: int, shards: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))


def loss(model: nn.Module, rank: int, step: int) -> Tensor:
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(100 * step + rank), dtype=torch.float64)
    value: Tensor = (model(x) - 0.5).square().mean()
    return value


def whole(model: nn.Module) -> Tensor:
    return torch.cat([p.full_tensor().detach().flatten() for p in model.parameters()])  # type: ignore[attr-defined]


def against_hsdp(place: Place, replicas: int, shards: int) -> float:
    """How far `none` is from FSDP2 on the mesh of both dimensions, after five steps of two micro-batches."""
    mesh = mesh_of(replicas, shards)
    ours, theirs = sharded(mesh["shard"]), sharded(mesh)
    aggregator = ShardAggregator(ours, config_of({"method": "none"}), group=mesh["replicate"].get_group())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (ours, theirs)]
    for step in range(5):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            for micro in range(2):
                model.set_requires_gradient_sync(micro == 1)
                loss(model, place.rank, 2 * step + micro).backward()
            if model is ours:
                aggregator.exchange()
            optimizer.step()
            optimizer.zero_grad()
    return float((whole(ours) - whole(theirs)).abs().max())


def trained(place: Place, method: str, replicas: int, shards: int, folder: str) -> dict[str, Any]:
    """The largest difference of a gradient's shard from the reference's, given the replicas' shards; how far apart
    replicas end; the first loss and the last; and how far a run that goes on from what was saved is from this one."""
    mesh, config = mesh_of(replicas, shards), config_of({"method": method})
    group, model = mesh["replicate"].get_group(), sharded(mesh["shard"])
    aggregator, reference, worst = ShardAggregator(model, config, group=group), Reference(config, replicas), 0.0
    losses = []
    for step in range(5):
        value = loss(model, place.rank, step)
        losses.append(sum(everywhere(value.item())))
        value.backward()
        wanted = reference.step(among({n: g.clone() for n, g in local(model, "grad").items() if g.numel()}, group))
        aggregator.exchange()
        grads = local(model, "grad")
        worst = max(worst, *(float((grads[name] - mean).abs().max()) for name, mean in wanted.items()))
        descend(model)
    save_state(aggregator, f"{folder}/shard-{aggregator.shard}")
    dist.barrier()
    again = sharded(mesh["shard"])
    again.load_state_dict(model.state_dict())
    resumed = ShardAggregator(again, config, group=group)
    load_state(resumed, f"{folder}/shard-{resumed.shard}")
    for each, exchange in ((model, aggregator.exchange), (again, resumed.exchange)):
        for step in range(5, 26):
            value = loss(each, place.rank, step % 5)
            value.backward()
            exchange()
            descend(each)
    losses.append(sum(everywhere(value.item())))
    peers = among(torch.cat([p.flatten() for p in local(model, "data").values()]), group)
    return {
        "worst": worst,
        "losses": [losses[0], losses[-1]],
        "resumed": float((whole(again) - whole(model)).abs().max()),
        "apart": max(float((peer - peers[0]).abs().max()) for peer in peers),
    }


def local(model: nn.Module, what: str) -> dict[str, Tensor]:
    """This rank's shards of the parameters' `grad` or `data`."""
    return {name: getattr(p, what).to_local() for name, p in model.named_parameters()}


def among(value: Any, group: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def overflown(place: Place, replicas: int, shards: int) -> list[float]:
    """Of each rank: how far what it applied and its replicas keep is from what all had in the other steps, where in
    step 3 of six the last rank's shard of one gradient is infinite and all ranks leave the step out."""
    mesh, config = mesh_of(replicas, shards), config_of({"method": "acpsgd"})
    group, model = mesh["replicate"].get_group(), sharded(mesh["shard"])
    aggregator = ShardAggregator(model, config, group=group)
    weight = model[2].weight
    applied, had = (torch.zeros_like(weight.to_local()) for _ in range(2))
    for step in range(6):
        loss(model, place.rank, step).backward()
        mine = weight.grad.to_local()
        if step == 3 and place.rank == place.world - 1:
            mine[0, 0] = torch.inf
        if step != 3:
            had += mine / replicas
        aggregator.exchange()
        finite = all(everywhere(all(bool(p.grad.to_local().isfinite().all()) for p in model.parameters())))
        assert finite == (step != 3)
        if finite:
            applied += weight.grad.to_local()
        model.zero_grad()
    error = aggregator.memory("2.weight").error
    assert error is not None
    both = torch.stack([error / replicas, had])
    dist.all_reduce(both, group=group)
    return everywhere(float((applied + both[0] - both[1]).abs().max()))


class Scaled(nn.Module):
    """Times one element in fp64, of which the second shard is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by.float()


def mixed(place: Place, method: str, replicas: int, shards: int) -> list[float]:
    """The losses of steps on a model in fp32 but for one element; in the second one a gradient is not finite."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    mesh, model = mesh_of(replicas, shards), nn.Sequential(nn.Linear(16, 12), Scaled())
    for part in model:
        fully_shard(part, mesh=mesh["shard"])
    aggregator = ShardAggregator(model, config_of({"method": method}), group=mesh["replicate"].get_group())
    losses = []
    for step in range(4):
        value = model(torch.ones(2, 16)).square().mean()
        losses.append(value.item())
        value.backward()
        if step == 1 and place.rank == place.world - 1:
            model[0].weight.grad.to_local()[0, 0] = torch.inf  # type: ignore[union-attr, operator]
        aggregator.exchange()
        if step != 1:
            descend(model)
        model.zero_grad()
    return losses


def perturbed(place: Place, replicas: int, shards: int) -> str:
    """What a rank is told where the last one's shard is changed in its last bit."""
    mesh, config = mesh_of(replicas, shards), config_of({"method": "acpsgd", "check_every": 2})
    model = sharded(mesh["shard"])
    aggregator = ShardAggregator(model, config, group=mesh["replicate"].get_group())
    try:
        for step in range(5):
            loss(model, place.rank, step).backward()
            aggregator.exchange()
            descend(model)
            if step == 2 and place.rank == place.world - 1:
                mine = local(model, "data")["0.weight"].view(torch.int64)
                mine[-1, -1] ^= 1
    except ValueError as error:
        return str(error)
    return f"nothing in {aggregator.step} steps"


def refused(place: Place) -> list[str]:
    """What one is told for a model that is not sharded, one that FSDP2 averages itself, and a wrong group."""
    mesh = mesh_of(1, 2)
    told = []
    for model, group in (
        (net(), mesh["replicate"].get_group()),
        (sharded(mesh), mesh["replicate"].get_group()),
        (sharded(mesh["shard"]), mesh["shard"].get_group()),
    ):
        try:
            ShardAggregator(model, config_of({}), group=group)
            told.append("nothing")
        except ValueError as error:
            told.append(str(error))
    return told


def test_without_compression_it_is_fsdps_own_average(pool: Pool) -> None:
    assert max(pool.call(f"{HERE}:against_hsdp", 2, 1)) < 1e-6


@pytest.mark.slow
def test_without_compression_it_is_fsdps_own_average_on_four(four: Pool) -> None:
    assert max(four.call(f"{HERE}:against_hsdp", 2, 2)) < 1e-6


def check(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["worst"] < 1e-10
        assert rank["apart"] == rank["resumed"] == 0.0
        assert rank["losses"][1] < 0.8 * rank["losses"][0]


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_shards_are_what_is_compressed(pool: Pool, shape: tuple[int, int], tmp_path: Path) -> None:
    """To the reference's numbers, given the shards; saved by shard and read."""
    check(pool.call(f"{HERE}:trained", "acpsgd", *shape, str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["acpsgd", "powersgd", "topk", "efsign"])
def test_shards_of_two_replicas(four: Pool, method: str, tmp_path: Path) -> None:
    check(four.call(f"{HERE}:trained", method, 2, 2, str(tmp_path)))


def test_an_overflow_in_one_shard_leaves_nothing_of_the_step(pool: Pool) -> None:
    """The other shard's group has seen nothing that is not finite, and its step is left out all the same."""
    assert max(max(rank) for rank in pool.call(f"{HERE}:overflown", 1, 2)) < 1e-12


@pytest.mark.slow
def test_an_overflow_in_one_of_four_shards(four: Pool) -> None:
    assert max(max(rank) for rank in four.call(f"{HERE}:overflown", 2, 2)) < 1e-12


@pytest.mark.parametrize("method", ["acpsgd", "topk", "efsign", "none"])
def test_a_type_of_which_a_shard_has_nothing_is_no_message(pool: Pool, method: str) -> None:
    """One rank then has no bucket of it to exchange; all of them settle the step that was left out."""
    first, second, third, fourth = pool.call(f"{HERE}:mixed", method, 1, 2)[0]
    assert first > second == third > fourth


@pytest.mark.parametrize(("ranks", "shape"), [("pool", (2, 1)), pytest.param("four", (2, 2), marks=pytest.mark.slow)])
def test_all_ranks_are_told_of_replicas_that_differ_in_one_shard(
    ranks: str, shape: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    """Or those of the other shards would wait for this one's."""
    told = request.getfixturevalue(ranks).call(f"{HERE}:perturbed", *shape)
    assert all("the same weights before step" in each for each in told), told


def test_what_cannot_be_aggregated_is_refused(pool: Pool) -> None:
    for plain, both, group in pool.call(f"{HERE}:refused"):
        assert "0.weight: not sharded" in plain
        assert "0.weight: sharded over the dimensions ('replicate', 'shard')" in both
        assert "group: ranks [0, 1] are of one replica" in group
