"""Claims about witnesses: memory never shrinks along the axes that are declared, and nothing is pruned off them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llmsys import compose, job, schema, tasks
from llmsys.cost import memory
from llmsys.job import Record
from llmsys.sweep import prune
from llmsys.sweep.prune import Point, Witnesses, point
from llmsys.sweep.settings import Config, changed

SIZES = {"train.micro_batch": 4, "train.global_batch": 4, "train.length": 64}


@cache
def composed(*choices: str) -> Config:
    """Composing takes a tenth of a second: once for each choice of groups."""
    return compose.compose(choices)


def config(*choices: str, **values: Any) -> Config:
    """`choices` of groups, and single values with `__` for the dot."""
    return changed(composed(*choices), **{key.replace(".", "__"): v for key, v in SIZES.items()} | values)


def at(*choices: str, **values: Any) -> Point:
    place = point(config(*choices, **values))
    assert place is not None
    return place


GROWN: dict[str, dict[str, Any]] = {
    "train.micro_batch": {"train__micro_batch": 8, "train__global_batch": 8},
    "train.global_batch": {"train__global_batch": 8},
    "train.length": {"train__length": 128},
    "train.target_length": {"train__target_length": 128},
    "train.steps": {"train__steps": 500},
    "model.num_layers": {"model__num_layers": 3},
    "model.hidden_size": {"model__hidden_size": 128},
    "model.intermediate_size": {"model__intermediate_size": 200},
    "model.vocab_size": {"model__vocab_size": 1000},
    "model.num_heads": {"model__num_heads": 8, "model__num_kv_heads": 8},
    "model.num_kv_heads": {"model__num_kv_heads": 4},
    "method.r": {"method__r": 16},
    "dispatch.memory_gib": {"dispatch__memory_gib": 1},
}


@pytest.mark.parametrize(
    ("choices", "values"),
    [
        ((), {}),
        (("method=lora_peft",), {}),
        ((), {"model__attention": "eager", "train__recompute": "block"}),
    ],
    ids=str,
)
def test_along_every_declared_axis_predicted_memory_never_shrinks(
    choices: tuple[str, ...], values: dict[str, Any]
) -> None:
    base = {"model__num_kv_heads": 2, **values}
    for key in tasks.MONOTONE["train"]:
        if key == "method.r" and not choices:
            continue
        small, large = at(*choices, **base), at(*choices, **base | GROWN[key])
        assert large.covers(small), key
        assert not small.covers(large), key
        assert _predicted(config(*choices, **base)) <= _predicted(config(*choices, **base | GROWN[key])), key


def _predicted(made: Config) -> int:
    typed = schema.build(made)
    return memory.peak_bytes(typed.model, typed.train, typed.method, typed.engine)


@pytest.mark.parametrize(
    ("choices", "values"),
    [
        (("method=lora_peft",), {}),
        (("engine=ddp",), {}),
        ((), {"train__seed": 1}),
        ((), {"model__attention": "eager"}),
        ((), {"train__recompute": "block"}),
        ((), {"model__dtype": "bf16", "train__precision": "bf16"}),
        ((), {"hardware__mem_gib": 4.0}),
        ((), {"train__loss": "chunked"}),
    ],
    ids=str,
)
def test_what_differs_in_anything_else_is_not_compared(choices: tuple[str, ...], values: dict[str, Any]) -> None:
    longer = at(*choices, **values, train__length=128)
    assert not longer.covers(at())
    assert longer.covers(at(*choices, **values))


def test_a_repeat_and_who_is_told_make_no_difference() -> None:
    values = {"repeat": 3, "tracker__mode": "online", "dispatch__timeout_s": 5, "results": "x", "sweep__prune": True}
    assert at(**values) == at()


def test_accumulation_counts_as_held_gradients() -> None:
    """Two micro-batches of 4 hold the first one's gradients and may need more than one of 8: no order between them."""
    two, one = at(train__global_batch=8), at(train__micro_batch=8, train__global_batch=8)
    assert not two.covers(one)
    assert not one.covers(two)
    assert two.covers(at())
    assert at(train__global_batch=16) == two, "how many more does not matter"


def test_recomputation_by_what_there_is_room_for_is_never_pruned() -> None:
    assert point(config(train__recompute="auto")) is None


def test_a_user_may_add_an_axis() -> None:
    small = composed("+exp=lorafa_ledger")
    large = changed(small, task__width=1024)
    for more, comparable in (((), False), (("task.width",), True)):
        one, other = point(large, more), point(small, more)
        assert one is not None
        assert other is not None
        assert one.covers(other) == comparable, "the ledger itself declares none"


def out_of_memory(**fields: Any) -> Record:
    values = {"status": "oom", "code_hash": job.code_hash(), "env": {"device_name": "X", "memory_gib": 16.0}, **fields}
    return Record(name="scratch", run_id="w" * 12, task="train", reason="host memory", config=config(), **values)


def test_a_witness_is_named_with_where_it_stands() -> None:
    seen = Witnesses()
    seen.see(out_of_memory(status="failed"))
    larger = config(train__length=128)
    assert seen.against(larger) is None, "only running out of memory is a witness"
    seen.see(out_of_memory())
    witness = seen.against(larger)
    assert witness is not None
    assert seen.why(larger, witness) == (
        "not run: run wwwwwwwwwwww ran out of memory (host memory), and it has less of train.length=128"
    )
    assert seen.against(config(train__length=32)) is None


@pytest.mark.parametrize(
    ("fields", "reuse", "counts"),
    [
        ({}, "same_code", True),
        ({}, "never", False),
        ({"code_hash": "other"}, "same_code", False),
        ({"code_hash": "other"}, "any", True),
        ({"env": {"device_name": "Y", "memory_gib": 16.0}}, "any", False),
        ({"env": {"device_name": "X", "memory_gib": 8.0}}, "any", False),
        ({"env": {"device_name": "X", "memory_gib": 32.0}}, "any", True),
        ({"status": "ok"}, "any", False),
    ],
)
def test_an_earlier_sweep_s_record_counts_where_it_says_something_of_this_machine(
    tmp_path: Path, fields: dict[str, Any], reuse: str, counts: bool
) -> None:
    (tmp_path / "run").mkdir()
    out_of_memory(**fields).write(tmp_path / "run")
    found = prune.kept([tmp_path], reuse=reuse, device_name="X", memory_gib=16.0)
    assert bool(found) == counts
