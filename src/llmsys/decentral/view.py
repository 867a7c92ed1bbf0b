"""What a person sees of a broker's status: a table, again each second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llmsys.decentral.link import Refused

AGAIN_S = 1.0
NOBODY = "nobody listens: between two jobs, or no more"


def watched(now: Callable[[], Mapping[str, Any]]) -> Iterator[Mapping[str, Any] | None]:
    """Each second what `now` says; of a broker with a queue also while nobody listens, None. ConnectionError where
    another broker has ended, or none was there."""
    queue = False
    while True:
        try:
            status = now()
        except ConnectionError as error:
            if isinstance(error, Refused) or not queue:
                raise
            yield None
        else:
            queue = status["queue"] is not None
            yield status
        time.sleep(AGAIN_S)


def table(status: Mapping[str, Any] | None) -> Any:
    """A row for each provider, under a line about the job; what waits, where there is a queue."""
    if status is None:
        return NOBODY
    from rich.markup import escape
    from rich.table import Table

    queue = status["queue"]
    loss = "" if status["loss"] is None else f" · loss {status['loss']:.4f}"
    title = (f"step {status['step']} of {status['steps']}{loss} · {status['steps_per_s']:.2f} steps/s · "
             f"epoch {status['epoch']} · {status['phase']}")  # fmt: skip
    if queue is not None:
        title += f"\n{len(queue['waiting'])} jobs wait, {len(queue['done'])} are done, {len(queue['failed'])} failed"
        title += "".join(f"\n  {name}" for name in queue["waiting"])
    made = Table(title=title, title_justify="left")
    for head in ("provider", "does", "plane", "passes", "share %", "sent MiB", "past the broker", "silent s"):
        made.add_column(head, justify="left" if head in ("provider", "does", "plane") else "right")
    for name, each in status["providers"].items():
        does = each["role"] if each["stage"] is None else f"stage {each['stage']}"
        silent = "" if each["silent_s"] is None or each["role"] == "gone" else f"{each['silent_s']:.1f}"
        done = (str(each["forward"] + each["backward"]), f"{100 * each['share']:.1f}", f"{each['sent_mib']:.1f}")
        direct = f"{each['direct_mib']:.1f} to {', '.join(each['direct'])}" if each["direct"] else ""
        made.add_row(escape(name), does, each["plane"], *done, direct, silent)
    return made
