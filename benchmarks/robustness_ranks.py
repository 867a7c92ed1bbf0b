"""Ranks of one check: fresh processes on gloo, a deadline, and how it ended.

    passes        every rank's check returned
    wrong, ...    a rank's claim does not hold (`robustness_cells.Broken`)
    raises        an exception of the subject or of torch
    aborts        a process ended by a signal
    hangs         not over at the deadline; `what` is where the threads of rank 0 stood

The processes are killed by their own ids.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

START_S, GRACE_S = 180.0, 5.0
"""How long ranks may take until their group is there; and, after one has ended badly, to say how they ended."""
PASSES, RAISES, ABORTS, HANGS = "passes", "raises", "aborts", "hangs"


@dataclass(frozen=True)
class Outcome:
    """`what`: one line, empty where it passes. `by_hand`: what was done in place of a way that there is not."""

    how: str
    what: str = ""
    by_hand: str = ""
    numbers: dict[str, float] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value}


def check(cell: str, subject: str, folder: Path, deadline_s: float) -> Outcome:
    """Runs the phases of a cell one after the other, each in a group of its own."""
    import robustness_cells as cells

    outcome = Outcome(PASSES)
    for phase, world in enumerate(cells.CELLS[cell].worlds):
        outcome = Group(cell, subject, folder, phase, world).outcome(deadline_s)
        if outcome.how != PASSES:
            break
    return outcome


class Group:
    """`world` processes that run one phase of a cell."""

    def __init__(self, cell: str, subject: str, folder: Path, phase: int, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.logs = [folder / f"stderr-{phase}-{rank}.txt" for rank in range(world)]
        self.pipes: list[Any] = []
        self.ranks = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (cell, subject, str(folder), phase, rank, world, theirs)
            process = context.Process(target=rank_main, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.ranks.append(process)

    def outcome(self, deadline_s: float) -> Outcome:
        try:
            return self._outcome(deadline_s)
        finally:
            for process, pipe in zip(self.ranks, self.pipes, strict=True):
                if process.is_alive():
                    process.kill()
                process.join()
                pipe.close()

    def _outcome(self, deadline_s: float) -> Outcome:
        until = time.monotonic() + START_S
        port = self._hear([0], until)[0][1]
        for pipe in self.pipes[1:]:
            pipe.send(port)
        for word in self._hear(range(len(self.ranks)), until):
            assert word[0] == "ready", f"the group of ranks was not made: {word}"
        ended = self._hear(range(len(self.ranks)), time.monotonic() + deadline_s)
        bad = [word for word in ended if word[0] != PASSES]
        if not bad:
            return Outcome(PASSES, by_hand=ended[0][2], numbers=ended[0][1])
        how, what, *_ = min(bad, key=consequence)
        return Outcome(how, what)

    def _hear(self, ranks: Sequence[int], until: float) -> list[tuple[Any, ...]]:
        """The next word of each of `ranks`; of one that ends or hangs, how. After one that ends badly the others have
        `GRACE_S`."""
        found: dict[int, tuple[Any, ...]] = {}
        while len(found) < len(ranks):
            left = [rank for rank in ranks if rank not in found]
            ready = wait([self.pipes[rank] for rank in left], max(0.0, until - time.monotonic()))
            if not ready:
                for rank in left:
                    self._dump(rank)
                    found[rank] = (HANGS, stood(self.logs[rank].read_text(errors="replace")))
                break
            for rank in left:
                if self.pipes[rank] in ready:
                    found[rank] = self._word(rank)
                    if found[rank][0] not in (PASSES, "ready", "port"):
                        until = min(until, time.monotonic() + GRACE_S)
        return [found[rank] for rank in ranks]

    def _word(self, rank: int) -> tuple[Any, ...]:
        try:
            word: tuple[Any, ...] = self.pipes[rank].recv()
        except EOFError:
            self.ranks[rank].join()
            code = self.ranks[rank].exitcode or 0
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return ABORTS, f"{name}: {last_words(self.logs[rank].read_text(errors='replace'))}"
        return word

    def _dump(self, rank: int) -> None:
        """Has a rank write where its threads stand, and waits for it."""
        log, process = self.logs[rank], self.ranks[rank]
        size = log.stat().st_size
        os.kill(process.pid or 0, signal.SIGUSR1)
        until = time.monotonic() + GRACE_S
        while log.stat().st_size == size and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.2)  # all threads' lines


def rank_main(cell: str, subject: str, folder: str, phase: int, rank: int, world: int, pipe: Connection) -> None:
    """One rank: says `ready`, and then how its check ended."""
    log = os.open(f"{folder}/stderr-{phase}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1)

    import torch

    import robustness_cells as cells
    import robustness_subjects as subjects
    from llmsys.comm.group import group
    from llmsys.comm.place import LOOPBACK, Place, listen

    listener = None
    if rank == 0:
        listener, port = listen(LOOPBACK)
        pipe.send(("port", port))
    else:
        port = pipe.recv()
    torch.set_num_threads(1)
    made: list[subjects.Subject] = []

    def make(*arguments: Any) -> subjects.Subject:
        made.append(subjects.SUBJECTS[subject](*arguments))
        return made[-1]

    with group(Place(rank=rank, world=world, store=(LOOPBACK, port), listener=listener), torch.device("cpu")):
        torch.distributed.barrier()
        pipe.send(("ready",))
        at = cells.At(rank=rank, world=world, make=make, folder=Path(folder), phase=phase)
        try:
            numbers = cells.run(cell, at)
        except cells.Broken as broken:
            pipe.send((broken.how, broken.what))
            os._exit(1)  # without the others, for whom closing the group would wait
        except Exception as error:  # noqa: BLE001 - whatever it is, the table says it
            pipe.send((RAISES, line(f"{type(error).__name__}: {error}")))
            os._exit(1)
        pipe.send((PASSES, numbers, made[-1].how_saved if len(cells.CELLS[cell].worlds) > 1 else ""))


def consequence(word: tuple[Any, ...]) -> int:
    """How likely it is that this end of a rank is only what another one's brought with it, from 0."""
    how, what = word[:2]
    if how == RAISES and re.search("onnection|(Read|Write) error", what):
        return 2
    return {RAISES: 0, ABORTS: 1, HANGS: 3}.get(how, 0)


def stood(log: str) -> str:
    """Of faulthandler's dump: where each thread is, outside of autograd and of what wraps a call."""
    found = []
    for thread in re.split(r"\n(?=(?:Current t|T)hread 0x)", log):
        frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', thread)
        frames = [frame for frame in frames if not re.search(r"/autograd/|/_tensor|/c10d_logger|/threading", frame[0])]
        if frames:
            found.append("{}:{} in {}".format(Path(frames[0][0]).name, *frames[0][1:]))
    return "threads stand at " + ", ".join(dict.fromkeys(found)) if found else "no thread of it answers"


def last_words(log: str) -> str:
    """What the process wrote last of an error."""
    lines = [text.strip() for text in log.splitlines() if text.strip()]
    told = [text for text in lines if "what():" in text or "Error" in text or "terminate" in text]
    return line((told or lines or ["nothing written"])[-1])


def line(text: str) -> str:
    """In one line, without folders, and without what a callback of a callback says."""
    callback = r"(Got the following error when running the callback: (RuntimeError: )?)+"
    text = re.sub(callback, "", " ".join(text.split()))
    return re.sub(r"(?<![\w.])(?:/[\w.+-]+)+/", "", text)[:240]
