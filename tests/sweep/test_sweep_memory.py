"""Claims about memory between two runs: what the driver says, when it says nothing, and what is waited for.

The driver is a program `nvidia-smi` on PATH that answers, fails or hangs; torch's child is one that prints what torch
would. On a GPU the real ones are held against each other.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from sweep_harness import Machine, configs, course, written

from llmsys.sweep import memory
from llmsys.sweep.memory import Baseline, NotKnown, Reading, read

FAST, SLOW = "11111111-aaaa", "22222222-bbbb"
"""UUIDs of two GPUs: CUDA counts FAST first, the bus SLOW."""
TWO = f"GPU-{SLOW}, 1024, 8192\\nGPU-{FAST}, 2048, 81920\\n"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `nvidia-smi` that keeps its arguments in `asked` and runs what `answer` was told; torch sees no device."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n. {folder}/answer\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setattr(memory, "_ASK", "import sys; sys.exit('torch\\nsees none')")
    monkeypatch.setattr(memory, "_WHICH", f"print('{FAST}'); print('{SLOW}')")
    memory._visible.cache_clear()
    return folder


def answers(driver: Path, shell: str) -> None:
    (driver / "answer").write_text(shell + "\n")


def test_the_driver_says_how_much_is_in_use(driver: Path) -> None:
    answers(driver, f"printf '{TWO}'")
    assert read("cuda") == Reading((1.0, 2.0), (8.0, 80.0))
    (asked,) = (driver / "asked").read_text().splitlines()
    assert "memory.used,memory.total" in asked


def test_the_visible_devices_are_watched_however_they_are_numbered(
    driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Device 0 of CUDA is the fastest; nvidia-smi's is the first on the bus."""
    answers(driver, f"printf '{TWO}'")
    monkeypatch.setattr(memory, "_WHICH", f"print('{FAST}')")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert read("cuda") == Reading((2.0,), (80.0,))
    monkeypatch.setattr(memory, "_WHICH", f"print('{FAST}'); print('{SLOW}')")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert read("cuda") == Reading((2.0, 1.0), (80.0, 8.0))


