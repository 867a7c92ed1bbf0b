"""Claims about the group `compress=`: what it is made of, what it may stand beside, and whose runs it leaves alone."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from llmsys import compose, identity, job, main, schema
from llmsys.compress import Aggregator, CompressConfig
from llmsys.compress.hook import HookState
from llmsys.rows import row
from llmsys.schema.compress import METHODS

RECORDS = Path(__file__).parents[1] / "benchmarks" / "records"


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_is_a_choice_and_means_the_same_to_the_library(kind: str) -> None:
    """One file a method; its settings, without the group's word for it, are the library's."""
    text = compose.choices("compress")[kind]
    assert len(text) > 20
    found = schema.build(compose.compose([f"compress={kind}", "engine=ddp"])).compress
    values = dataclasses.asdict(found)
    assert values.pop("kind") == found.method == kind
    assert dataclasses.asdict(CompressConfig(method=kind, **values)) == {**values, "method": kind}


def test_help_shows_the_group() -> None:
    assert f"compress={' | '.join(sorted(METHODS))}" in main.help_text()


def test_a_schedule_of_ranks_has_numbers_or_text_for_steps() -> None:
    """JSON has no other keys than text, and a config comes back from JSON."""
    plain = compose.compose(["compress=acpsgd", "engine=ddp", "+compress.ranks={0:8,1000:4}"])
    for values in (plain, json.loads(json.dumps(plain))):
        found = schema.build(values).compress
        assert [found.r_at(step) for step in (0, 999, 1000)] == [8, 8, 4]
        assert found.widest == 8


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["compress=topk", "compress.density=2"], ["compress.density=2", "at most 1"]),
        (["compress=acpsgd", "compress.r=0"], ["compress.r=0"]),
        (["compress=topk", "compress.wire=bf16"], ["compress.wire=bf16", "randomk"]),
        (["compress=powersgd", "compress.reuse=false"], ["compress.reuse=False", "compress.kind=acpsgd"]),
        (["compress=sign", "compress.skip=[a]"], ["compress.skip=['a']", "+-1"]),
        (["compress=sign", "compress.error_feedback=true"], ["compress.error_feedback=True", "not with sign"]),
        (["compress=acpsgd", "compress.check_every=-1"], ["compress.check_every=-1", "0 for never"]),
        (["compress=none", "compress.check_every=5"], ["compress.check_every=5", "compress.kind=none", "engine"]),
        (["compress=acpsgd", "+compress.ranks={a:3}"], ["compress.ranks", "steps from 0"]),
        (["compress=none", "compress.kind=dgc"], ["compress.kind=dgc", "acpsgd"]),
        (["compress=acpsgd", "engine=local"], ["compress.kind=acpsgd", "one rank", "engine=ddp"]),
        (["compress=acpsgd", "engine=tp"], ["compress.kind=acpsgd", "nothing to average"]),
        (["compress=acpsgd", "engine=fsdp2"], ["compress.kind=acpsgd", "a part of the gradients"]),
        (["compress=acpsgd", "engine=zero2"], ["engine.zero=2", "engine.zero=0 or 1"]),
        (["compress=acpsgd", "engine=zero3"], ["engine.zero=3", "engine.zero=0 or 1"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        schema.build(compose.compose(["engine=ddp", *overrides]))
    for word in words:
        assert word in str(error.value)


def test_the_library_names_its_own_settings() -> None:
    with pytest.raises(ValueError, match=r"^density=2: must be above 0"):
        CompressConfig(method="topk", density=2)
    with pytest.raises(ValueError, match=r"^select=threshold: is for method=topk, not for acpsgd"):
        CompressConfig(select="threshold")


@pytest.mark.parametrize(
    "wrong",
    [
        *({"r": r} for r in (2.5, True, "4", None)),
        *({"refresh_every": 2.5}, {"seed": "x"}, {"seed": 1.0}, {"min_rate": "4"}, {"min_rate": False}),
        *({"method": "topk", "density": density} for density in ("a", True, float("nan"))),
        *({"ranks": ranks} for ranks in ([1, 2], {0: 2.5}, {0.5: 2}, {0: True}, {0: "8"}, 8)),
        *({"skip": skip} for skip in ([1], 5, "name")),
        *({"error_feedback": "no"}, {"reuse": 0}, {"method": ["acpsgd"]}, {"wire": None}),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_refused_when_the_settings_are_made(wrong: dict[str, Any]) -> None:
    """Hydra sees to types on the command line; from Python a width of 2.5 went as far as the backward pass."""
    key = list(wrong)[-1]
    with pytest.raises(ValueError, match=rf"^{key}=[^\n]*$"):
        CompressConfig(**wrong)


@pytest.mark.parametrize("surface", [HookState, lambda config, net: Aggregator(net.named_parameters(), config)])
def test_a_name_to_skip_that_no_parameter_has_is_an_error(surface: Callable[..., Any]) -> None:
    """A typo must not compress what was to be left alone."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    surface(CompressConfig(skip=["1.*", "*.bias"]), net)
    with pytest.raises(ValueError, match=r"^skip=.*: \*\.wieght matches none .*, e\.g\. [01]\.weight$"):
        surface(CompressConfig(skip=["1.*", "*.wieght"]), net)


