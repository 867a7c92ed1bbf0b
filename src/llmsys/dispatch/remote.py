"""One rank on another machine, as the one who follows it sees it: the same as one here, a pipe that has something to
read or has closed. A thread asks its keeper for what it says, and fills the pipe."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from typing import Any, Protocol

from llmsys.dispatch.ending import Verdict
from llmsys.dispatch.lines import Lines, say

KILL_S = 10.0
"""How long a keeper may take to end its rank; after that the keeper is ended, and its rank with it."""


class Lost(Exception):
    """A keeper that is gone, and its rank with it. `reason`: node or worker; the message says which."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Ask(Protocol):
    """Calls a keeper's method and waits for what it returns; Lost where there is no keeper any more, TimeoutError."""

    def __call__(self, method: str, *given: Any, timeout_s: float | None = None) -> Any: ...


class RemoteRank(Lines):
    """A `follow.Rank` whose process has been started. `lost`: why nothing is known of its end."""

    def __init__(self, rank: int, ask: Ask) -> None:
        self.rank, self._ask = rank, ask
        self.ended: dict[str, Any] | None = None
        self.lost: Lost | None = None
        self.record = ""
        """Of rank 0, as it has written it; JSON."""
        self._end: dict[str, Any] = {}
        reader, self._writer = os.pipe()
        super().__init__(reader)
        self._thread = threading.Thread(target=self._listen, name=f"rank {rank}", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        try:
            while (messages := self._ask("hear")) is not None:
                for message in messages:
                    say(self._writer, message)
            self._end = self._ask("end")
            self.record = self._end["record"]
        except Lost as error:
            self.lost = error
        except Exception as error:  # noqa: BLE001  whatever it was, nothing more will be heard of this rank
            self.lost = Lost("worker", f"{type(error).__name__}: {error}")
        finally:
            os.close(self._writer)

    def tell(self, **message: Any) -> None:
        with contextlib.suppress(Lost, TimeoutError):  # its thread finds out, or who waits for a sign of life
            self._ask("tell", json.dumps(message), timeout_s=KILL_S)

    def interrupt(self) -> None:
        """Returns at once: others are to be asked meanwhile."""
        threading.Thread(target=self._interrupt, daemon=True).start()

    def _interrupt(self) -> None:
        with contextlib.suppress(Lost, TimeoutError):
            self._ask("interrupt", timeout_s=KILL_S)

    def kill(self) -> None:
        with contextlib.suppress(Lost, TimeoutError):
            self._ask("kill", timeout_s=KILL_S)

    def close(self) -> None:
        """When its keeper is gone."""
        self.pipe.close()  # first: its thread may be waiting for somebody to read
        self._thread.join()

    def code(self) -> int:
        self._thread.join()
        return int(self._end.get("code", -1))

    def gone(self) -> bool:
        return not self._thread.is_alive()

    def verdict(self) -> Verdict:
        self._thread.join()
        if self.lost:
            return "crashed", self.lost.reason, str(self.lost)
        status, reason, error = self._end["verdict"]
        return status, reason, error
