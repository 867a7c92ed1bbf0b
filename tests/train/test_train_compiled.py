"""A process that is killed while DeepSpeed compiles for it stops nobody after it; torch's own lock would, for ever."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from llmsys.train.engines import compiled

COMPILING = """
import sys
from llmsys.train.engines import compiled
from test_train_compiled import use
def load(lock):
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    print("compiling", flush=True)
    sys.stdin.readline()
    lock.unlink()
use(load)
compiled.load("any")
"""


class Builder:
    """In the place of DeepSpeed's: `load` is told where torch's lock would lie."""

    name = "op"

    def __init__(self, load) -> None:  # type: ignore[no-untyped-def]
        self._load = load

    def create_op_builder(self, name: str) -> Builder:
        return self

    def is_compatible(self, verbose: bool) -> bool:
        return True

    def load(self, verbose: bool) -> None:
        self._load(Path(os.environ[compiled.VARIABLE]) / "op" / "lock")


def use(load) -> None:  # type: ignore[no-untyped-def]
    import deepspeed.accelerator

    deepspeed.accelerator.get_accelerator = lambda: Builder(load)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import deepspeed.accelerator

    monkeypatch.setenv("LLMSYS_CACHE", str(tmp_path))
    monkeypatch.setenv(compiled.VARIABLE, "")  # so that what a test leaves there is taken back
    monkeypatch.delenv(compiled.VARIABLE)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # else DeepSpeed prints which one it found
    monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", deepspeed.accelerator.get_accelerator)
    return tmp_path


@pytest.fixture
def other(place: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is compiling."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", COMPILING]
    with subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "compiling\n"
        yield process
        process.kill()


def taken(lock: Path) -> None:
    """As torch begins; it would wait where this fails."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    baton = FileBaton(str(lock))
    assert baton.try_acquire(), "torch waits for whoever compiles"
    baton.release()


def test_what_a_killed_process_left_is_removed(other: subprocess.Popen[str], caplog: pytest.LogCaptureFixture) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (compiled.folder() / "op" / "lock").exists()
    use(taken)
    with caplog.at_level(logging.INFO, "llmsys"):
        compiled.load("any")
    assert "killed while it compiled" in caplog.text


def test_a_process_that_compiles_is_waited_for(other: subprocess.Popen[str], caplog: pytest.LogCaptureFixture) -> None:
    waits, loaded = threading.Event(), threading.Event()

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waiting for the process" in record.getMessage():
                waits.set()

    def load() -> None:
        compiled.load("any")
        loaded.set()

    use(taken)
    logger, handler = logging.getLogger("llmsys"), Heard()
    logger.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, "llmsys"):
            thread = threading.Thread(target=load)
            thread.start()
            assert waits.wait(30)
            assert not loaded.is_set()
            assert (compiled.folder() / "op" / "lock").exists(), "it is of a living process"
            assert other.stdin is not None
            other.stdin.write("\n")
            other.stdin.flush()
            thread.join(30)
    finally:
        logger.removeHandler(handler)
    assert loaded.is_set()
    assert "killed" not in caplog.text


def test_in_a_folder_of_the_users_nothing_is_removed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.VARIABLE, str(place / "own"))
    lock = place / "own" / "op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    seen = []
    use(lambda lock: seen.append(lock.exists()))
    compiled.load("any")
    assert seen == [True]
