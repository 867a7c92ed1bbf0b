"""What each provider has done is exactly what was committed, whatever happens on the way, and whoever counts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decentral_harness import traced
from decentral_running import MICRO_BATCHES, Storm, advance, job, losses, machines, together, training, undisturbed

from llmsys.decentral.__main__ import main
from llmsys.decentral.chain import Chain, chain
from llmsys.decentral.contributions import FILE, MIB, Account, Accounts, contributions
from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.cost import Workload
from llmsys.decentral.event_log import EventLog, read
from llmsys.decentral.events import Began, Committed, Event, Joined, Left, Lost, Planned
from llmsys.decentral.ledger import ledger
from llmsys.decentral.local import Local
from llmsys.decentral.order import Pipeline
from llmsys.decentral.plan import Plan
from llmsys.decentral.score import Score
from llmsys.decentral.traffic import Traffic
from llmsys.job import Record

Noted = list[tuple[Event, Mapping[str, Any]]]
STEPS = 6


def small() -> Chain:
    """Four operators of 1, 2, 4 and 8 GFLOP."""
    zeros = np.zeros(4)
    return Chain(
        names=("a", "b", "c", "d"),
        work=np.array([1e9, 2e9, 4e9, 8e9]),
        weights=zeros,
        saved=zeros,
        ahead=np.zeros(5),
        back=np.zeros(5),
    )


def planned(at_s: float, epoch: int, order: tuple[int, ...], cuts: tuple[int, ...], count: int = 5) -> Planned:
    score = Score(shares=(count,), step_s=1.0, sync_s=0.0)
    made = Plan(pipelines=(Pipeline(order, cuts, 1.0),), spares=(), score=score)
    return Planned(at_s=at_s, epoch=epoch, plan=made)


def step(at_s: float, epoch: int, number: int) -> Noted:
    began = Began(at_s=at_s, epoch=epoch, step=number)
    return [(began, {}), (Committed(at_s=at_s + 1, epoch=epoch, step=number), {})]


def eventful() -> Noted:
    """Steps 1 and 2 by p0 and p1; p1 is killed in the third, which p0 and p2 then do; p0 says that it goes."""
    p0, p1, p2 = machines(1.0, 3)
    return [
        (Joined(at_s=0.0, provider=p0), {"life": "0"}),
        (Joined(at_s=1.0, provider=p1), {"life": "1"}),
        (planned(2.0, 1, (1, 0), (0, 3, 4)), {}),
        *step(3.0, 1, 1),
        *step(5.0, 1, 2),
        (Began(at_s=7.0, epoch=1, step=3), {"bytes": {"p0": [2 * MIB, 0], "p1": [0, MIB]}}),
        (Joined(at_s=7.5, provider=p2), {"life": "2"}),
        (Lost(at_s=8.0, name="p1"), {}),
        (planned(8.0, 2, (0, 2), (0, 1, 4)), {}),
        *step(9.0, 2, 3),
        (Left(at_s=12.0, name="p0"), {}),
    ]


def test_numbers_by_hand() -> None:
    """Of 15 GFLOP forward, three times as much with the backward pass, of five micro-batches."""
    found = contributions(eventful(), small(), Workload(micro_batches=5)).by_name
    twice = {"forward": 10, "backward": 10, "updates": 2, "given_up": 1}
    assert found["p1"] == Account(
        **twice, flops=2 * 3 * 5 * 7e9, stages=found["p1"].stages, copies_bytes=MIB, present_s=7.0
    )
    assert found["p1"].stages == {0: 2}
    assert found["p0"] == Account(
        **{**twice, "forward": 15, "backward": 15, "updates": 3},
        flops=2 * 3 * 5 * 8e9 + 3 * 5 * 1e9,
        stages=found["p0"].stages,
        sent_bytes=2 * MIB,
        present_s=12.0,
    )
    assert found["p0"].stages == {1: 2, 0: 1}
    assert found["p2"] == Account(
        forward=5, backward=5, updates=1, flops=3 * 5 * 14e9, stages=found["p2"].stages, present_s=4.5
    )
    assert sum(each.flops for each in found.values()) == 3 * 3 * 5 * 15e9


def test_shares_are_of_flops_and_sum_to_one() -> None:
    made = Accounts(small(), Workload(micro_batches=5))
    for event, more in eventful()[:3]:
        made.note(event, more)
    assert made.shares() == {"p0": 0.0, "p1": 0.0}  # nothing is committed
    for event, more in eventful()[3:]:
        made.note(event, more)
    assert made.shares()["p1"] == 210 / 675
    assert sum(made.shares().values()) == pytest.approx(1, abs=1e-15)


def test_generation_has_no_backward_pass_and_no_update() -> None:
    found = contributions(eventful(), small(), Workload(train=False, micro_batches=5)).by_name["p2"]
    assert (found.forward, found.backward, found.updates, found.flops) == (5, 0, 0, 5 * 14e9)


def test_one_that_comes_again_goes_on_where_it_was_and_replicas_have_their_shares() -> None:
    p0, p1 = machines(1.0, 2)
    plan = Plan(
        pipelines=(Pipeline((1,), (0, 4), 1.0), Pipeline((0,), (0, 4), 1.0)),
        spares=(),
        score=Score(shares=(3, 2), step_s=1.0, sync_s=0.0),
    )
    noted: Noted = [
        (Joined(at_s=0.0, provider=p0), {}),
        (Lost(at_s=10.0, name="p0"), {}),
        (Joined(at_s=20.0, provider=p1), {}),
        (Joined(at_s=30.0, provider=p0), {}),
        (Planned(at_s=31.0, epoch=1, plan=plan), {}),
        *step(32.0, 1, 1),
    ]
    found = contributions(noted, small(), Workload(micro_batches=5)).by_name
    assert (found["p0"].forward, found["p0"].present_s) == (2, 13.0)
    assert (found["p1"].forward, found["p1"].present_s) == (3, 13.0)


def test_bytes_of_a_step_that_is_given_up_are_nobodys() -> None:
    made, names = Traffic(), frozenset({"p0", "p1"})
    copy = {"sender": "p0", "to": "p1", "kind": "state", "body": {"keep": [1, 0]}}
    ahead = {"sender": "p0", "to": "p1", "kind": "ahead", "body": {}}
    made.passed(copy, 7)
    assert made.taken(Joined(at_s=0.0, provider=machines(1.0, 1)[0]), names) == {}  # not yet
    assert made.taken(Began(at_s=1.0, epoch=1, step=1), names) == {"p0": [7, 0], "p1": [0, 7]}
    made.passed(ahead, 5)
    assert made.taken(planned(2.0, 2, (0,), (0, 4)), names) == {}
    made.passed(copy, 3)
    assert made.taken(planned(3.0, 3, (0,), (0, 4)), names) == {"p0": [3, 0], "p1": [0, 3]}  # state, between two steps
    assert made.taken(Began(at_s=4.0, epoch=3, step=1), names) == {}
    made.passed({**ahead, "sender": "somebody"}, 5)
    assert made.taken(Committed(at_s=5.0, epoch=3, step=1), names) == {}


def whole(steps: int) -> float:
    """FLOPs of the model, of so many steps."""
    return 3 * MICRO_BATCHES * steps * sum(node.flops for node in traced("llama").graph.operators)


@pytest.mark.parametrize("seed", range(4))
def test_in_storms_all_together_have_done_the_models_flops_for_each_committed_step(seed: int) -> None:
    noted: Noted = []
    storm = Storm(seed, STEPS, least=3)
    note = lambda event, more: noted.append((event, dict(more)))  # noqa: E731
    local = together("llama", 5, 2, STEPS, storm, note, copy_every=2)
    local.run()
    assert storm.happened
    own = local.coordinator.accounts
    assert sum(each.flops for each in own.by_name.values()) == whole(STEPS)
    assert sum(each.updates for each in own.by_name.values()) >= 2 * STEPS
    assert bool(local.coordinator.again) == any(each.given_up for each in own.by_name.values())
    again = contributions(noted, chain(traced("llama").graph), Workload(micro_batches=MICRO_BATCHES))
    assert again.by_name == own.by_name
    assert min(each.sent_bytes for each in own.by_name.values() if each.forward) > 0


@pytest.mark.parametrize("at", [2, 4])
def test_a_broker_that_is_rebuilt_counts_on(tmp_path: Path, at: int) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    local = together("llama", 3, 2, STEPS, note=log.note)
    advance(local, at)
    log.close()
    before = local.coordinator.accounts
    again = Coordinator(job("llama"), training("llama", STEPS))
    again.rebuild(read(path), local.now)
    assert again.accounts.by_name == before.by_name
    log = EventLog(path)
    again.journal.note = log.note
    local.rebuilt(again)
    local.run()
    log.close()
    assert sum(each.flops for each in again.accounts.by_name.values()) == whole(STEPS)
    own = contributions(read(path), again.state.job.chain, again.state.job.work)
    assert own.to_json() == again.accounts.to_json()


def named(name: str, steps: int) -> Coordinator:
    return Coordinator(dataclasses.replace(job("llama"), name=name), training("llama", steps))


@pytest.mark.parametrize("after", [1, 3])
def test_who_comes_from_a_job_that_broke_off_brings_nothing_of_it_into_the_next(after: int) -> None:
    """Same model, same providers with the same stages, another broker: their epoch is later than its own, and what they
    hold is of other steps."""
    local: Local = together("llama", 3, 2, STEPS)
    first = named("first", STEPS)
    local.rebuilt(first)
    advance(local, after)
    second = named("second", STEPS)
    local.rebuilt(second)
    local.run()
    assert losses(local) == undisturbed("llama", STEPS)
    assert second.happened["Committed"] == STEPS
    assert second.restarts.astray == 0


def test_a_ledger_sums_finished_runs_each_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = contributions(eventful(), small(), Workload(micro_batches=5)).to_json()
    for at, status in enumerate(("ok", "failed", "ok")):
        run = tmp_path / f"run{at}"
        run.mkdir()
        Record(name="x", run_id=str(at), task="decentral_train", status=status).write(run)
        (run / FILE).write_text(json.dumps(made if at < 2 else {"p2": made["p2"]}))
    found = ledger([tmp_path, tmp_path / "run0"])
    assert [Path(run).name for run in found["runs"]] == ["run0", "run2"]
    assert list(found["providers"]) == ["p2", "p0", "p1"]
    assert found["providers"]["p2"]["tflop"] == 2 * made["p2"]["tflop"]
    assert (found["providers"]["p2"]["jobs"], found["providers"]["p0"]["jobs"]) == (2, 1)
    assert found["providers"]["p2"]["share"] == pytest.approx(2 * 210 / (675 + 210))
    assert main(["ledger", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main(["ledger", str(tmp_path)]) == 0
    assert "47.46" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"), [(None, "no finished run"), ("[]", "AttributeError"), ('{"p": {"tflop": "x"}}', "tflop=x")]
)
def test_a_ledger_of_what_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, said: str
) -> None:
    if text is not None:
        Record(name="x", run_id="0", task="decentral_train", status="ok").write(tmp_path)
        (tmp_path / FILE).write_text(text)
    assert main(["ledger", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
