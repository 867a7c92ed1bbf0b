"""What a person sees while jobs run: one line per run, and a progress bar where the output is a terminal."""

from __future__ import annotations

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
    """Prints to `console` (standard error by default: standard output is the table's)."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def start(self, job: Job, number: int, total: int) -> None:
        self._line(f"{_place(number, total)} {job.label}", "bold")
        if self.console.is_terminal:
            texts = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}")
            self._bar = Progress(*texts, TimeRemainingColumn(), console=self.console, transient=True)
            self._task = self._bar.add_task("starting", total=None, note="")
            self._bar.start()

    def progress(self, values: dict[str, Any]) -> None:
        """`values` as in `Context.beat`."""
        if self._bar is None:
            return
        note = ""
        if "loss" in values:
            note += f"loss {values['loss']:.3f}  "
        if "tokens_per_s" in values:
            note += f"{values['tokens_per_s']:,.0f} tokens/s"
        changes: dict[str, Any] = {"description": values.get("phase", "train"), "note": note}
        if "step" in values and "steps" in values:
            changes.update(completed=values["step"], total=values["steps"])
        self._bar.update(self._task, **changes)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def end(self, job: Job, record: Record) -> None:
        reason = f" ({record.reason})" if record.reason else ""
        style = STYLES.get(record.status, "red")
        self._line(f"      {record.status}{reason} in {record.seconds:.1f} s: {job.out}", style)
        if record.error:
            self._line(f"      {record.error}", style)

    def reused(self, job: Job, record: Record, number: int, total: int) -> None:
        place = _place(number, total)
        self._line(f"{place} {job.label}: done before ({record.status}); reuse=never runs it again", "dim")

    def decided(self, job: Job, record: Record, number: int, total: int) -> None:
        """Of a run that is not made, why."""
        self._line(f"{_place(number, total)} {job.label}: {record.status} ({record.reason})", STYLES[record.status])
        self._line(f"      {record.error}", STYLES[record.status])

    def note(self, text: str) -> None:
        self._line(text, "yellow")

    def waiting(self, job: Job) -> None:
        self._line(f"{job.label}: another process is making this run; waiting for it", "yellow")

    def _line(self, text: str, style: str) -> None:
        self.console.print(Text(text, style=style))