def test_an_aggregator_wants_names() -> None:
    with pytest.raises(ValueError, match=r"named_parameters\(\)"):
        Aggregator(nn.Linear(64, 64).parameters(), CompressConfig())  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["ddp", "deepspeed", "zero1"])
def test_engines_that_leave_gradients_whole_carry_it(engine: str) -> None:
    assert schema.build(compose.compose(["compress=acpsgd", f"engine={engine}"])).compress.kind == "acpsgd"


def test_a_run_without_compression_is_the_run_it_always_was() -> None:
    """The id of a committed record, whose config does not know the group, comes out of that config with and without."""
    (path,) = RECORDS.glob("compress_resnet18_digits/*/record.json")
    record = json.loads(path.read_text())
    config = record["config"]
    assert "compress" not in config
    content = {"data": "", "weights": ""}

    def identifier(**more: object) -> str:
        return identity.run_id({**copy.deepcopy(config), **more}, device_name="a CPU", content=content)

    none = dataclasses.asdict(schema.Compress())
    assert identifier() == identifier(compress=none)
    assert identifier() != identifier(compress={**none, "kind": "acpsgd"}) != identifier(compress={**none, "r": 8})
    assert schema.build(config).compress == schema.Compress()


@pytest.mark.parametrize("kind", ["acpsgd", "sign"])
def test_a_compressed_run_is_the_run_it_always_was(kind: str) -> None:
    """A config that does not know `check_every`, and said of every method that errors are fed back, has the id and the
    line of today's, which says so of none; a check that is made, or errors that are not kept, make another run."""
    path = next(iter(sorted(RECORDS.glob("compress_iteration/*/record.json"))))
    record = job.Record.from_json(path.read_text())
    then = {**record.config["compress"], "kind": kind}
    now = json.loads(json.dumps(dataclasses.asdict(schema.Compress(kind=kind))))
    assert then["error_feedback"] is True
    assert now["error_feedback"] is None
    assert set(now) - set(then) == {"check_every"}

    def of(**compress: object) -> tuple[str, dict[str, object]]:
        config = {**copy.deepcopy(record.config), "compress": compress}
        found = identity.run_id(config, device_name="a CPU", content={})
        return found, row(dataclasses.replace(record, config=config))

    assert of(**then) == of(**now) == of(**{**now, "error_feedback": True})
    for other in ({"check_every": 100}, {"error_feedback": False}):
        for found, before in zip(of(**{**now, **other}), of(**then), strict=True):
            assert found != before


def test_tables_tell_compressed_runs_apart() -> None:
    """Old records, which do not know the group, and new ones without compression are alike."""
    (path,) = RECORDS.glob("compress_resnet18_digits/*/record.json")
    record = job.Record.from_json(path.read_text())
    none = dataclasses.asdict(schema.Compress())

    def compressed(**changes: object) -> dict[str, object]:
        config = {**record.config, "compress": {**none, **changes}}
        return row(dataclasses.replace(record, config=config))

    assert row(record)["compress"] == "none"
    assert row(record) == compressed()
    assert compressed(kind="acpsgd", r=4)["compress"] == "acpsgd r=4"
    assert compressed(kind="topk", density=0.01)["compress"] == "topk 0.01"
