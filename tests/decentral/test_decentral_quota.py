"""A provider gives what it said that it would give, and then goes as anybody who says that it goes."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from decentral_running import job, losses_of, machines, mem_gib, together, training, undisturbed

from llmsys.decentral.__main__ import main
from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.processes import Processes
from llmsys.decentral.quota import GIB, Meter, Quota, Watch, read
from llmsys.decentral.serve import Serving

TOKEN = "for this test"


@pytest.mark.parametrize(
    ("quota", "used", "said"),
    [
        (Quota(), Meter(2**60, 1e9, 1e30), ""),
        (Quota(gib=2), Meter(int(1.79 * GIB)), ""),
        (Quota(gib=2), Meter(int(1.81 * GIB)), "1.81 of 2 GiB of traffic"),  # handing over is traffic, too
        (Quota(hours=1.5), Meter(0, 5399.0), ""),
        (Quota(hours=1.5), Meter(0, 5400.0), "1.5 of 1.5 hours"),
        (Quota(hours=1, tflop=3), Meter(0, 3600.0, 4e12), "1 of 1 hours, 4 of 3 TFLOP"),
    ],
)
def test_when_a_quota_is_reached(quota: Quota, used: Meter, said: str) -> None:
    assert quota.reached(used) == said


def test_hours_are_those_with_a_broker() -> None:
    made = Meter(seconds=10.0)
    assert made.seconds == 10.0
    made.here()
    begin = time.monotonic()
    while time.monotonic() < begin + 0.02:
        assert made.seconds >= 10.0
    made.away()
    found = made.seconds
    assert found >= 10.02
    made.away()
    assert made.seconds == found


def test_a_file_counts_on_from_life_to_life_until_it_is_used_up(tmp_path: Path) -> None:
    path, quota = tmp_path / "quota.json", Quota(tflop=3)
    for life in range(3):
        watch = Watch(quota, path)
        assert watch.meter.flops == life * 1e12
        watch.meter.flops += 1e12
        watch.meter.nbytes += 5
        watch.write()
    assert read(path).nbytes == 15
    with pytest.raises(ValueError, match="the quota is used up: 3 of 3 TFLOP"):
        Watch(quota, path)
    assert Watch(Quota(tflop=4), path).meter.flops == 3e12  # who gives more may


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("", ["--quota-gib", "-1"], "--quota-gib -1.0: must be positive"),
        ("", ["--quota-hours", "nan"], "--quota-hours nan: must be positive"),
        ("{}", [], "quota.json: is none: KeyError: 'nbytes'"),
        ('{"nbytes": -1, "seconds": 0, "flops": 0}', [], "must be 0 or more"),
        ('{"nbytes": 2147483648, "seconds": 0, "flops": 0}', ["--quota-gib", "2"], "is used up: 2 of 2 GiB of traffic"),
    ],
)
def test_a_mistake_or_nothing_left_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: list[str], said: str
) -> None:
    """Before anything is dialled."""
    path = tmp_path / "quota.json"
    if text:
        path.write_text(text)
    (tmp_path / "token").write_text(TOKEN)
    own = ["--join", "127.0.0.1:1", "--token-file", str(tmp_path / "token"), "--tflops", "1", "--mem-gib", "1"]
    assert main(["provider", *own, "--quota-file", str(path), *words]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_a_file_that_cannot_be_written_any_more_is_said_once_and_the_quota_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its disk is gone, with the folder."""
    monkeypatch.setattr("llmsys.decentral.quota.LOOK_S", 1e-3)
    monkeypatch.setattr("llmsys.decentral.quota.WRITE_S", 0.0)
    folder, left, tried = tmp_path / "disk", threading.Event(), threading.Semaphore(0)
    folder.mkdir()
    watch = Watch(Quota(tflop=3), folder / "quota.json")
    write = watch.write

    def writing() -> None:
        tried.release()
        write()

    watch.write = writing  # type: ignore[method-assign]
    shutil.rmtree(folder)
    watch.begin(lambda what: left.set())
    for _ in range(3):
        assert tried.acquire(timeout=20)
    watch.meter.flops += 3e12
    assert left.wait(20)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"llmsys.decentral: --quota-file {folder / 'quota.json'}: No such file or directory; ")


def test_flops_by_its_own_count_are_those_that_it_is_credited_with() -> None:
    """Where nothing is done in vain."""
    local = together("llama", 3, 2, 4)
    own = {name: each.counters for name, each in local.providers.items()}
    local.run()
    accounts = local.coordinator.accounts.by_name
    assert {name: each.flops for name, each in own.items()} == {name: each.flops for name, each in accounts.items()}
    assert sum(each.flops for each in own.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("quota", [["--quota-gib", "0.02"], ["--quota-tflop", "1e-4"]])
def test_a_quota_that_is_used_up_in_the_middle_costs_no_step(tmp_path: Path, quota: list[str]) -> None:
    coordinator = Coordinator(job("llama"), training("llama", 100_000))  # cut short once it has gone
    own = machines(mem_gib("llama", 2), 3)
    path = tmp_path / "quota.json"
    hit = own[-1].name

    async def serve() -> None:
        with Processes(tmp_path / "providers", TOKEN) as processes:

            def ready(port: int) -> None:
                for each in own:
                    more = [*quota, f"--quota-file={path}"] if each.name == hit else []
                    processes.start(each, f"127.0.0.1:{port}", more=more)

            def committed(step: int) -> None:
                assert step > 1 or hit in coordinator.owners
                if coordinator.happened["Left"] and coordinator.training.steps == 100_000:
                    object.__setattr__(coordinator.training, "steps", step + 3)

            await asyncio.wait_for(Serving(coordinator, TOKEN, committed).run(ready=ready), 60)
        assert {each.returncode for each in processes.processes.values()} == {0}

    asyncio.run(serve())
    found = losses_of(coordinator)
    assert found == undisturbed("llama", len(found))
    assert coordinator.again == 0
    assert coordinator.happened["Left"] == 1
    assert hit not in coordinator.owners
    said = (tmp_path / "providers" / f"{hit}.log").read_text().strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("llmsys.decentral: the quota is used up: ")
    used = json.loads(path.read_text())
    assert Quota(gib=0.02, tflop=1e-4).reached(Meter(**used))
    if quota[0] == "--quota-gib":  # what was handed over counted
        assert 0.9 * 0.02 <= used["nbytes"] / GIB <= 1.1 * 0.02
