"""A broker that is a process of its own, to be killed: PORT, TOKEN, the events' file, where what came of it is left,
what it does (`train` or `generate`), and how many steps or new tokens.

`rebuilt` kills one in the middle, and starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decentral_running import generating, job, losses_of, training

from llmsys.comm.place import listen
from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.event_log import EventLog, last_step, read
from llmsys.decentral.generation import Generation
from llmsys.decentral.serve import Serving


def story(new: int) -> Generation:
    """Drawn, so that a token depends on all that came before it."""
    prompts = [[[5, 9, 3], [6, 2]], [[33, 8], [50, 4, 4]]]
    return Generation(prompts=prompts, new=new, length=new + 3, vocabulary=64, temperature=0.9, seed=1)


def rebuilt(folder: Path, token: str, what: str, count: int, start: Callable[[int], None]) -> dict[str, Any]:
    """What came of a job whose broker was killed once step 5 was committed, and started again. `start(port)` starts
    its providers."""
    events, out = folder / "events.jsonl", folder / "out.json"
    descriptor, port = listen("127.0.0.1")
    os.close(descriptor)  # free again, and in a test's hands
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, str(port), token, str(events), str(out), what, str(count)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with subprocess.Popen(command, env=env) as broker:
        try:
            while not events.exists():
                assert broker.poll() is None
                time.sleep(0.05)
            start(port)
            while last_step(read(events)) < 5:
                assert broker.poll() is None
                time.sleep(0.02)
        finally:
            broker.kill()
    assert not out.exists()
    done = subprocess.run(command, env=env, timeout=60)
    assert done.returncode == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def main(port: int, token: str, events: Path, out: Path, what: str, count: int) -> None:
    own = story(count)
    coordinator = Coordinator(*(generating(own) if what == "generate" else (job("llama"), training("llama", count))))
    own.updates = coordinator.updates
    noted = read(events)
    if noted:
        coordinator.rebuild(noted, noted[-1][0].at_s)
    with contextlib.closing(EventLog(events)) as log:
        coordinator.journal.note, coordinator.journal.noted = log.note, log.sync
        asyncio.run(Serving(coordinator, token).run(port=port))
    made = {"texts": own.texts()} if what == "generate" else {"losses": losses_of(coordinator)}
    out.write_text(json.dumps({**made, "again": coordinator.again}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5], int(sys.argv[6]))
