"""Stages as programs of other frameworks, each made once: seconds of work, so that a broker has it done elsewhere."""

from __future__ import annotations

import importlib
from concurrent.futures import Executor, Future

from llmsys.decentral.cutting import Cutting
from llmsys.decentral.planes import EXPORTERS, Arrays, Rules


class Exports:
    """For planes of `planes.EXPORTERS`. `executor`: where they are made; None: here, while the caller waits."""

    def __init__(self, rules: Rules, executor: Executor | None = None) -> None:
        self.rules, self.executor = rules, executor
        self._made: dict[tuple[str, tuple[int, ...], int], Future[Arrays]] = {}

    def __call__(self, plane: str, cutting: Cutting, index: int) -> Arrays | None:
        """None: it is being made. ValueError for a stage that the plane's framework cannot run."""
        key = (plane, cutting.cuts, index)
        if key not in self._made:
            self._made[key] = self._begun(plane, cutting, index)
        return self._made[key].result() if self._made[key].done() else None

    def _begun(self, plane: str, cutting: Cutting, index: int) -> Future[Arrays]:
        module, _, name = EXPORTERS[plane].partition(":")

        def make() -> Arrays:
            try:
                made: Arrays = getattr(importlib.import_module(module), name)(
                    cutting.parts[index], cutting.stages[index], self.rules
                )
            except Exception as error:  # torch's exporter raises many kinds; none of them is the job's end
                raise ValueError(f"{type(error).__name__}: {error}"[:300]) from error
            return made

        if self.executor is not None:
            return self.executor.submit(make)
        done = Future[Arrays]()
        try:
            done.set_result(make())
        except ValueError as error:
            done.set_exception(error)
        return done
