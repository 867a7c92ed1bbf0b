"""The algebra of techniques: a combination has one text, which is read back, and stands for settings that are it."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmsys import compose, identity, job, schema
from llmsys.bench.expand import expanded, unexpanded
from llmsys.bench.techniques import ADAPTERS, LETTERS, Techniques


def every() -> list[Techniques]:
    """All valid values, TP of 2 and 8."""
    fields: dict[str, list[Any]] = {
        "flash": [False, True],
        "recompute": [False, True],
        "zero": [0, 1, 2, 3],
        "offload": [False, True],
        "quantised": [False, True],
        "adapter": list(ADAPTERS),
        "adam8": [False, True],
        "fp8": [False, True],
        "tensor": [1, 2, 8],
    }
    found = []
    for values in itertools.product(*fields.values()):
        try:
            found.append(Techniques(**dict(zip(fields, values, strict=True))))
        except ValueError:
            continue
    return found


EVERY = every()


def test_each_has_a_text_of_its_own_that_is_read_back_in_any_order_and_case() -> None:
    draw = random.Random(0)
    assert len({str(each) for each in EVERY}) == len(EVERY) > 200
    for each in EVERY:
        parts = str(each).split("+")
        assert Techniques.parse(str(each)) == each
        draw.shuffle(parts)
        assert Techniques.parse(" + ".join(parts).lower()) == each


def test_its_text_is_the_toolkit_s() -> None:
    assert str(Techniques.parse("q+o+z3+r+f")) == "F+R+Z3+O+Q"
    assert str(Techniques.parse("tp4+q8+o8+l")) == "L+O8+Q8+TP4"
    assert str(Techniques.parse("-")) == str(Techniques.parse("NAIVE")) == str(Techniques()) == "Naive"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("O", ["needs a Z", "Z2+O"]),
        ("Z2+Z3", ["Z2 and Z3", "one stage"]),
        ("Q+L", ["written QL"]),
        ("LFA+Q", ["written QLFA"]),
        ("L+LFA", ["L and LFA", "one of"]),
        ("QL+QLFA", ["one of"]),
        ("TP2+Z2", ["TP", "ZeRO"]),
        ("TP2+QL", ["TP", "whole"]),
        ("TP2+LFA", ["TP", "LoRA-FA"]),
        ("TP2+TP4", ["one number of ranks"]),
        ("Z2+O+O8", ["O8", "host"]),
        ("Q+Q8", ["Q8"]),
        ("F+F", ["twice"]),
        ("F+Z4", ["Z4", "did you mean Z"]),
        ("F+QLORA", ["QLORA", "did you mean QL?"]),
        ("TP1", ["TP1", "TP2"]),
        ("F+X", ["X is no technique", "there are F, R"]),
        ("F+", ["an empty part"]),
        ("", ["an empty part"]),
    ],
)
def test_what_contradicts_itself_is_refused_with_the_reason(text: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        Techniques.parse(text)
    (line,) = str(raised.value).splitlines()
    assert line.startswith(f"techniques={text}: ")
    for word in words:
        assert word in line


def test_a_letter_can_be_left_out_of_any_combination_and_is_gone() -> None:
    """Z takes O along, which is nothing without it. From the value and its letters nothing else is lost."""
    for each in EVERY:
        for letter in each.letters:
            less = each.without(letter)
            gone = set(each.letters) - set(less.letters)
            assert gone == {letter} | ({"O"} if letter.startswith("Z") and each.offload else set())
            assert set(less.letters) <= set(each.letters)
    assert str(Techniques.parse("F+Z3+O+QL").without("Q")) == "F+Z3+O+L"
    with pytest.raises(ValueError, match=r"^techniques=F: has no R; there are F$"):
        Techniques.parse("F").without("R")


def test_combinations_are_all_valid_ones_and_no_other() -> None:
    one_tp = [each for each in EVERY if each.tensor in (1, 2)]
    assert set(Techniques.combinations([*LETTERS, "TP2"])) == set(one_tp)
    paper = Techniques.combinations(["F", "R", "Z2", "Z3", "O", "Q"])
    assert len(paper) == 40  # {Naive, Z2, Z2+O, Z3, Z3+O} x {-, R, F, Q and their sums}
    assert str(paper[0]) == "Naive"
    assert [len(each.letters) for each in paper] == sorted(len(each.letters) for each in paper)
    with pytest.raises(ValueError, match="X is no technique"):
        Techniques.combinations(["F", "X"])


@functools.cache
def choice(word: str) -> Any:
    """What `word` makes of its group. Once: Hydra takes 0.1 s for it."""
    return compose.compose([word, "train.micro_batch=2"])[word.partition("=")[0]]


def composed(words: list[str], engine: str) -> schema.Config:
    """The config of `words`, of which some choose a group and some set a value in one."""
    plain = copy.deepcopy(compose_base())
    for word in [f"engine={engine}", *words]:
        key, _, value = word.partition("=")
        group, _, inner = key.partition(".")
        if inner:
            plain[group][inner] = {"true": True, "false": False}.get(value, int(value) if value.isdigit() else value)
        else:
            plain[group] = copy.deepcopy(choice(word))
    return schema.build(plain)


@functools.cache
def compose_base() -> dict[str, Any]:
    return compose.compose(["train.global_batch=16", "train.micro_batch=2"])


def test_the_settings_that_it_stands_for_are_it() -> None:
    for each in EVERY[::3]:
        if each.tensor == 8 or (each.fp8 and (each.adapter == "lorafa" or each.tensor > 1)):
            continue  # more ranks than the tiny model has heads; what the trainer refuses
        keys = [word.partition("=")[0] for word in each.words()]
        assert len(keys) == len(set(keys))
        assert Techniques.of(composed(each.words(), "local" if each.tensor == 1 else "ddp")) == each


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["engine=fsdp2", "train.world=1"], "F+Z3"),
        (["model.attention=eager"], "Naive"),
        (["model.attention=flash_attention_2"], "F"),
        (["train.recompute=auto"], "F+R"),
        (["train.recompute='block:1,none:1'"], "F+R"),
        (["train.recompute=mlp", "method=lora"], "F+R+L"),
        (["model.quant=int8", "method=lorafa_peft"], "F+QLFA"),
        (["engine=deepspeed", "engine.zero=3", "engine.offload=optimizer"], "F+Z3+O"),
        (["engine=tp", "train.world=2", "train.micro_batch=4"], "F+TP2"),
        (["engine=ddp"], "F"),
    ],
)
def test_a_config_is_read_whoever_chose_its_settings(words: list[str], text: str) -> None:
    assert str(Techniques.of(schema.build(compose.compose(words)))) == text


def test_what_the_user_gives_himself_stays_and_the_rest_follows() -> None:
    assert expanded(["method.r=64", "techniques=ql"])[:4] == [
        "method.r=64",
        "techniques=QL",
        "model.attention=eager",
        "train.recompute=none",
    ]
    config = compose.compose(["techniques=QL", "method.r=64"])
    assert (config["method"]["kind"], config["method"]["r"], config["model"]["quant"]) == ("lora_peft", 64, "nf4")
    assert config["command"] == ["techniques=QL", "method.r=64"]
    config = compose.compose(["techniques=Z3", "engine=fsdp2", "train.micro_batch=4"])
    assert config["engine"]["kind"] == "fsdp2"
    config = compose.compose(["techniques='F+R'", "model.attention=flash_attention_2"])
    assert (config["model"]["attention"], config["techniques"]) == ("flash_attention_2", "F+R")


@pytest.mark.parametrize("text", ["F+R+Z3+O+Q", "-", "L+TP2", "O8+Q8"])
def test_a_command_without_its_implied_words_is_the_same_command(text: str) -> None:
    words = ["+exp=bench_engines", f"techniques={text}", "train.steps=3"]
    known = f"techniques={Techniques.parse(text)}"
    assert unexpanded(expanded(words)) == [words[0], known, words[2]]
    assert expanded(unexpanded(expanded(words))) == expanded(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["techniques=R", "model.attention=sdpa"],
            "model.attention=sdpa: techniques=R means eager; techniques=F+R, or leave model.attention out",
        ),
        (
            ["techniques=F", "engine=zero2"],
            "engine=deepspeed engine.zero=2: techniques=F means local or engine=ddp; techniques=F+Z2, or leave",
        ),
        (["techniques=Z3+O", "engine=fsdp2"], "engine=fsdp2: techniques=Z3+O means zero3_offload; techniques=Z3, or"),
        (["techniques=QL", "method=full"], "method=full: techniques=QL means lora_peft; techniques=Q, or leave"),
        (
            ["techniques=TP2", "engine=ddp"],
            "engine=ddp: techniques=TP2 means tp; techniques=Naive, or leave engine out",
        ),
        (["techniques=O8", "train.optimizer=adamw"], "train.optimizer=adamw: techniques=O8 means adamw_8bit"),
    ],
)
def test_a_clash_is_one_line_that_says_what_would_be_right(words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        compose.compose([*words, "train.micro_batch=2"])
    assert str(raised.value).startswith(message)


def test_it_is_no_part_of_what_a_run_is() -> None:
    """The groups are: whoever chose them, it is one run. Settings that are new leave older runs their ids."""
    typed = job.make(compose.compose(["techniques=F", "train.threads=1"]))
    chosen = job.make(compose.compose(["train.threads=1"]))
    assert typed.run_id == chosen.run_id
    assert typed.config["techniques"] == "F"
    assert "F · full" in typed.label
    older = {key: value for key, value in chosen.config.items() if key != "techniques"}
    older["train"] = {key: value for key, value in older["train"].items() if key not in ("optimizer", "fp8")}
    before = {"device_name": "a CPU", "content": {}}
    assert identity.run_id(older, **before) == identity.run_id(chosen.config, **before)  # type: ignore[arg-type]
    other = {**chosen.config, "train": {**chosen.config["train"], "optimizer": "adamw_8bit"}}
    assert identity.run_id(other, **before) != identity.run_id(older, **before)  # type: ignore[arg-type]


FILE = """# @package _global_
name: mine
{body}
"""
COLLECT = """
import json, sys
from llmsys import main

