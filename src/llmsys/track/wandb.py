"""Weights & Biases as a mirror of the local record: offline unless told otherwise, one W&B run per run id.

The group is the experiment, the job type the task, so that seeds fall together in W&B's tables. W&B's own variables
(WANDB_MODE, WANDB_PROJECT, WANDB_DIR, ...) win over what is given here, but for the run's id, which is ours.

Where W&B is to be online and its server does not answer, the run is mirrored offline, and the record says so.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsys.errors import MissingPackage
from llmsys.track import wandb_log

if TYPE_CHECKING:
    from subprocess import Popen

    from llmsys.job import Job, Record
    from llmsys.schema import Tracker

MODES = ("offline", "online", "shared", "disabled")
VARIABLES = {
    "project": "WANDB_PROJECT",
    "mode": "WANDB_MODE",
    "dir": "WANDB_DIR",
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_JOB_TYPE",
    "name": "WANDB_NAME",
    "tags": "WANDB_TAGS",
    "init_timeout": "WANDB_INIT_TIMEOUT",
    "silent": "WANDB_SILENT",
    "console": "WANDB_CONSOLE",
}
"""An argument or setting of `wandb.init` -> the variable that wins over it; W&B has it the other way round."""
TAG = 64
"""The most characters that W&B takes for a tag."""


class WandB:
    """A `Sink` that writes into `<run folder>/wandb`; `wandb sync` sends offline runs later."""

    def __init__(self, config: Tracker, job: Job, env: dict[str, Any]) -> None:
        self.note = ""
        self._config, self._job, self._env = config, job, env
        self._run: Any = None

    @staticmethod
    def check() -> None:
        if importlib.util.find_spec("wandb") is None:
            raise MissingPackage("tracker=wandb: needs wandb: pip install 'llmsys[wandb]'")
        if (mode := os.environ.get("WANDB_MODE", MODES[0])) not in MODES:
            raise ValueError(f"WANDB_MODE={mode}: must be one of {', '.join(MODES)}")

    def start(self) -> None:
        mode = os.environ.get("WANDB_MODE", self._config.mode)
        try:
            self._run = self._init(mode)
        except Exception as error:  # no key, no network, no such project: each raises its own
            if mode not in ("online", "shared"):
                raise
            why = " ".join(str(error).split())
            self.note = f"offline, since mode={mode} did not come up: {type(error).__name__}: {why}"
            logging.getLogger("llmsys").warning("the tracker WandB: %s; `wandb sync` sends it later", self.note)
            self.abandon()  # its service would say that the run's id is in use
            self._run = self._init("offline")
        self._run.define_metric("*", step_metric="step")

    def _init(self, mode: str) -> Any:
        import wandb

        config, job = self._config, self._job
        given = {
            "project": config.project,
            "mode": mode,
            "dir": str(Path(job.out)),
            "group": job.config["name"],
            "job_type": job.config["task"]["kind"],
            "name": f"{job.config['name']}-{job.run_id}",
            "tags": tags(job.config, self._env),
        }
        settings = {
            # Half of the time that the mirror has: what is left is for going offline.
            "init_timeout": config.start_s / 2,
            "silent": True,
            "console": "off",
            "reinit": "create_new",  # a run in this process that was not finished, or is somebody else's, is not ours
            "x_disable_stats": not config.system_s,
            **({"x_stats_sampling_interval": config.system_s} if config.system_s else {}),
        }
        unset = {key for key, variable in VARIABLES.items() if variable not in os.environ} | {"mode"}
        return wandb.init(
            **{key: value for key, value in given.items() if key in unset},
            id=job.run_id,
            resume="allow",
            config={**job.config, "env": self._env},
            settings=wandb.Settings(
                **{key: value for key, value in settings.items() if key in unset or key not in VARIABLES}
            ),
        )

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def row(self, row: dict[str, Any]) -> None:
        self._run.log(row)

    def finish(self, record: Record) -> None:
        import wandb

        self._run.summary.update({**record.summary, "status": record.status, "reason": record.reason})
        file, written = Path(self._run.settings.sync_file), not self._run.disabled
        self._run.finish(exit_code=0 if record.status == "ok" else 1)
        if not _ours(wandb):
            return  # when the file is closed nobody says, but for a service that ends
        wandb.teardown()
        if written and not wandb_log.complete(file):
            raise OSError(f"{file} does not go on to the run's end: is the disk full?")

    def abandon(self) -> None:
        """Ends W&B's service, which may be stopped and would then be waited for at this process's exit; what hangs on
        it raises. A later run in this process gets a new one. Not where somebody else's run depends on it."""
        import wandb

        if not (process := _ours(wandb)):
            return
        process.kill()
        try:
            wandb.teardown()
        except (Exception, SystemExit) as error:  # noqa: BLE001  it takes leave of a service that is gone, and its code
            logging.getLogger("llmsys").info("W&B is let go: %s: %s", type(error).__name__, error)


def _ours(wandb: Any) -> Popen[bytes] | None:
    """The process of W&B's service, if it is there for this run alone: started by this process, in which no other run
    is W&B's current one. W&B has no public name for it; None too where a version keeps it elsewhere."""
    if wandb.run is not None:
        return None
    found = wandb.setup()
    for name in ("_connection", "_proc", "_process"):
        found = getattr(found, name, None)
    return found


def tags(config: dict[str, Any], env: dict[str, Any]) -> list[str]:
    """Each once: subsystem, task, method, kind and name of the device, commit."""
    found = (
        config["name"].split("_")[0],
        config["task"]["kind"],
        config["method"]["kind"],
        config["hardware"]["device"],
        env.get("device_name", ""),
        env.get("git_sha", "")[:8],
    )
    return [tag for tag in dict.fromkeys(found) if 0 < len(tag) <= TAG]
