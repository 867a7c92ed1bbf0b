"""TensorBoard as a mirror of the local record, by torch's writer: `tensorboard --logdir results` shows all runs.

Scalars are those of the rows, by step. The config and tables are text, at step 0; at the end the settings and the
summary stand in the HPARAMS page too. What is neither a number nor text has no place there and is left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsys.errors import MissingPackage

if TYPE_CHECKING:
    from llmsys.job import Job, Record
    from llmsys.schema import Tracker

FLUSH_S = 10
"""How long a row may wait before it is on disk; the writer's own 120 s are long for somebody who watches."""


class TensorBoard:
    """A `Sink` that writes into `<run folder>/tensorboard`."""

    def __init__(self, config: Tracker, job: Job, env: dict[str, Any]) -> None:
        self.note = ""
        self._job, self._env = job, env
        self._writer: Any = None
        self._step = 0
        self._resumed = False

    @staticmethod
    def check() -> None:
        for package, extra in {"tensorboard": "tensorboard", "torch": "train"}.items():
            if importlib.util.find_spec(package) is None:
                raise MissingPackage(f"tracker=tensorboard: needs {package}: pip install 'llmsys[{extra}]'")

    def start(self) -> None:
        import yaml
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(self._job.out) / "tensorboard"
        self._resumed = folder.exists() and any(folder.iterdir())
        self._writer = SummaryWriter(str(folder), flush_secs=FLUSH_S)
        for name, values in {"config": self._job.config, "env": self._env}.items():
            self._writer.add_text(name, f"```yaml\n{yaml.safe_dump(values, sort_keys=False)}```", 0)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
        self._writer.add_text(name, text, 0)
        self._writer.flush()

    def row(self, row: dict[str, Any]) -> None:
        step = int(row.get("step", self._step))
        if self._resumed:
            self._begin_again(step)
        self._step = step
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, step)

    def _begin_again(self, step: int) -> None:
        """Has TensorBoard leave out what an earlier attempt wrote of steps from `step` on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._resumed = False
        start = Event(step=step, session_log=SessionLog(status=SessionLog.SessionStatus.START))
        self._writer.file_writer.add_event(start, step)

    def finish(self, record: Record) -> None:
        from torch.utils.tensorboard.summary import hparams

        results = {f"summary/{key}": value for key, value in record.summary.items()}
        for key, value in results.items():
            self._writer.add_scalar(key, value, self._step)
        self._writer.add_text("status", f"{record.status} {record.reason}".strip(), self._step)
        # Not `add_hparams`, which makes a folder of its own for them.
        for part in hparams(dict(_leaves(record.config)), dict.fromkeys(results, 0.0)):
            self._writer.file_writer.add_summary(part, self._step)
        self._writer.close()

    def abandon(self) -> None:
        """Nothing outlives the process."""


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and plain values, as HPARAMS takes them; a list as its text."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value if isinstance(value, (bool, int, float, str)) else str(value)
