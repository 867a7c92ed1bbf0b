"""A fleet from a file: what is wrong in it is said with the file's name and the provider's."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmsys.cost.hardware import DEVICES
from llmsys.decentral import fleet_file, fleets

GOOD = """
providers:
  - {name: anna, card: rtx3080, up_mbit: 20, down_mbit: 100, region: de, efficiency: 0.45}
  - {name: box, tflops: 40, mem_gib: 11, up_mbit: 1000, down_mbit: 500, region: fr, trusted: false}
between:
  - {regions: [de, fr], mbit: 200, delay_ms: 25}
other: {delay_ms: 40}
"""


def read(tmp_path: Path, text: str) -> object:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    return fleet_file.read(path, "fp16")


def test_a_file_is_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(GOOD)
    own = fleet_file.read(path, "fp16")
    anna, box = own.providers
    assert anna.tflops == DEVICES["rtx3080"].peak("fp16") / 1e12
    assert anna.mem_gib == DEVICES["rtx3080"].mem_gib - fleets.RESERVED_GIB
    assert (anna.efficiency, anna.trusted, box.trusted) == (0.45, True, False)
    assert own.beta_s(0, 1) == 8e-6 / 20
    assert own.beta_s(1, 0) == 8e-6 / 100
    assert own.alpha_s(0, 1) == own.alpha_s(1, 0) == 0.025
    assert own.alpha_s(0, 0) == 0.04


def test_json_is_yaml(tmp_path: Path) -> None:
    given = '{"providers": [{"name": "a", "tflops": 1, "mem_gib": 1, "up_mbit": 1, "down_mbit": 1}]}'
    assert len(read(tmp_path, given)) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must have `providers`, a list"),
        ("providers: 3", "must have `providers`, a list"),
        ("providers: [", "neither YAML nor JSON"),
        ("providers: [{name: a, crad: h100}]", "provider a: crad: must be one of card"),
        ("providers: [{name: a, card: h1000, up_mbit: 1, down_mbit: 1}]", "provider a: card=h1000: must be one of"),
        ("providers: [{name: a, card: h100, up_mbit: 1}]", "provider a: down_mbit: missing"),
        ("providers: [{name: a, tflops: 3, up_mbit: 1, down_mbit: 1}]", "provider a: mem_gib: missing, and no card"),
        (
            "providers: [{name: a, card: h100, up_mbit: fast, down_mbit: 1}]",
            "provider a: up_mbit='fast': must be a number",
        ),
        ("providers: [{name: a, card: h100, up_mbit: -1, down_mbit: 1}]", "provider a: up_mbit=-1: must be a positive"),
        ("providers: [{name: a, card: h100, up_mbit: 1, down_mbit: 1, trusted: maybe}]", "must be true or false"),
        ("providers: [{card: h100}]", "provider 0: must be settings, `name`, a text, among them"),
        ("providers: [{name: {a: b}, card: h100}]", "provider 0: must be settings, `name`, a text, among them"),
        (GOOD.split("between")[0] + "between: 5", "between: 5: must be a list"),
        (GOOD.replace("[de, fr]", "[[de], {a: b}]"), "must have `regions`, two names"),
        (GOOD.replace("other:", "  - {regions: [fr, de], mbit: 20}\nother:"), "between ['fr', 'de']: is there twice"),
        (GOOD.replace("fr]", "es]"), "no provider is in region es"),
        (GOOD.replace("mbit: 200", "mbit: 0"), "mbit=0: must be positive"),
        (GOOD.replace("box", "anna"), "provider anna: is there twice"),
        (GOOD + "speed: 3", "the file: speed: must be one of providers, between, other"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(f"task.fleet={tmp_path / 'fleet.yaml'}: ")
    assert words in str(error.value)


def test_no_file_is_said_to_be_none() -> None:
    with pytest.raises(
        ValueError, match=r"task.fleet=nowhere\.yaml: must be one of datacentre, cloud, homes, or a file"
    ):
        fleet_file.read("nowhere.yaml")


@pytest.mark.parametrize("kind", fleets.FLEETS)
def test_a_seed_draws_one_fleet(kind: str) -> None:
    one, same, other = (fleets.FLEETS[kind](20, seed) for seed in (1, 1, 2))
    assert one == same != other
    assert len({each.name for each in one.providers}) == 20