def collect(configs):
    main.make_jobs(configs)
    print(json.dumps(configs))
    return 0

main.submit = collect
main.main()
"""


def test_on_the_command_line_in_a_sweep_and_in_a_file(tmp_path: Path) -> None:
    """Hydra takes the plus signs; each job of a sweep is expanded by itself; a file is told where the key belongs."""
    (tmp_path / "exp").mkdir()
    swept = "hydra: {mode: MULTIRUN, sweeper: {params: {techniques: 'Naive,F+R,L'}}}"
    for name, body in (("sweep", swept), ("fixed", "techniques: F+R")):
        (tmp_path / "exp" / f"{name}.yaml").write_text(FILE.format(body=body))

    def typed(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", COLLECT, "--config-dir", str(tmp_path), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = typed("+exp=sweep", "train.steps=2")
    configs = json.loads(done.stdout)
    assert [config["techniques"] for config in configs] == ["Naive", "F+R", "L"]
    chosen = [(c["model"]["attention"], c["train"]["recompute"], c["method"]["kind"]) for c in configs]
    assert chosen == [("eager", "none", "full"), ("sdpa", "block", "full"), ("eager", "none", "lora_peft")]
    assert {*configs[1]["command"][1:]} == {"+exp=sweep", "techniques=F+R", "train.steps=2"}
    (config,) = json.loads(typed("techniques=r+QL", "method.r=3").stdout)
    assert (config["techniques"], config["method"]["r"]) == ("R+QL", 3)
    done = typed("+exp=fixed")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "techniques=F+R" in line
    assert "hydra.sweeper.params" in line
