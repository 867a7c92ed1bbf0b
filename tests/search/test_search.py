"""Claims about a search: its trials are ordinary runs, what was tried is not tried again, and one that learns badly is
given up between two steps."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from llmsys import compose
from llmsys.job import Record
from llmsys.search import space

SHORT = ("train.steps=30", "train.length=32", "data.num_examples=40", "train.threads=1", "profile.warmup=1")
RATE = 'search.space=["train.lr_scale=tag(log,interval(0.001,100))"]'
LlmSys = Callable[..., "subprocess.CompletedProcess[str]"]


def records(results: Path) -> list[Record]:
    found = [Record.read(path.parent) for path in results.glob("*/*/record.json")]
    return sorted((each for each in found if each is not None), key=lambda each: each.started)


def test_hydra_s_words_are_optuna_s_distributions() -> None:
    words = ["a.b=interval(0.1,10)", "a.c=tag(log,interval(1e-5,1e-2))", "a.d=int(interval(1,8))"]
    assert space.parse([*words, "a.e=range(10,40,10)", "a.f=choice(1,x,'y z')"]) == {
        "a.b": FloatDistribution(0.1, 10),
        "a.c": FloatDistribution(1e-5, 1e-2, log=True),
        "a.d": IntDistribution(1, 8),
        "a.e": CategoricalDistribution([10, 20, 30]),
        "a.f": CategoricalDistribution([1, "x", "y z"]),
    }


@pytest.mark.parametrize("word", ["a.b=3", "a.b=1,2", "a.b", "b=choice(1,2)", "a.b=interval(2,1)", "a.b=("])
def test_a_word_that_is_no_space_is_named(word: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"search.space: {word!r}")):
        space.parse([word])


@pytest.mark.parametrize("search", list(compose.choices("search")))
def test_a_search_s_file_says_how_it_is_started_and_composes(search: str) -> None:
    text = (compose.CONF / "search" / f"{search}.yaml").read_text()
    found = re.search(rf"# Command: python -m llmsys (\+exp=\w+ \+search={search}[^\[\n]*)", text)
    assert found
    config = compose.compose(found[1].split())
    assert config["search"]["trials"] > 1
    assert space.parse(config["search"]["space"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("search.metric=",), "search.metric: missing"),
        (
            ('search.space=["train.nothing=choice(1,2)"]',),
            "train.nothing: no such setting; there are ",
        ),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                (
                    ('search.space=["train.lr_scal=choice(1,2)"]',),
                    "train.lr_scal: no such setting; did you mean lr_scale",
                ),
                (
                    ("search.pruner=none", "search.sampler=best"),
                    "search.sampler=best: must be one of tpe, random, qmc, cmaes",
                ),
                (("-m", "train.seed=0,1"), "search: is of one run's settings"),
            )
        ),
    ],
)
def test_a_mistake_is_said_before_anything_runs(
    llmsys: LlmSys, results: Path, words: tuple[str, ...], said: str
) -> None:
    done = llmsys(*words, "+search=learning_rate", *SHORT)
    assert done.returncode == 1
    assert said in done.stderr
    assert not records(results)


@pytest.mark.slow
def test_a_metric_that_no_record_has_ends_the_search_with_the_nearest_names(llmsys: LlmSys) -> None:
    done = llmsys("+search=learning_rate", *SHORT, "search.metric=vall_loss", "search.trials=3")
    assert done.returncode == 1
    assert (
        "search.metric=vall_loss: the run is ok, and its record has no such number; did you mean val_loss"
        in done.stderr
    )
    assert "[2/3]" not in done.stderr


@pytest.mark.slow
def test_trials_are_runs_of_which_bad_ones_are_given_up_and_the_next_session_goes_on(
    llmsys: LlmSys, results: Path
) -> None:
    """Random rates over five decades: the median pruner gives up those that learn nothing."""
    steps = ("train.steps=120", "search.sampler=random", "search.startup=2", "search.watch_from=10", RATE)
    done = llmsys("+search=learning_rate", *SHORT, *steps, "search.trials=3")
    assert done.returncode == 0, done.stderr
    first = records(results)
    assert {each.status for each in first} == {"ok", "skipped"}
    pruned = [each for each in first if each.status == "skipped"]
    assert all(each.reason == "pruned" and "search.pruner=median" in each.error for each in pruned)
    best = min((each for each in first if each.status == "ok"), key=lambda each: each.summary["val_loss"])
    assert f"train.lr_scale={best.config['train']['lr_scale']}" in done.stdout.splitlines()[-1]
    assert "search" not in best.config

    done = llmsys("+search=learning_rate", *SHORT, *steps, "search.trials=4")
    assert done.returncode == 0, done.stderr
    assert "[4/4]" in done.stderr
    assert "[3/4]" not in done.stderr
    assert len(records(results)) == 4


@pytest.mark.slow
def test_a_trial_under_way_when_the_search_is_killed_is_begun_again(llmsys: LlmSys, results: Path) -> None:
    words = ("+search=learning_rate", *SHORT, RATE, "search.pruner=none", "search.trials=2", "train.steps=400")
    command = [sys.executable, "-m", "llmsys", *words, "train.checkpoint_every=20"]
    env = {**os.environ, "LLMSYS_RESULTS": str(results)}
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as search:
        while not list(results.glob("*/*/checkpoint/*")):
            assert search.poll() is None
            time.sleep(0.05)
        search.send_signal(signal.SIGKILL)
    (before,) = records(results)
    done = llmsys(*words, "train.checkpoint_every=20")
    assert done.returncode == 0, done.stderr
    after = records(results)
    assert len(after) == 2
    again = next(each for each in after if each.run_id == before.run_id)
    assert (again.status, again.attempts) == ("ok", 2)
    assert again.resumed_from_step


@pytest.mark.slow
def test_the_same_search_twice_at_once_is_refused(llmsys: LlmSys, results: Path) -> None:
    words = ("+search=learning_rate", *SHORT, RATE, "search.pruner=none", "train.steps=100000")
    command = [sys.executable, "-m", "llmsys", *words]
    env = {**os.environ, "LLMSYS_RESULTS": str(results)}
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as search:
        while not list(results.glob("*/*/config.yaml")):
            assert search.poll() is None
            time.sleep(0.05)
        done = llmsys(*words)
        search.send_signal(signal.SIGTERM)
    assert done.returncode == 1
    assert "another process is making it" in done.stderr
