"""Two real rank processes that live as long as the tests do (the fixture `pool`), and call their functions: importing
torch, transformers and DeepSpeed takes ten seconds, a run of a tiny model one.

The ranks keep one process group, since DeepSpeed keeps the first that it sees.

    pool.call("test_train_engines:losses", overrides)  ->  [what rank 0 returned, what rank 1 returned], as JSON
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ENGINES = {
    "ddp": ["engine=ddp"],
    "zero0": ["engine=deepspeed", "engine.zero=0"],
    "zero1": ["engine=deepspeed", "engine.zero=1"],
    "zero2": ["engine=deepspeed", "engine.zero=2"],
    "zero3": ["engine=deepspeed", "engine.zero=3"],
    "zero2-offload": ["engine=deepspeed", "engine.zero=2", "engine.offload=optimizer"],
    "zero3-offload": ["engine=deepspeed", "engine.zero=3", "engine.offload=optimizer+params"],
    "fsdp2": ["engine=fsdp2"],
    "fsdp2-whole": ["engine=fsdp2", "engine.reshard=false"],
    "tp": ["engine=tp"],
}
"""What tests call an engine -> the overrides that choose it."""


class Pool:
    """`world` processes, each told to call a function with its `Place` and the given arguments; new ones after a call
    that failed, since then one may wait for the other, or have died."""

    def __init__(self, world: int = 2) -> None:
        self.world = world
        self.failed = False
        self.ranks: list[subprocess.Popen[str]] = []
        self._start()

    def _start(self) -> None:
        search = [str(HERE), *(str(path) for path in HERE.iterdir() if path.is_dir()), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search), "OMP_WAIT_POLICY": "PASSIVE"}
        self.ranks = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(self.world)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**environment, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(self.world)
        ]
        store = self._hear(self.ranks[0])
        self._tell(self.ranks[1:], store)

    def call(self, where: str, *arguments: Any) -> list[Any]:
        """`where` is `module:function`; it gets (place, *arguments). AssertionError with a rank's traceback."""
        if self.failed:
            self.close()
            self._start()
        self.failed = True  # until all have answered
        self._tell(self.ranks, {"where": where, "arguments": arguments})
        answers = [self._hear(rank) for rank in self.ranks]
        faults = [answer["fault"] for answer in answers if "fault" in answer]
        self.failed = bool(faults)
        assert not faults, "\n".join(faults)
        return [answer["result"] for answer in answers]

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()
            for stream in (rank.stdin, rank.stdout):
                assert stream is not None
                with contextlib.suppress(BrokenPipeError):  # of a rank that died before it was told all
                    stream.close()

    @staticmethod
    def _tell(ranks: list[subprocess.Popen[str]], message: Any) -> None:
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps(message) + "\n")
            rank.stdin.flush()

    @staticmethod
    def _hear(rank: subprocess.Popen[str]) -> Any:
        assert rank.stdout is not None
        line = rank.stdout.readline()
        assert line, f"a rank ended with {rank.wait()}"
        return json.loads(line)


def briefly(names: Iterable[str], *quick: str) -> list[Any]:
    """`names` for `parametrize`; the short suite has those of `quick` alone."""
    import pytest  # not in the ranks

    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


def main() -> None:
    """One rank: serves calls until its input ends."""
    import torch

    from llmsys.comm.group import group
    from llmsys.comm.place import LOOPBACK, Place, listen

    rank, world = int(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer

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
            order = json.loads(line)
            module, _, name = order["where"].partition(":")
            try:
                say({"result": getattr(importlib.import_module(module), name)(place, *order["arguments"])})
            except Exception:  # noqa: BLE001  whatever it is, the test is told
                say({"fault": f"rank {rank}: {traceback.format_exc()}"})


if __name__ == "__main__":
    main()
