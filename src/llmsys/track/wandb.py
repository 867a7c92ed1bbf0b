"""Weights & Biases as a mirror of the local record: offline unless told otherwise, one W&B run per run id.

WANDB_MODE, WANDB_PROJECT and WANDB_ENTITY win over the config, as in other tools. The group is the experiment, the
job type the task, so that seeds fall together in W&B's tables.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmsys.job import Job, Record
    from llmsys.schema import Tracker


class WandB:
    """A sink that writes into `<run folder>/wandb`; `wandb sync` sends offline runs later."""

    def __init__(self, config: Tracker, job: Job) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("tracker=wandb: the package is missing: pip install 'llmsys[wandb]'") from error
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", config.project),
            mode=os.environ.get("WANDB_MODE", config.mode),  # type: ignore[arg-type]  # wandb checks it, with a clear error
            group=job.config["name"],
            job_type=job.config["task"]["kind"],
            name=f"{job.config['name']}-{job.run_id}",
            id=job.run_id,
            resume="allow",
            dir=str(Path(job.out)),
            config=job.config,
            tags=[job.config["method"]["kind"], job.config["hardware"]["device"]],
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        self._run.define_metric("*", step_metric="step")

    def row(self, row: dict[str, Any]) -> None:
        self._run.log(row)

    def finish(self, record: Record) -> None:
        self._run.summary.update({**record.summary, "status": record.status, "reason": record.reason})
        self._run.finish(exit_code=0 if record.status == "ok" else 1)
