"""Claims about what a person sees: a bar where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from llmsys import compose, job
from llmsys.dispatch.show import Show
from llmsys.job import Record

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


def test_of_several_runs_at_once_each_has_a_line_of_its_own(results: Path) -> None:
    """And when one ends, what is said of it names which it was."""
    jobs = [job.make(compose.compose([f"results={results}", f"train.seed={seed}"])) for seed in (0, 1)]
    seen = io.StringIO()
    show = Show(Console(file=seen, force_terminal=True, width=120, soft_wrap=True))
    for number, each in enumerate(jobs, 1):
        show.start(each, number, 2)
        show.progress(each, {"step": 3, "steps": 10, "loss": float(number), "phase": "train"})
    show._bars.refresh()  # type: ignore[union-attr]
    drawn = seen.getvalue()
    assert "[1/2] train" in drawn
    assert "loss 1.000" in drawn
    assert "[2/2] train" in drawn
    assert "loss 2.000" in drawn
    show.stop(jobs[0])
    record = Record.begin(jobs[0])
    show.end(jobs[0], record, 1, 2)
    assert "[1/2] crashed (unfinished)" in seen.getvalue()
    show.stop(jobs[1])
    assert show._bars is None


@pytest.mark.slow
def test_a_file_gets_no_bar(llmsys: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = llmsys(*SHORT)
    assert done.returncode == 0
    assert "tokens/s" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 2, "the run's start and its end"
