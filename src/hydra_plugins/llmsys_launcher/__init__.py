"""Hydra launcher: turns a sweep into composed configs for `llmsys.main`, which runs them as it runs a single one.

All jobs are composed before the first starts, so that editing a file during a sweep changes nothing. For every job
the runs named in the experiment's `baselines` are added. Imported at every start of any Hydra application: nothing
heavy here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher


class LlmsysLauncher(Launcher):
    """Hands every composed config to the application's function, which collects them."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.config = config
        self.hydra_context = hydra_context
        self.task_function = task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """One call of the application's function per job; its baselines follow the jobs."""
        setup_globals()
        returns, extra = [], []
        for overrides in job_overrides:
            composed = self._compose(overrides)
            returns.append(self._collect(composed))
            extra += [_replaced(overrides, baseline) for baseline in composed.get("baselines", [])]
        returns += [self._collect(self._compose(overrides)) for overrides in extra]
        return returns

    def _compose(self, overrides: Sequence[str]) -> Any:
        from llmsys import wiring  # here, for any Hydra application imports this file when it starts

        return self.hydra_context.config_loader.load_sweep_config(self.config, wiring.techniques().expanded(overrides))

    def _collect(self, composed: Any) -> JobReturn:
        HydraConfig.instance().set_config(composed)  # as of a single job: whoever collects it asks for its overrides
        value = self.task_function(composed)
        done = JobReturn(overrides=list(composed.hydra.overrides.task), cfg=composed, task_name="llmsys")
        done.status = JobStatus.COMPLETED
        done.return_value = value
        return done


def _replaced(overrides: Sequence[str], baseline: str) -> list[str]:
    """The job's overrides with `baseline` in the place of any for the same key."""
    key = baseline.partition("=")[0]
    return [o for o in overrides if o.partition("=")[0].lstrip("+") != key] + [baseline]


ConfigStore.instance().store(
    group="hydra/launcher",
    name="llmsys",
    node={"_target_": "hydra_plugins.llmsys_launcher.LlmsysLauncher"},
    provider="llmsys",
)
