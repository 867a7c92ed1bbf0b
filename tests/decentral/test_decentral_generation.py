"""Generation by the same protocol: whatever happens to providers, the text is the whole model's."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from decentral_broker import rebuilt, story
from decentral_harness import model
from decentral_running import Storm, generating, hold, machines

from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.generation import Generation
from llmsys.decentral.local import Local
from llmsys.decentral.noise import Noise
from llmsys.decentral.planes import plane_of
from llmsys.decentral.processes import Processes
from llmsys.decentral.status import status
from llmsys.decentral.training import Update
from llmsys.decentral.wire import decode, header

LENGTH, NEW = 24, 10
PROMPTS = [[[5, 9, 3, 17, 40], [6, 2]], [[33, 8, 21], [50, 4, 4, 7]], [[11], [60, 61, 62]]]


def generation(temperature: float = 0.0) -> Generation:
    return Generation(prompts=PROMPTS, new=NEW, length=LENGTH, vocabulary=64, temperature=temperature, seed=1)


def together(
    planes: tuple[str, ...],
    stages: int,
    own: Generation,
    watch: Callable[[Local, str, str, int], None] | None = None,
    family: str = "llama",
    *,
    compress: str = "none",
    noise: Noise | None = None,
) -> Local:
    job, training = generating(own, family, compress=compress, noise=noise)
    local = Local(Coordinator(job, training), watch)
    own.updates = local.coordinator.updates
    mem_gib = hold(job.chain, job.work, stages)
    for machine, plane in zip(machines(mem_gib, len(planes)), planes, strict=True):
        local.join(dataclasses.replace(machine, plane=plane), plane_of(plane))
    return local


@functools.cache
def alone(family: str = "llama") -> list[list[list[int]]]:
    """By the whole model, without a cache, one prompt after the other."""
    own = model(family).eval()

    def text(row: list[int]) -> list[int]:
        tokens = torch.tensor([row])
        for _ in range(NEW):
            tokens = torch.cat([tokens, own(input_ids=tokens).logits[:, -1:].argmax(dim=-1)], dim=1)
        return tokens[0, len(row) :].tolist()

    with torch.no_grad():
        return [[text(row) for row in stream] for stream in PROMPTS]


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_prompts_of_unequal_lengths_are_gone_on_with_as_by_the_whole_model(family: str) -> None:
    own = generation()
    together(("torch",) * 3, 2, own, family=family).run()
    assert own.texts() == alone(family)


def test_a_job_that_trains_nothing_has_a_status_without_a_loss() -> None:
    local = together(("torch",) * 3, 2, generation())
    while local.coordinator.state.step < 2:
        local.round()
    found = status(local.coordinator, 1.0)
    assert (found["step"], found["loss"]) == (2, None)
    assert {each["role"] for each in found["providers"].values()} <= {"stage", "pool"}


def test_between_two_steps_there_is_one_way_to_providers_and_one_back() -> None:
    """A commit and what begins the next step are said with one breath: nobody says in between that it holds the state,
    as all have to once, in the beginning."""
    local = together(("torch",) * 3, 2, generation())
    said = collections.Counter[str]()

    def carry(to: str, data: bytes) -> tuple[bytes]:
        said[str(header(data)["kind"])] += to == "broker"
        return (data,)

    local.carry = carry
    local.run()
    assert said["held"] == 2
    assert said["prepared"] == 2 * local.coordinator.training.steps


@pytest.mark.parametrize("planes", [("torch",) * 4, pytest.param(("onnx", "torch", "onnx"), marks=pytest.mark.slow)])
def test_one_is_killed_in_mid_stream_and_the_text_is_the_same(planes: tuple[str, ...]) -> None:
    """Its stage's keys and values are computed again from the prefix, by one provider alone."""
    own, killed = generation(), list[str]()

    def watch(local: Local, name: str, what: str, step: int) -> None:
        if step == 9 and not killed and name in local.coordinator.state.owners:
            killed.append(name)
            local.kill(name)

    local = together(planes, 2, own, watch)
    local.run()
    assert killed
    assert killed[0] not in local.coordinator.owners
    assert own.texts() == alone()
    assert local.coordinator.again <= 1


