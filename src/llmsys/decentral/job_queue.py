"""A broker of one job after another (`queued`). Each is a run of its own, with its record, in a process of its own:
what it breaks is not the queue, and the port is free for the next one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmsys import compose, dispatch, messages, schema, wiring
from llmsys.decentral import credentials
from llmsys.decentral.event_log import EVENTS, last_step, read
from llmsys.decentral.queued import DONE, FAILED, RUNNING, VARIABLE, moved, put, waiting, words_of
from llmsys.dispatch.show import Show
from llmsys.files import write_atomic

LOOK_S = 0.5
"""Between two looks for a new file."""
FREE_S = 10.0
"""For the port of a job that has just ended to be free again."""
DIALLED = ("task.start=none", "task.faults=[]")
"""What any job is told whose providers dial in."""
ANYWHERE = (*DIALLED, "task.listen=127.0.0.1:7077", "task.token_file=token")


def submit(folder: Path, words: Sequence[str], name: str = "") -> Path:
    """The job's file. ValueError for words that are wrong: then there is none."""
    return put(folder, words, composed(words)["name"], name)


def composed(words: Sequence[str], where: Sequence[str] = ANYWHERE) -> dict[str, Any]:
    """The config of a job that listens `where`. ValueError, in one line, for anything that is wrong with it, or that no
    queue runs."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    for word in words:
        if word.startswith("-"):
            raise ValueError(f"{word}: a job is one run, of words like +exp=decentral_train train.steps=20")
    try:
        words = compose.smoked(words)
        kind = compose.compose(words)["task"]["kind"]
        if not issubclass(schema.SCHEMAS["task"][kind], schema.Together):
            raise ValueError(f"task.kind={kind}: must be one that providers do, e.g. of +exp=decentral_train")
        config = compose.compose([*words, *where])
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(messages.one_line(error) or str(error)) from None
    typed = schema.build(config)
    wiring.techniques().check(config)
    if typed.dispatch.kind != "process":
        raise ValueError(f"dispatch={typed.dispatch.kind}: must be process, so that what a job breaks is not the queue")
    return config


class Queue:
    """Of `folder`; jobs listen at `address`, with credentials that `words` name; `until_empty`: and no longer.
    ValueError for an address that would not be the same for all."""

    def __init__(self, folder: Path, address: str, words: Sequence[str], *, until_empty: bool = False) -> None:
        self.address = credentials.address("--listen", address, any_port=False)
        self.where = (*DIALLED, f"task.listen={address}", *words)
        self.folder, self.until_empty = folder.resolve(), until_empty

    def run(self) -> None:
        """All jobs, first the one that was under way. OSError where the address is taken, or the folder is another
        broker's. KeyboardInterrupt leaves the job where it is, to go on."""
        for name in ("", RUNNING, DONE, FAILED):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(f"{self.folder}: another broker runs the jobs there") from None
            os.environ[VARIABLE] = str(self.folder)
            try:
                self._run()
            finally:
                del os.environ[VARIABLE]

    def _run(self) -> None:
        for path in self._jobs():
            _until_free(*self.address)
            text = path.read_text(encoding="utf-8", errors="replace")
            try:
                well, said = self._ran(words_of(text))
            except (ValueError, OSError, LookupError) as error:
                well, said = False, str(error)
            line = f"{'done' if well else 'failed'}: {' '.join(said.split())}"
            print(f"{path.stem}: {line}", flush=True)
            write_atomic(path, f"{text.rstrip()}\n# {line}\n")
            moved(path, self.folder / (DONE if well else FAILED))

    def _jobs(self) -> Iterator[Path]:
        while True:
            left = [*waiting(self.folder / RUNNING), *waiting(self.folder)]
            if left:
                yield moved(left[0], self.folder / RUNNING)
            elif self.until_empty:
                return
            else:
                time.sleep(LOOK_S)

    def _ran(self, words: Sequence[str]) -> tuple[bool, str]:
        """(whether it went well, its folder or why not). A job whose process dies goes on as long as it gets any
        further: its providers are still there, with what they have."""
        from llmsys.main import make_job

        job, before = make_job(composed(words, self.where)), -1
        while True:
            (record,) = dispatch.submit([job], Show())
            if record.status == "ok":
                return True, job.out
            now = last_step(read(Path(job.out) / EVENTS))
            if record.status != "crashed" or now <= before:
                return False, record.error or record.status
            before = now


def _until_free(host: str, port: int) -> None:
    deadline = time.monotonic() + FREE_S
    host = host.strip("[]")
    while True:
        with contextlib.closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                return probe.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    raise OSError(f"--listen {host}:{port}: {error.strerror}") from None
        time.sleep(LOOK_S)
