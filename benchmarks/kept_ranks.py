"""Runs of several ranks, one after another, in rank processes that are kept: `Ranks` makes runs as `fresh_runs.Runs`.

Fresh ranks import torch and transformers anew, 8 seconds of a core each: with four ranks on two cores 15 of the 45
seconds of a short run. Runs leave nothing behind for the next but a process group, and the record of a run is that of
`python -m llmsys` with the same words (its `dispatch` says nothing of where, and is no part of its id). After a run
that did not end well the ranks are new ones, since one may still be waiting for another.
"""

from __future__ import annotations

import gc
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import fresh_runs
from fresh_runs import Words
from llmsys import runner
from llmsys.comm.place import LOOPBACK, Place, listen
from llmsys.dispatch.child import FOR_THE_CPU

HERE = Path(__file__).parent
AFTERMATH_S = 10.0
"""How long the other ranks may take to end when one has ended badly."""


class Ranks:
    """As many processes as the run has ranks; `expected` runs are to come in all. To be closed."""

    def __init__(self, expected: int = 0) -> None:
        self.progress = fresh_runs.Progress(expected)
        self._ranks: list[subprocess.Popen[str]] = []
        self._size = (0, 0)
        """(ranks, threads of each)."""

    def __call__(self, wanted: Sequence[Words]) -> None:
        """Makes those of `wanted` that are not finished. RuntimeError for the first that did not end as a result, after
        all others; KeyboardInterrupt, also for SIGTERM, after the ranks have been killed."""
        errors = []
        with fresh_runs.stoppable():
            try:
                for words in wanted:
                    if fresh_runs.finished(words) is None:
                        before = time.monotonic()
                        error = self._make(words)
                        record = fresh_runs.finished(words)
                        if error or record is None or record.status != "ok":
                            self.close()
                        if record is None:
                            errors.append(RuntimeError(f"{fresh_runs.job(words).label}: {error}"))
                            print(errors[-1], file=sys.stderr, flush=True)
                        else:
                            self.progress.say(words, record, time.monotonic() - before)
            except BaseException:
                self.close()
                raise
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Ends the ranks; others are started when there is something to do."""
        for rank in self._ranks:
            rank.kill()
            rank.wait()
            for stream in (rank.stdin, rank.stdout):
                assert stream is not None
                stream.close()
        self._ranks.clear()
        self._size = (0, 0)

    def _make(self, words: Words) -> str:
        """Has one run made by all ranks; what the first one said that did not end well."""
        train = fresh_runs.job(words).config["train"]
        if (train["world"], train["threads"]) != self._size:
            self.close()
            self._start(train["world"], train["threads"])
        _tell(self._ranks, words)
        waiting = {_output(rank): number for number, rank in enumerate(self._ranks)}
        fault = ""
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], AFTERMATH_S if fault else None)
            if not ready:
                break
            for stream in ready:
                number, line = waiting.pop(stream), stream.readline()
                status, error = json.loads(line) if line else ("ended", f"with {self._ranks[number].wait()}")
                if status != "ok" and not fault:
                    fault = f"rank {number}: {status}: {error}"
        return fault

    def _start(self, world: int, threads: int) -> None:
        self._size = (world, threads)
        search = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        env = {**FOR_THE_CPU, **os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": str(threads)}
        for rank in range(world):
            self._ranks.append(
                subprocess.Popen(
                    [sys.executable, __file__, str(rank), str(world)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=env,
                    start_new_session=True,  # a terminal's Ctrl-C is for us
                )
            )
        store = json.loads(_output(self._ranks[0]).readline())
        _tell(self._ranks[1:], store)


def _output(rank: subprocess.Popen[str]) -> IO[str]:
    assert rank.stdout is not None
    return rank.stdout


def _tell(ranks: Sequence[subprocess.Popen[str]], message: Any) -> None:
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write(json.dumps(message) + "\n")
        rank.stdin.flush()


def main() -> None:
    """One rank: makes its part of run after run, until its input ends."""
    import torch

    from llmsys.comm.group import group

    rank, world = int(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    if rank == 0:
        listener, port = listen(LOOPBACK)
        say([LOOPBACK, port])
        place = Place(rank=rank, world=world, store=(LOOPBACK, port), listener=listener)
    else:
        host, port = json.loads(sys.stdin.readline())
        place = Place(rank=rank, world=world, store=(host, port))
    with group(place, torch.device("cpu")):
        for line in sys.stdin:
            record = runner.run(fresh_runs.job(tuple(json.loads(line))), place=place)
            gc.collect()
            say([record.status, record.error])


if __name__ == "__main__":
    main()
