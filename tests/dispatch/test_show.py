"""Claims about what a person sees: a bar where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SHORT = ("train.steps=40", "train.length=32", "data.num_examples=40", "train.threads=1", "profile.warmup=1")


def test_a_terminal_sees_loss_speed_and_time_left(results: Path) -> None:
    terminal, theirs = pty.openpty()
    env = {**os.environ, "LLMSYS_RESULTS": str(results), "TERM": "xterm", "COLUMNS": "160"}
    command = [sys.executable, "-m", "llmsys", *SHORT]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=theirs) as run:
        os.close(theirs)
        seen = b""
        while True:
            try:
                chunk = os.read(terminal, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not chunk:
                break
            seen += chunk
        os.close(terminal)
        assert run.wait() == 0
    for words in (b"loss ", b"tokens/s", b"0:00:0"):
        assert words in seen, words


@pytest.mark.slow
def test_a_file_gets_no_bar(llmsys: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = llmsys(*SHORT)
    assert done.returncode == 0
    assert "tokens/s" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 2, "the run's start and its end"
