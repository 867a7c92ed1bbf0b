"""How a run ended, where its own process could not say it: from exit codes, the kernel's counter and the log."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

from llmsys import job as jobs
from llmsys.job import Job, Record
from llmsys.profile import environment

Verdict = tuple[str, str, str]
"""(status, reason, error)"""


def of_child(printed: list[str], code: int, kills_before: int) -> Verdict:
    """How a child that has ended without a word did, from the lines it `printed` and its exit `code`.

    `kills_before` is the kernel's count when the run began.
    """
    last = printed[-1] if printed else ""
    if any("bad_alloc" in line or "MemoryError" in line for line in printed[-20:]):
        return "oom", "host memory", last
    if code == -signal.SIGKILL and kernel_oom_kills() > kills_before:
        return "oom", "host memory", "killed by the kernel, which was out of memory"
    if code < 0:
        return "crashed", "signal", f"killed by {signal.Signals(-code).name}"
    return "crashed", "exit", f"exit code {code} without a record; last line: {last}"


def write(
    job: Job,
    attempt: int,
    verdict: Verdict,
    seconds: float,
    *,
    overrule: bool = False,
    sent: str = "",
) -> Record:
    """The record of a run that has ended: its own if it wrote one for this attempt, else one with this verdict.

    `overrule`: the verdict counts also against the run's own word, which was that of another rank's victim. `sent`: the
    run's own record as it sent it, where that may be newer than what is seen of the file.
    """
    out = Path(job.out)
    (out / ".reserve").unlink(missing_ok=True)
    found = Record.from_json(sent) if sent else Record.read(out)
    begun = found is not None and found.attempts == attempt
    if found is not None and begun and found.reason != jobs.UNFINISHED and not overrule:
        return found
    status, reason, error = verdict
    record = dataclasses.replace(
        found if found is not None and begun else Record.begin(job),
        status=status,
        reason=reason,
        error=error,
        seconds=round(seconds, 3),
    )
    record.env = record.env or environment.describe_here(job.config)
    record.write(out)
    return record


def kernel_oom_kills() -> int:
    """How many processes the kernel has killed for memory, as far as it tells."""
    for path, key in (("/sys/fs/cgroup/memory.events", "oom_kill"), ("/proc/vmstat", "oom_kill")):
        if Path(path).exists():
            for line in Path(path).read_text().splitlines():
                if line.split()[0] == key:
                    return int(line.split()[1])
    return 0