@pytest.mark.parametrize(
    "shell", ["exit 9", "printf 'GPU-33333333-cccc, 5, 6\\n'", f"printf 'GPU-{FAST}, [N/A], [N/A]\\n'"]
)
def test_where_the_driver_does_not_say_torch_is_asked(
    driver: Path, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    """It fails; it knows other devices alone; it says nothing of a part of a GPU."""
    answers(driver, shell)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(memory, "_ASK", f"print('{FAST},3072.0,4096.0')")
    assert read("cuda") == Reading((3.0,), (4.0,))


def test_without_a_driver_s_program_torch_is_asked(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(driver / "nowhere"))
    monkeypatch.setattr(memory, "_ASK", f"print('{FAST},3072.0,4096.0')")
    assert read("cuda") == Reading((3.0,), (4.0,))


def test_where_neither_says_the_last_line_says_why(driver: Path) -> None:
    answers(driver, "echo 'Failed to initialize NVML' >&2; exit 9")
    with pytest.raises(NotKnown, match=r"in use: torch: sees none$"):
        read("cuda")


def test_a_driver_that_hangs_is_left_alone(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it started is ended too, though that holds its output open."""
    answers(driver, "sleep 600; echo never")
    monkeypatch.setattr(memory, "LOOK_S", 0.3)
    ended: list[subprocess.Popen[bytes]] = []
    end = memory._end
    monkeypatch.setattr(memory, "_end", lambda child: (ended.append(child), end(child)))
    with pytest.raises(NotKnown, match=r"nvidia-smi did not answer in 0\.3 s"):
        read("cuda")
    (child,) = ended
    assert child.returncode == -signal.SIGKILL
    assert not memory._STUCK
    assert not living(child.pid)


def living(group: int) -> list[int]:
    """Processes of a group that have not ended, whether or not somebody has asked how, and do not within 10 s."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its = path.read_text().rpartition(")")[2].split()[:3]
            pid = int(path.parent.name)
            if int(its) == group and state != "Z" and not select.select([os.pidfd_open(pid)], [], [], 10)[0]:
                found.append(pid)
    return found


def asked_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs are on a CPU; what is watched is the GPU."""
    monkeypatch.setattr(memory, "read", lambda kind: read("cuda"))


def test_a_sweep_that_cannot_look_says_how_to_go_without_before_it_runs_anything(
    results: Path, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    asked_of_the_driver(monkeypatch)
    answers(driver, "exit 9")
    with pytest.raises(ValueError, match=r"^sweep\.baseline_gib=1: .*sweep\.baseline_gib=null[^\n]*$"):
        list(course(configs(results, "sweep.baseline_gib=1")).run())
    assert not machine.made
    assert [record.status for _, record in course(configs(results)).run()] == ["ok"]


def test_a_look_that_fails_later_ends_no_sweep_and_is_in_the_record(
    results: Path, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch, lambda config: (answers(driver, "exit 9"), ("ok", ""))[1])
    asked_of_the_driver(monkeypatch)
    answers(driver, f"printf '{TWO}'")
    made = course(configs(results, "sweep.baseline_gib=1", "sweep.baseline_timeout_s=0", train__seed=[0, 1]))
    first, second = (record for _, record in made.run())
    assert (first.status, second.status) == ("ok", "ok")
    assert "sweep" not in first.env
    assert second.env["sweep"]["clean"] is None
    assert "sees none" in second.env["sweep"]["why"]
    assert "not known" in second.notes["baseline"]
    assert {record.run_id: record.notes for record in written(results)}[second.run_id] == second.notes


def test_a_gpu_that_falls_off_the_bus_is_not_known(driver: Path) -> None:
    baseline = Baseline(1.0, 0.0, lambda: read("cuda"))
    answers(driver, f"printf '{TWO}'")
    assert baseline.wait() == {}
    answers(driver, f"printf 'GPU-{FAST}, 2048, 81920\\n'")
    found = baseline.wait()
    assert found["clean"] is None
    assert "1 devices answer" in found["why"]


def test_a_search_begins_at_1_where_the_device_does_not_say(
    results: Path, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch, lambda config: ("oom", "") if config["train"]["micro_batch"] > 5 else ("ok", ""))
    asked_of_the_driver(monkeypatch)
    answers(driver, "exit 9")
    made = course(configs(results, "sweep.search=max", "sweep.search_limit=64"))
    list(made.run())
    assert [found.largest for found in made.found] == [5]


@pytest.mark.gpu
def test_driver_and_torch_mean_the_same_devices() -> None:
    named = subprocess.run(memory._QUERY, capture_output=True, text=True, check=True).stdout
    own = subprocess.run([sys.executable, "-c", memory._WHICH], capture_output=True, text=True, check=True).stdout
    said = memory.parsed(named, own.split())
    assert said is not None
    asked = memory.parsed(memory._said((sys.executable, "-c", memory._ASK)), own.split())
    assert asked is not None
    assert said.total == pytest.approx(asked.total, rel=0.05)


class Device:
    """Memory in use as it goes down second by second, and the clock that goes with it."""

    def __init__(self, *used: float) -> None:
        self.used, self.now = list(used), 0.0

    def look(self) -> Reading:
        return Reading((self.used.pop(0) if len(self.used) > 1 else self.used[0],), (80.0,))

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("used", "expected"),
    [
        ((1.0, 1.2), {}),
        ((1.0, 30.0, 30.0, 1.0), {"clean": True, "over_baseline_gib": 0.0, "waited_s": 2.0}),
        ((1.0, 30.0), {"clean": False, "over_baseline_gib": 29.0, "waited_s": 5.0}),
    ],
)
def test_the_next_run_waits_until_memory_is_back_but_not_for_ever(
    used: tuple[float, ...], expected: dict[str, float]
) -> None:
    machine = Device(*used)
    baseline = Baseline(0.5, 5.0, machine.look, lambda: machine.now, machine.sleep)
    assert baseline.wait() == {}, "the first look is the baseline"
    assert baseline.wait() == expected


SETTINGS = ("sweep.baseline_gib=1", "sweep.baseline_timeout_s=0", "sweep.prune=true")


def held(monkeypatch: pytest.MonkeyPatch, *gib: float) -> None:
    """How much is in use at each look."""
    readings = iter(gib)
    monkeypatch.setattr(memory, "read", lambda kind: Reading((next(readings),), (80.0,)))


def test_beside_what_holds_the_gpu_nothing_is_run_and_the_next_start_runs_it(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    wanted = configs(results, *SETTINGS, train__micro_batch=[1, 2, 4])
    held(monkeypatch, 1.0, 40.0, 1.0)
    made = course(wanted)
    made._kind = "cuda"
    found = [record for _, record in made.run()]
    assert [(r.status, r.reason) for r in found] == [("ok", ""), ("skipped", "baseline"), ("ok", "")]
    assert "39.00 GiB more in use" in found[1].error
    assert found[1].env["sweep"]["clean"] is False
    assert [config["train"]["micro_batch"] for config in machine.made] == [1, 4]
    held(monkeypatch, 40.0)
    again = course(wanted)
    assert [record.status for _, record in again.run()] == ["ok"] * 3
    assert [config["train"]["micro_batch"] for config in machine.made] == [1, 4, 2]


@pytest.mark.parametrize("clean", [True, False])
def test_out_of_a_host_s_memory_that_others_held_is_no_witness_and_not_final(
    results: Path, monkeypatch: pytest.MonkeyPatch, clean: bool
) -> None:
    """On a CPU the run is made, for the memory of a host is everybody's; but then it says little of itself."""
    machine = Machine(monkeypatch, lambda config: ("oom" if config["train"]["micro_batch"] > 1 else "ok", ""))
    wanted = configs(results, *SETTINGS, train__micro_batch=[1, 2, 4])
    held(monkeypatch, 1.0, *([1.0] * 2 if clean else [40.0] * 2))
    found = [record for _, record in course(wanted).run()]
    assert [record.status for record in found] == ["ok", "oom", "skipped" if clean else "oom"]
    assert ("baseline" in found[1].notes) != clean
    runs = len(machine.made)
    machine.ends = lambda config: ("ok", "")
    held(monkeypatch, *[1.0] * 3)
    later = course(wanted)
    ended = ["ok", "oom", "skipped"] if clean else ["ok"] * 3
    assert [record.status for _, record in later.run()] == ended, "neither here nor of what an earlier sweep left"
    assert len(machine.made) - runs == (0 if clean else 2)


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        (TWO.replace("\\n", "\n"), Reading((1.0, 2.0), (8.0, 80.0))),
        (f"GPU-{FAST}, [N/A], [N/A]\n", None),
        ("No devices were found\n", None),
        ("", None),
    ],
)
def test_what_the_driver_prints_is_read_or_not_believed(printed: str, expected: Reading | None) -> None:
    assert memory.parsed(printed) == expected


def test_this_host_says_how_much_memory_is_in_use() -> None:
    reading = read("cpu")
    assert 0 < reading.used[0] < reading.total[0]
