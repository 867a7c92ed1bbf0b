"""The model of a link: identities between collectives, what a fit recovers, and what a step of each engine says."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from llmsys import schema
from llmsys.cost import Case, links, num_params, traffic, trainable_params
from llmsys.cost.links import Line, Machines

LINE = Line(alpha_s=50e-6, beta_s=8e-9)
WORLDS = (2, 3, 4, 8, 17)


@pytest.mark.parametrize("kind", links.RING)
def test_one_rank_says_nothing(kind: str) -> None:
    assert LINE.seconds(kind, 10**9, 1) == 0
    assert links.bus_factor(kind, 1) == 0
    if kind in links.TREE:
        assert LINE.seconds(kind, 10**9, 1, "tree") == 0


@pytest.mark.parametrize("world", WORLDS)
def test_a_ring_all_reduce_is_a_reduce_scatter_and_an_all_gather(world: int) -> None:
    parts = LINE.seconds("reduce_scatter", 12345, world) + LINE.seconds("all_gather", 12345, world)
    assert LINE.seconds("all_reduce", 12345, world) == pytest.approx(parts)


@pytest.mark.parametrize("world", WORLDS)
def test_a_ring_sends_little_more_than_the_tensor_twice_however_many_ranks(world: int) -> None:
    assert 1 <= links.bus_factor("all_reduce", world) < 2
    assert links.bus_factor("broadcast", world) == 1


@pytest.mark.parametrize("world", [8, 17])
def test_trees_are_for_small_tensors_and_rings_for_large_ones(world: int) -> None:
    """In between is one size from which on the ring is faster."""
    chosen = [LINE.best("all_reduce", 2**power, world)[1] for power in range(3, 31)]
    assert chosen[0] == "tree"
    assert chosen[-1] == "ring"
    assert sorted(chosen, reverse=True) == chosen, "tree, ..., tree, ring, ..., ring"
    assert LINE.best("all_gather", 8, world)[1] == "ring"


def test_on_two_ranks_a_tree_is_never_better() -> None:
    for nbytes in (0, 1, 10**9):
        assert LINE.best("all_reduce", nbytes, 2)[0] == LINE.seconds("all_reduce", nbytes, 2)


def test_the_slower_direction_of_a_home_link_bounds_a_ring() -> None:
    """A ring sends and receives at once; 20 Mbit/s up makes 100 down useless. A delay counts once a message."""
    home = schema.Network(up_mbit=20, down_mbit=100, delay_ms=10)
    even = schema.Network(up_mbit=20, down_mbit=20, delay_ms=10)
    assert Line.of_network(home) == Line.of_network(even) == Line(10e-3, 8 / 20e6)
    assert Line.of_network(home).seconds("all_reduce", 10**6, 4) == pytest.approx(6 * 10e-3 + 1.5 * 10**6 * 8 / 20e6)
    with pytest.raises(ValueError, match="network=eth1g"):
        Line.of_network(schema.Network())


def test_a_machine_s_rate_is_in_bytes() -> None:
    assert Line.of_rate(25.0).seconds("all_gather", 25e9, 2) == pytest.approx(0.5)


def test_machines_of_one_rank_and_one_machine_are_the_flat_cases() -> None:
    inner, outer = Line(1e-6, 1e-11), LINE
    assert Machines(inner, outer, 1).all_reduce(10**8, 8) == pytest.approx(outer.seconds("all_reduce", 10**8, 8))
    assert Machines(inner, outer, 8).all_reduce(10**8, 8) == pytest.approx(inner.seconds("all_reduce", 10**8, 8))
    assert Machines(inner, outer, 4).all_reduce(10**8, 8) < outer.seconds("all_reduce", 10**8, 8)
    with pytest.raises(ValueError, match=r"train\.world=6"):
        Machines(inner, outer, 4).all_reduce(1, 6)


@pytest.mark.parametrize(
    ("kind", "algorithm"), [("all_reduce", "ring"), ("all_reduce", "tree"), ("all_gather", "ring")]
)
@pytest.mark.parametrize("world", [2, 4])
def test_a_fit_recovers_the_line(kind: str, algorithm: str, world: int) -> None:
    """Over six decades of sizes; and within the noise where each time is off by up to 5 %."""
    sizes = [10**power for power in range(2, 9)]
    exact = [LINE.seconds(kind, size, world, algorithm) for size in sizes]
    found = links.fit(sizes, exact, kind=kind, world=world, algorithm=algorithm)
    assert (found.alpha_s, found.beta_s) == pytest.approx((LINE.alpha_s, LINE.beta_s))
    noisy = [seconds * (1.05 if i % 2 else 0.95) for i, seconds in enumerate(exact)]
    found = links.fit(sizes, noisy, kind=kind, world=world, algorithm=algorithm)
    assert (found.alpha_s, found.beta_s) == pytest.approx((LINE.alpha_s, LINE.beta_s), rel=0.06)


def test_a_fit_never_finds_a_negative_latency() -> None:
    found = links.fit([1000, 2000], [1e-3, 2.1e-3])
    assert found.alpha_s == 0
    assert 1e-6 < found.beta_s < 1.1e-6


def test_what_cannot_be_fitted_or_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="two sizes"):
        links.fit([1000, 1000], [1e-3, 1e-3])
    with pytest.raises(ValueError, match="scatter"):
        LINE.seconds("scatter", 1, 2)
    with pytest.raises(ValueError, match="all_gather"):
        LINE.seconds("all_gather", 1, 2, "tree")


MODEL = schema.Transformer()
FULL = schema.Method()


def said(engine: schema.Engine, method: schema.Method = FULL, what: Any = traffic.step_payload, **train: Any) -> Any:
    settings = schema.Train(**{"world": 2, "global_batch": 8, "micro_batch": 4, **train})
    return what(MODEL, settings, method, engine)


def gradients(method: schema.Method, engine: schema.Engine) -> int:
    return 4 * trainable_params(Case(MODEL, schema.Train(), method, engine))


ENGINES = {
    "ddp": schema.DDP(kind="ddp"),
    "fsdp2": schema.FSDP2(kind="fsdp2"),
    "tp": schema.Engine(kind="tp"),
    **{f"zero{stage}": schema.DeepSpeed(kind="deepspeed", zero=stage) for stage in range(4)},
}


@pytest.mark.parametrize("name", ENGINES)
def test_one_rank_has_no_traffic(name: str) -> None:
    assert said(ENGINES[name], world=1) == {}
    assert said(ENGINES[name], what=lambda *parts: traffic.step_seconds(LINE, *parts), world=1) == 0


def test_ddp_says_its_gradients_once_a_step() -> None:
    """However many micro-batches; an adapter's gradients are all that LoRA exchanges."""
    engine = ENGINES["ddp"]
    for method in (FULL, schema.Adapter(kind="lora_peft"), schema.Adapter(kind="lorafa_peft")):
        assert said(engine, method) == {"all_reduce": gradients(method, engine)}
        assert said(engine, method, global_batch=32) == said(engine, method)
    assert said(engine, world=8, global_batch=32, what=traffic.step_traffic) == {
        "all_reduce": round(2 * 7 / 8 * gradients(FULL, engine))
    }


