"""A broker and providers as users start them, each on a machine behind a home line: 20 Mbit/s up, 100 down. Machines
are network namespaces, of which nothing can remain (`llmsys.comm.link`).

python decentral_home.py FOLDER         a job that waits for more providers; says its processes and waits to be killed
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as the tests' conftest does

from link_harness import Net, Rank
from llmsys.decentral import credentials
from llmsys.decentral.running import KNOWN

UP_MBIT, DOWN_MBIT = 20.0, 100.0
PORT = 7077
JOB = (
    *("+exp=decentral_train", "train.steps=24", "train.global_batch=4", "train.micro_batch=2", "train.length=64"),
    *("train.warmup_steps=1", "train.log_every=1", "model.num_layers=3", "model.hidden_size=128"),
    *("model.intermediate_size=344", "data.max_train=100", "data.max_val=2", "task.faults=[]", "task.stages=3"),
    *(f"task.up_mbit={UP_MBIT}", f"task.down_mbit={DOWN_MBIT}"),
)
"""675,712 parameters in three stages. What they send each other in a step, 0.5 MiB, takes 0.2 s of the broker's line,
over which it all goes: however fast a machine computes, the job is not done before somebody is killed."""


class Homes:
    """A broker's machine, one for each of `planes`, and one that only asks; their files are in `folder`. Close it, and
    nothing is left. OSError where links cannot be made here."""

    def __init__(self, folder: Path, planes: Sequence[str]) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.planes = folder, planes
        self.net = Net(len(planes) + 2, UP_MBIT, DOWN_MBIT)
        self.broker, *self.providers, self.asking = self.net.ranks
        self.spaces = {os.readlink(f"/proc/{rank.pid}/ns/net") for rank in self.net.ranks}
        self.secrets, self.address = folder / "secrets", f"{self.net.links[0].address}:{PORT}"

    def serve(self, *overrides: str) -> None:
        """Returns when the broker listens. AssertionError, with what it has said, where it does not."""
        credentials.make(self.secrets, [self.net.links[0].address])
        results = self.folder / "results"
        words = ["broker", "--listen", self.address, "--credentials", str(self.secrets), *JOB, *overrides]
        self._start(self.broker, "broker", words, env={"LLMSYS_RESULTS": str(results)})
        while not any(results.glob(f"*/*/{KNOWN}")):
            assert self.broker.process.poll() is None, self.said("broker")
            time.sleep(0.05)

    def provide(self, at: int, mem_gib: float, tflops: float, python: Path | str = sys.executable) -> None:
        """p0, p1, ..., on its machine."""
        words = ["provider", *self._joining(), "--name", f"p{at}", "--plane", self.planes[at]]
        words += ["--tflops", str(tflops), "--efficiency", "1", "--mem-gib", str(mem_gib)]
        words += ["--up-mbit", str(UP_MBIT), "--down-mbit", str(DOWN_MBIT)]
        self._start(self.providers[at], f"p{at}", words, python)

    def watch(self) -> Iterator[dict[str, Any]]:
        """What `status` says, each second, until there is no broker any more."""
        self._start(self.asking, "status", ["status", *self._joining(), "--json", "--watch"], heard=True)
        assert self.asking.process.stdout is not None
        yield from map(json.loads, self.asking.process.stdout)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def pids(self) -> list[int]:
        """Of all that run on any of these machines."""
        return [int(path.parts[2]) for path in Path("/proc").glob("[0-9]*/ns/net") if _space(path) in self.spaces]

    def close(self) -> None:
        """AssertionError for what is left after 10 s."""
        self.net.__exit__()
        deadline = time.monotonic() + 10
        while left := self.pids():
            assert time.monotonic() < deadline, f"processes {left} are left"
            time.sleep(0.05)

    def _joining(self) -> list[str]:
        token, certificate = self.secrets / credentials.TOKEN, self.secrets / credentials.CERTIFICATE
        return ["--join", self.address, "--token-file", str(token), "--certificate", str(certificate)]

    def _start(self, rank: Rank, name: str, words: list[str], python: Path | str = sys.executable, *,
               env: dict[str, str] | None = None, heard: bool = False) -> None:  # fmt: skip
        command = [str(python), "-m", "llmsys.decentral", *words]
        own = {"OMP_NUM_THREADS": "1", **(env or {})}
        rank.tell("become", command=command, env=own, log=str(self.folder / f"{name}.log"), heard=heard)

    def __enter__(self) -> Homes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _space(path: Path) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None  # ended meanwhile, or a process of the kernel's


def main(folder: Path) -> None:
    with Homes(folder, ["torch"]) as homes:
        homes.serve("task.providers=3")
        homes.provide(0, mem_gib=1.0, tflops=0.05)
        next(status for status in homes.watch() if status["providers"])
        print(json.dumps([homes.net.switch.pid, *homes.pids()]), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
