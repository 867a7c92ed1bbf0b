"""The record of a script that measures: begun when the script is, and left when it is done."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from llmsys import tasks
from llmsys.job import Record, code_hash
from llmsys.profile import environment

RECORDS = Path(__file__).parent / "records"


class Script:
    """Of the script `name`, which begins now."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._started, self._begin = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()), time.monotonic()

    def left(self, root: Path, identity: str | list[Any], *, env: dict[str, Any] | None = None, **what: Any) -> Record:
        """Its record, written to `root`/<name>/<id>. `identity`: the id, or what it is a hash of. `env`: this machine's
        CPU and one thread, unless given. `what`: `config`, `summary`, and what else a record has."""
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
        record = Record(
            name=self.name,
            run_id=identity if isinstance(identity, str) else digest,
            task=tasks.SCRIPTS,
            status="ok",
            env=environment.describe("cpu", 1) if env is None else env,
            code_hash=code_hash(),
            started=self._started,
            seconds=round(time.monotonic() - self._begin, 1),
            **what,
        )
        record.leave(root)
        return record
