"""The cells of every combination: predicted, corrected by runs where there are any, or measured in them.

A run counts for its own cell. It also says by how much predictions are off on this machine: those of the same
combination at other micro-batches are corrected by the ratio of predicted to measured time at the nearest one that was
run, those of other combinations by the median over all runs. Without that what was never run would beat what was run,
by being predicted too fast. Memory is not corrected; a run that ran out of it bounds its combination's micro-batch.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

from llmsys import schema
from llmsys.bench.advise import measured, space
from llmsys.bench.advise.cells import Cell, Predict, corrected, predicted
from llmsys.bench.advise.search import Search
from llmsys.bench.advise.space import Candidate
from llmsys.job import Record

Order = Callable[[Cell], tuple[float, ...]]


class Trials:
    """Of `candidates`, by predictions and by `records` (of `measured.read`)."""

    def __init__(
        self, config: schema.Config, candidates: Sequence[Candidate], predict: Predict, records: Sequence[Record]
    ) -> None:
        self._config, self._predict = config, predict
        self._searches: dict[Candidate, Search] = {}
        self._own: dict[Candidate, dict[int, Cell]] = {}
        self._ratios: dict[Candidate, dict[int, float]] = {}
        capped = config.hardware.mem_gib is not None
        found = measured.by_cell(config, candidates, records)
        self.unlike = found.unlike
        """How many runs of these combinations do not count, by the reason."""
        for candidate, runs in found.runs.items():
            for size, alike in runs.items():
                before = self._predicted(candidate, size)
                cell = measured.measured(before, alike, capped=capped)
                self._own.setdefault(candidate, {})[size] = cell
                if all(run.status == "ok" for run in alike):
                    self._ratios.setdefault(candidate, {})[size] = before.step_ms / cell.step_ms
        every = [ratio for ratios in self._ratios.values() for ratio in ratios.values()]
        self._usual = statistics.median(every) if every else 1.0

    def search(self, candidate: Candidate) -> Search | None:
        """Among the micro-batches that no run has shown not to fit; None where there is none."""
        if candidate not in self._searches:
            sizes = space.micro_batches(self._config, candidate)
            failed = [size for size, cell in self._own.get(candidate, {}).items() if not cell.fits]
            sizes = [size for size in sizes if size < min(failed)] if failed else sizes
            if not sizes:
                return None
            self._searches[candidate] = Search(sizes, lambda size: self._corrected(candidate, size))
        return self._searches[candidate]

    def best(self, candidate: Candidate, goal: str, order: Order) -> Cell:
        """Of one combination, by `order`; one that does not fit where none does."""
        search, asked = self.search(candidate), space.micro_batches(self._config, candidate)
        own = {size: cell for size, cell in self._own.get(candidate, {}).items() if size in asked}
        if search is None:
            return own[min(own)]
        if goal == "fit":
            return own.get(search.sizes[0]) or search.smallest()
        top = search.largest() if goal == "batch" else search.fastest()
        options = [cell for cell in own.values() if cell.fits]
        options += [top] if top is not None and top.micro_batch not in own else []
        return min(options, key=order) if options else search.smallest()

    def too_large(self, choice: Cell) -> Cell | None:
        """The choice at the next micro-batch, where that does not fit."""
        candidate = Candidate(techniques=choice.techniques, world=choice.world)
        larger = [size for size in space.micro_batches(self._config, candidate) if size > choice.micro_batch][:1]
        if not larger:
            return None
        cell = self._own.get(candidate, {}).get(larger[0]) or self._corrected(candidate, larger[0])
        return None if cell.fits else cell

    def _predicted(self, candidate: Candidate, size: int) -> Cell:
        made = space.configured(
            self._config,
            candidate.techniques,
            world=candidate.world,
            micro_batch=size,
            global_batch=space.advise(self._config).global_batch,
        )
        return predicted(made, candidate.techniques, self._predict(made))

    def _corrected(self, candidate: Candidate, size: int) -> Cell:
        ratios = self._ratios.get(candidate, {})
        near = min(ratios, key=lambda other: abs(math.log(other / size)), default=None)
        return corrected(self._predicted(candidate, size), self._usual if near is None else ratios[near])


def alike(candidate: Candidate) -> tuple[object, ...]:
    """A sorting key by which combinations stand together that differ in little that a forward pass depends on: such a
    pass is kept (`cost.kept`)."""
    t = candidate.techniques
    rest = dataclasses.replace(t, zero=0, offload=False, adam8=False) if t.zero else t
    return str(rest), t.zero == 3, bool(t.zero), candidate.world
