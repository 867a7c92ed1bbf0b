"""Claims about the settings: they compose, their mistakes are one line, and asking for help costs nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmsys import compose, schema

Run = Callable[..., "subprocess.CompletedProcess[str]"]
EXPERIMENTS = sorted(compose.choices("exp"))
HEADER = ("# Paper:", "# Expected:", "# Hardware:", "# Command:")


FORKS = """
import gc, json, os, sys, tempfile
import hydra, omegaconf, yaml
from llmsys import compose, main, messages
main.make_jobs([compose.compose(["train.steps=1"])])
gc.freeze()
for line in sys.stdin:
    sys.argv = ["llmsys", *json.loads(line)]
    texts = [tempfile.TemporaryFile("w+") for _ in range(2)]
    child = os.fork()
    if not child:
        for number, text in enumerate(texts, 1):
            os.dup2(text.fileno(), number)
        main.main()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for text in texts:
        text.seek(0)
    print(json.dumps([code, *(text.read() for text in texts)]), flush=True)
"""


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """`llmsys` of conftest.py, in forks of a process that has imported and registered what every run does."""
    environment = {**os.environ, "LLMSYS_RESULTS": str(tmp_path_factory.mktemp("forked") / "results")}
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            assert process.stdin
            assert process.stdout
            print(json.dumps(arguments), file=process.stdin, flush=True)
            code, out, err = json.loads(process.stdout.readline())
            return subprocess.CompletedProcess(arguments, code, out, err)

        yield run


@pytest.mark.parametrize("exp", EXPERIMENTS)
def test_every_experiment_composes_and_is_named_after_its_file(exp: str) -> None:
    config = compose.compose([f"+exp={exp}"])
    assert config["name"] == exp
    assert config["smoke"], "says how it runs in seconds"
    schema.build(config)


@pytest.mark.parametrize("exp", EXPERIMENTS)
def test_every_experiment_opens_with_its_header(exp: str) -> None:
    lines = (compose.CONF / "exp" / f"{exp}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    comments = [line for line in lines if line.startswith("#")]
    for field in HEADER:
        assert any(line.startswith(field) for line in comments), field
    assert any("Time:" in line for line in comments)
    assert "EXPECTED" not in "".join(comments), "a placeholder"


@pytest.mark.parametrize("exp", EXPERIMENTS)
def test_the_commands_of_a_header_are_not_refused(exp: str) -> None:
    """Of a sweep its first run; what is in brackets, as one may add it, is left out."""
    text = (compose.CONF / "exp" / f"{exp}.yaml").read_text()
    found = re.findall(r"^#.*python -m llmsys (-m )?(\+exp=[^;(\n]*)", text, re.MULTILINE)
    assert found
    for sweep, rest in found:
        words = re.sub(r"<[^>]*>", "x", re.sub(r" \[.*", "", rest)).split()
        first = [word if "[" in word else word.partition(",")[0] for word in words]
        schema.build(compose.compose(first if sweep else words))


def test_smoke_stands_for_the_experiment_s_own_list_and_what_else_is_said_wins() -> None:
    words = [
        "-m",
        "+exp=compress_resnet18_cifar10",
        "smoke=true",
        "train.steps=3",
        "model=vgg_tiny",
        "compress=none,sign",
    ]
    found = compose.smoked(words)
    assert "smoke=true" not in found
    assert [word for word in found if word.startswith(("train.steps", "model="))] == ["train.steps=3", "model=vgg_tiny"]
    assert {"train.world=1", "data=digits", "data.max_train=64"} <= set(found)
    smoke = compose.compose(["+exp=compress_resnet18_cifar10"])["smoke"]
    assert set(found) <= {*words, *smoke}
    assert compose.smoked(["+exp=x", "train.steps=3"]) == ["+exp=x", "train.steps=3"]
    for wrong in (["smoke=true"], ["-m", "+exp=a,b", "smoke=true"]):
        with pytest.raises(ValueError, match=r"^smoke=true: .*\+exp=NAME"):
            compose.smoked(wrong)


def test_smoke_of_an_experiment_in_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "exp").mkdir()
    for name, smoke in (("mine", "smoke: [train.steps=2]"), ("bare", "")):
        (tmp_path / "exp" / f"{name}.yaml").write_text(f"# @package _global_\nname: {name}\n{smoke}\n")
    for flag in ([f"--config-dir={tmp_path}"], ["--config-dir", str(tmp_path)]):
        assert compose.smoked([*flag, "+exp=mine", "smoke=true"]) == [*flag, "+exp=mine", "train.steps=2"]
        with pytest.raises(ValueError, match=r"smoke=true: \+exp=bare has no list `smoke`"):
            compose.smoked([*flag, "+exp=bare", "smoke=true"])


def test_every_choice_of_every_group_composes() -> None:
    """The first choices of all groups at once, then the second ones, ...: each group is looked at by itself. Files of
    `exp`, `sweep` and `search` choose among the others; they have tests of their own."""
    names = {
        group: list(compose.choices(group)) for group in compose.groups() if group not in ("exp", "sweep", "search")
    }
    for turn in range(max(map(len, names.values()))):
        chosen = {group: those[turn % len(those)] for group, those in names.items()}
        words = [*(f"{group}={name}" for group, name in chosen.items()), "data.path=x.jsonl", "data.labels=[a,b]"]
        config = compose.compose([*words, *(["+data.columns={text:a}"] if chosen["data"] == "hub" else [])])
        for group in names:
            kinds = schema.SCHEMAS[group]
            cls = kinds.get("*") or kinds[config[group]["kind"]]
            cls(**config[group])


def test_the_command_line_beats_the_experiment() -> None:
    assert compose.compose(["+exp=lorafa_minilm", "train.steps=7"])["train"]["steps"] == 7


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("+exp=lorafa_minlm", ["exp=lorafa_minlm", "lorafa_minilm"]),
        ("exp=lorafa_minilm", ["+exp"]),
        ("train.stpes=3", ["train.stpes", "train.steps"]),
        ("+train.stpes=3", ["train.stpes", "steps"]),
        ("modl=llama_tiny", ["modl", "model"]),
        ("model=lama_tiny", ["model=lama_tiny", "llama_tiny"]),
        ("train.steps=abc", ["train.steps=abc", "integer"]),
        ("method.r=8", ["method.r"]),
        ("train.schedule=cosin", ["train.schedule=cosin", "cosine"]),
        ("train.micro_batch=3", ["train.global_batch=8"]),
        ("data=jsonl", ["data.path"]),
        ("data=jsonl data.path=nowhere.jsonl", ["nowhere.jsonl"]),
        ("model.weights=run:pretrain_llama_6m", ["python -m llmsys +exp=pretrain_llama_6m"]),
        ("model.weights=run:nothing", ["run:nothing", "pretrain_llama_6m"]),
        ("model.weights=./nowhere", ["model.weights", "no such folder"]),
        ("dispatch.timeout_s=inf", ["dispatch.timeout_s=inf", "finite"]),
        ("train.lr_scale=nan", ["train.lr_scale=nan", "finite"]),
        ("name=../elsewhere", ["name=../elsewhere"]),
        ("task.kind=trian", ["task.kind=trian", "train"]),
        ("dispatch=inline dispatch.memory_gib=1", ["dispatch.memory_gib", "dispatch=process"]),
        ("model.weights=package:a.b", ["model.weights=package:a.b"]),
        ("train.threads=100000", ["train.threads=100000"]),
        ("train.lr_by_method.full=-1", ["train.lr_by_method.full=-1"]),
        ("train.seed=99999999999", ["train.seed"]),
        ("name=null", ["name"]),
        ("results=", ["results"]),
        ("model.weights=package:os", ["safetensors"]),
        ("train.steps=[1,2", ["train.steps=[1,2", "quotes"]),
        ("~model", ["model"]),
        ("+exp=", ["exp"]),
        ("train.world=2 train.global_batch=16", ["train.world=2", "engine=local"]),
        ("engine=ddp engine.zero=2", ["engine.zero", "engine.kind=deepspeed"]),
        ("engine=deepspeed engine.zero=5", ["engine.zero=5"]),
        ("engine=zero2 engine.offload=optimizer+params", ["engine.offload", "engine.zero=3"]),
        ("engine=tp model=gpt2_tiny train.world=2", ["engine.kind=tp", "llama"]),
        ("engine=ddp train.world=2 train.micro_batch=4 dispatch=inline", ["train.world=2", "dispatch=process"]),
        ("model.quant=nf4 model=gpt2_tiny", ["model.quant=nf4", "Conv1D"]),
        ("model.quant=nf4 engine=tp", ["model.quant=nf4", "engine=tp"]),
        ("techniques=F+Y", ["techniques=F+Y", "Y is no technique"]),
        ("techniques=R model.attention=sdpa", ["model.attention=sdpa", "techniques=F+R"]),
        ("train.optimizer=adam8", ["train.optimizer=adam8", "adamw_8bit"]),
        ("train.optimizer=adamw_8bit engine=zero2_offload", ["train.optimizer=adamw_8bit", "engine.offload"]),
        ("train.fp8=true method=lorafa", ["train.fp8=true", "lorafa_peft"]),
        ("model=resnet_tiny data=digits method=lora_peft", ["method.kind=lora_peft", "resnet_tiny"]),
        ("network.up_mbit=20", ["network.down_mbit"]),
        ("train.resume=nowhere", ["train.resume=nowhere", "results/"]),
        ("train.resume=''", ["train.resume"]),
        ("hardware.name=foo", ["hardware.name=foo", "rtx3090"]),
        ("results=/proc/foo", ["results=/proc/foo"]),
        ("data=glue_sst2 model=bert_tiny", ["glue/sst2", "load_dataset"]),
        ("data=digits", ["data.kind=digits", "llama_tiny"]),
        ("+exp=bench_pretrain smoke=treu", ["smoke=treu", "true or false"]),
        ("+exp=bench_predict hardware=auto", ["hardware.name=auto", "task.speeds"]),
        ("+exp=bench_predict hardware=a800x8 model.config=nowhere", ["model.config=nowhere", "config.json"]),
        ("+exp=bench_advise hardware=a800x8 task.require=[Z9]", ["task.require=Z9", "Z3"]),
        ("+exp=bench_advise hardware=a800x8 task.letters=[F,X]", ["task.letters=X", "QLFA"]),
        ("+exp=bench_advise hardware=a800x8 task.require=[QL]", ["task.require=[QL]", "task.stage=finetune"]),
        ("+exp=bench_advise hardware=a800x8 task.require=[Z2,Z3]", ["task.require=[Z2,Z3]", "one stage of ZeRO"]),
        ("+exp=bench_advise hardware=a800x8 task.require=QL", ["task.require", "must be a list"]),
        ("+exp=bench_advise hardware=a800x8 techniques=F", ["techniques", "task.letters"]),
        ("+exp=bench_advise hardware=a800x8 emit=/proc/foo", ["task.emit=/proc/foo"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(forked: Run, argument: str, words: list[str]) -> None:
    done = forked(*argument.split())
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("llmsys: ")
    for word in words:
        assert word in line


def test_a_typo_in_a_users_own_experiment_is_one_line_too(llmsys: Run, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "mine.yaml").write_text("# @package _global_\nname: mine\ntrain: {stpes: 3}\n")
    done = llmsys("--config-dir", str(tmp_path), "+exp=mine")
    assert done.returncode == 1
    assert "train.stpes" in done.stderr
    assert "train.steps" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_help_lists_the_experiments_and_imports_neither_torch_nor_hydra() -> None:
    code = (
        "import sys; sys.argv = ['llmsys', '--help']\n"
        "from llmsys.main import main; main()\n"
        "assert not {'torch', 'hydra', 'transformers', 'omegaconf'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for exp, purpose in compose.choices("exp").items():
        assert exp in done.stdout
        assert purpose in done.stdout


def test_the_command_line_imports_no_torch_before_a_run_starts() -> None:
    """Torch takes seconds: composing and checking must not wait for it."""
    code = (
        "import sys; from llmsys import compose, main\n"
        "main.make_jobs([compose.compose(['train.steps=1'])])\n"
        "import llmsys.dispatch, llmsys.results, llmsys.sweep.course, llmsys.sweep.report\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
