"""What a person sees while jobs run: one line per run, and progress bars where the output is a terminal."""

from __future__ import annotations

import threading
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from llmsys.job import Job, Record

STYLES = {"ok": "green", "skipped": "yellow", "unsupported": "yellow", "oom": "yellow", "interrupted": "yellow"}


def _place(number: int, total: int) -> str:
    """`[2/12]`; `[2]` where nobody knows how many there will be (0)."""
    return f"[{number}/{total}]" if total else f"[{number}]"


class Show:
    """Prints to `console` (standard error by default: standard output is the table's). Of several runs at once, each
    has a bar; what is said of one from a thread does not break into what is said of another."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._numbers: dict[str, str] = {}
        self._lock = threading.RLock()

    def start(self, job: Job, number: int, total: int) -> None:
        with self._lock:
            self._numbers[job.run_id] = "" if total == 1 else f"{_place(number, total)} "
            self._line(f"{_place(number, total)} {job.label}", "bold")
            if not self.console.is_terminal:
                return
            if self._bars is None:
                texts = TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[note]}")
                self._bars = Progress(*texts, TimeRemainingColumn(), console=self.console, transient=True)
                self._bars.start()
            self._tasks[job.run_id] = self._bars.add_task(self._named(job, "starting"), total=None, note="")

    def _named(self, job: Job, phase: str) -> str:
        """With its number where it is not the only one."""
        return f"{self._numbers[job.run_id]}{phase}"

    def progress(self, job: Job, values: dict[str, Any]) -> None:
        """`values` as in `Context.beat`; `say` is said in a line, also where there is no bar."""
        with self._lock:
            if "say" in values:
                self._line(f"{self._numbers.get(job.run_id, '')}{values['say']}", "yellow")
            if self._bars is None or job.run_id not in self._tasks:
                return
            note = ""
            if "loss" in values:
                note += f"loss {values['loss']:.3f}  "
            if "tokens_per_s" in values:
                note += f"{values['tokens_per_s']:,.0f} tokens/s"
            changes: dict[str, Any] = {"description": self._named(job, values.get("phase", "train")), "note": note}
            if "step" in values and "steps" in values:
                changes.update(completed=values["step"], total=values["steps"])
            self._bars.update(self._tasks[job.run_id], **changes)

    def stop(self, job: Job) -> None:
        """Its bar goes."""
        with self._lock:
            self._numbers.pop(job.run_id, None)
            if self._bars is None:
                return
            self._bars.remove_task(self._tasks.pop(job.run_id))
            if not self._tasks:
                self._bars.stop()
                self._bars = None

    def end(self, job: Job, record: Record, number: int, total: int) -> None:
        reason = f" ({record.reason})" if record.reason else ""
        style = STYLES.get(record.status, "red")
        with self._lock:
            # where others run at the same time, its first line may be far above
            place = f"{_place(number, total)} " if self._numbers else " " * 6
            self._line(f"{place}{record.status}{reason} in {record.seconds:.1f} s: {job.out}", style)
            if record.error:
                self._line(f"      {record.error}", style)

    def reused(self, job: Job, record: Record, number: int, total: int) -> None:
        place = _place(number, total)
        self._line(f"{place} {job.label}: done before ({record.status}); reuse=never runs it again", "dim")

    def decided(self, job: Job, record: Record, number: int, total: int) -> None:
        """Of a run that is not made, why."""
        with self._lock:
            self._line(f"{_place(number, total)} {job.label}: {record.status} ({record.reason})", STYLES[record.status])
            self._line(f"      {record.error}", STYLES[record.status])

    def note(self, text: str) -> None:
        self._line(text, "yellow")

    def waiting(self, job: Job) -> None:
        self._line(f"{job.label}: another process is making this run; waiting for it", "yellow")

    def _line(self, text: str, style: str) -> None:
        with self._lock:
            self.console.print(Text(text, style=style))