@pytest.mark.parametrize(
    ("compress", "noise"),
    [("int8", None), pytest.param("fp16", Noise(share=2.0, key=3), marks=pytest.mark.slow)],
)
def test_hidden_states_go_compressed_or_with_noise_and_a_kill_changes_nothing(
    compress: str, noise: Noise | None
) -> None:
    """Of generation all weights are frozen, and what they give are hidden states all the same."""
    quiet, hit, sent, killed = generation(), generation(), [0, 0], list[str]()

    def watch(local: Local, name: str, what: str, step: int) -> None:
        if step == 9 and not killed and name == local.coordinator.owners[0]:
            killed.append(name)
            local.kill(name)

    first = together(("torch",) * 4, 3, quiet, compress=compress, noise=noise)
    second = together(("torch",) * 4, 3, hit, watch, compress=compress, noise=noise)
    for local in (first, second):
        local.coordinator.journal.state = local.coordinator.state.with_(
            job=dataclasses.replace(local.coordinator.state.job, reserve=1)
        )

    def carry(to: str, data: bytes) -> list[bytes]:
        if header(data)["kind"] == "ahead":
            found = decode(data).tensors
            sent[0] += sum(each.dtype == {"int8": "int8", "fp16": "float16"}[compress] for each in found.values())
            sent[1] += sum(each.dtype == "float32" and each.shape[-1:] == (32,) for each in found.values())
        return [data]

    first.carry = carry
    for local in (first, second):
        local.run()
    assert sent[0] > 0
    assert sent[1] == 0
    assert killed
    assert hit.texts() == quiet.texts()
    assert (quiet.texts() != alone()) == (noise is not None)


@pytest.mark.parametrize("seed", [0, *(pytest.param(each, marks=pytest.mark.slow) for each in range(1, 4))])
def test_storms_change_no_token_that_is_drawn(seed: int) -> None:
    """Noise is keyed by step and stream: what is done again draws the same."""
    quiet, hit = generation(0.9), generation(0.9)
    together(("torch",) * 4, 2, quiet).run()
    storm = Storm(seed=seed, steps=quiet.steps, least=2)
    together(("torch",) * 4, 2, hit, storm).run()
    assert hit.texts() == quiet.texts() != alone()


def test_noise_is_of_the_distribution_that_makes_a_draw() -> None:
    """arg max (logits + T Gumbel) is a token of softmax (logits / T)."""
    own = Generation(prompts=[[[1]] * 4000], new=1, length=2, vocabulary=3, temperature=2.0)
    logits = torch.tensor([2.0, 0.0, -2.0])
    drawn = (logits + own.noise(1, 0, 4000)).argmax(dim=-1).bincount(minlength=3) / 4000
    assert drawn.tolist() == pytest.approx(torch.softmax(logits / 2.0, dim=0).tolist(), abs=0.03)


def test_what_cannot_be_generated_is_refused() -> None:
    with pytest.raises(ValueError, match="a prompt of 5 tokens and 20 new ones are more"):
        Generation(prompts=PROMPTS, new=20, length=LENGTH, vocabulary=64)
    with pytest.raises(ValueError, match="an empty one"):
        Generation(prompts=[[[]]], new=1, length=4, vocabulary=64)


def test_tokens_that_are_none_are_not_believed() -> None:
    own = together(("torch",), 1, generation()).coordinator.training
    assert own.checked([[1, 2], [3, 4], [5, 63]]) == ((1, 2), (3, 4), (5, 63))
    for wrong in ([[1, 2], [3, 4]], [[1], [3, 4], [5, 6]], [[1, 2], [3, 4], [5, 64]], [[1, 2], [3, 4], [5, True]]):
        with pytest.raises(ValueError, match="results"):
            own.checked(wrong)
    assert Update(rate=0.0, scale=1.0, tokens=((1,),)).tokens == ((1,),)


@pytest.mark.slow
def test_a_broker_that_is_killed_in_mid_stream_goes_on_with_the_same_text(tmp_path: Path) -> None:
    """Tokens are in its log, keys and values with its providers, who dial again."""
    new = 150
    quiet = story(new)
    together(("torch",) * 3, 2, quiet).run()
    job, _ = generating(quiet)
    with Processes(tmp_path / "providers", "story") as processes:

        def start(port: int) -> None:
            for each in machines(hold(job.chain, job.work, 2), 3):
                processes.start(each, f"127.0.0.1:{port}")

        found = rebuilt(tmp_path, "story", "generate", new, start)
        assert all(each.wait(10) == 0 for each in processes.processes.values())
    assert found["texts"] == quiet.texts()
    assert found["again"] <= 1


@pytest.mark.slow
def test_the_experiment_with_a_kill_has_the_text_of_one_without(
    llmsys: Callable[..., subprocess.CompletedProcess[str]], results: Path
) -> None:
    common = ("+exp=decentral_generate", "model.weights=random", "model.num_layers=3", "task.new_tokens=20",
              "data.max_train=40", "data.max_val=2", "train.length=64", "task.temperature=1")  # fmt: skip
    for faults in ("[]", "[stage1 SIGKILL 20]", "[stage0 SIGSTOP 24]"):
        done = llmsys(*common, f"task.faults={faults}")
        assert done.returncode == 0, done.stdout + done.stderr
    texts = [path.read_text() for path in results.glob("decentral_generate/*/generated.jsonl")]
    assert len(texts) == 3
    assert len(set(texts)) == 1
    first = json.loads(texts[0].splitlines()[0])
    assert len(first["tokens"]) == 20