def test_what_the_papers_say_of_data_parallelism() -> None:
    """Cut weights cost half as much again (arXiv 1910.02054, section 7.2), unless they are kept until backward."""
    sent = {name: sum(said(ENGINES[name], what=traffic.step_traffic).values()) for name in ENGINES}
    assert sent["zero0"] == sent["ddp"]
    assert sent["zero1"] == sent["zero2"] == pytest.approx(1.5 * sent["ddp"])  # DeepSpeed's all-reduce
    assert sent["fsdp2"] == pytest.approx(1.5 * sent["ddp"])
    once = dataclasses.replace(ENGINES["fsdp2"], reshard=False)
    assert sum(said(once, what=traffic.step_traffic).values()) == pytest.approx(sent["ddp"])
    assert sent["zero3"] == pytest.approx(sent["ddp"])  # so small a model is kept


def test_zero_3_gathers_a_large_model_twice_but_for_its_end() -> None:
    """Half of the reuse distance, there and back again."""
    large = schema.Transformer(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32)
    settings = schema.Train(world=2, global_batch=8, micro_batch=4)
    payload = traffic.step_payload(large, settings, FULL, ENGINES["zero3"])
    kept = 2 - payload["all_gather"] / payload["reduce_scatter"]
    assert kept * num_params(large) == pytest.approx(traffic.REUSE / 2, rel=0.1)


def test_only_divided_gradients_and_weights_travel_for_each_micro_batch() -> None:
    one = {name: said(ENGINES[name]) for name in ENGINES}
    two = {name: said(ENGINES[name], global_batch=16) for name in ENGINES}
    for name in ("ddp", "zero0", "zero1"):
        assert two[name] == one[name]
    assert two["zero2"] == {"all_reduce": 2 * one["zero2"]["all_reduce"], "all_gather": one["zero2"]["all_gather"]}
    assert two["zero3"] == {kind: 2 * nbytes for kind, nbytes in one["zero3"].items()}
    assert two["fsdp2"]["reduce_scatter"] == one["fsdp2"]["reduce_scatter"]
    assert two["fsdp2"]["all_gather"] == 2 * one["fsdp2"]["all_gather"]


def test_tensor_parallelism_sends_activations() -> None:
    """In proportion to tokens, and not to the weights; half as many bytes in bf16."""
    short, long = (said(ENGINES["tp"], length=length) for length in (64, 128))
    assert long == {kind: 2 * nbytes for kind, nbytes in short.items()}
    half = said(ENGINES["tp"], length=128, precision="bf16")
    assert long == {kind: 2 * nbytes for kind, nbytes in half.items()}
    tokens = 2 * 4 * 128  # TP has one share of the data: two micro-batches
    assert long["all_gather"] == tokens * MODEL.vocab_size * 4
    per_block = 2 + 5  # behind o and down; before q, k, v, gate and up
    assert long["all_reduce"] == tokens * MODEL.hidden_size * 4 * (MODEL.num_layers * per_block + 1)


def test_a_step_on_a_home_link_takes_as_long_as_its_gradients_do() -> None:
    line = Line.of_network(schema.Network(up_mbit=20, down_mbit=100))
    seconds = said(ENGINES["ddp"], what=lambda *parts: traffic.step_seconds(line, *parts))
    assert seconds == pytest.approx(gradients(FULL, ENGINES["ddp"]) * 8 / 20e6)
