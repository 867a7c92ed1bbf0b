"""A broker that is a process of its own, to be killed: PORT, TOKEN, the events' file, and where losses are left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path

from decentral_running import job, losses_of, training

from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.event_log import EventLog, read
from llmsys.decentral.serve import Serving


def main(port: int, token: str, events: Path, out: Path, steps: int) -> None:
    coordinator = Coordinator(job("llama"), training("llama", steps))
    noted = read(events)
    if noted:
        coordinator.rebuild(noted, noted[-1][0].at_s)
    with contextlib.closing(EventLog(events)) as log:
        coordinator.note = log.note
        asyncio.run(Serving(coordinator, token).run(port=port))
    out.write_text(json.dumps({"losses": losses_of(coordinator), "again": coordinator.again}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
