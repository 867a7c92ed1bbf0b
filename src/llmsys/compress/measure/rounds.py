"""Finished rounds on disk, so that an attempt that is killed loses none of them: `rounds.json` in the run's folder.

A round is every variant of a model, once. It is kept whole or not at all: what is compared is compared within a round,
so its turns have to be of one attempt. The fit, of the first attempt, is kept too. The same command goes on with them
where the code, the machine, what is installed and the links are what they were; else it begins anew, and says so.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from llmsys.comm import collectives
from llmsys.compress.kernels_cost import Rates
from llmsys.compress.measure.turns import Samples
from llmsys.compress.measure.variants import Variant
from llmsys.cost.links import Line
from llmsys.files import write_atomic

if TYPE_CHECKING:
    from llmsys.context import Context

Round = dict[Variant, Samples]
Fit = tuple[Mapping[str, Line], Mapping[str, Rates]]
"""What `fit` measures: a line for each kind of collective, rates for each kind of variant."""
NOT_THE_MACHINE = ("git_sha", "git_dirty", "network")
"""What of `Context.env` may be another in the next attempt. Of the network it matters whether links are shaped."""


class Rounds:
    """Of one run, `wanted` in all: read by rank 0, which tells the others, and written by it. Collective."""

    def __init__(self, context: Context, wanted: int) -> None:
        self.context, self.wanted = context, wanted
        self.path = context.out / "rounds.json"
        env = {key: value for key, value in context.env.items() if key not in NOT_THE_MACHINE}
        shaped = context.env.get("network", {}).get("shaped")
        self._where = json.loads(json.dumps({"code_hash": context.code_hash, "shaped": shaped, **env}))
        self._kept: dict[str, Any] = {"where": self._where, "fit": None, "rounds": []}
        text = self._same(self._read() if context.place.rank == 0 else "")
        if text:
            self._kept = json.loads(text)
            context.log.info("going on with %d of %d rounds of earlier attempts", self.count, wanted)
        self._attempt = 1 + max(self._attempts, default=0)
        self._say()

    @property
    def _attempts(self) -> set[int]:
        fit = self._kept["fit"]
        return {each["attempt"] for each in [*self._kept["rounds"], *([fit] if fit else [])]}

    @property
    def attempts(self) -> int:
        """How many attempts everything that is kept comes from."""
        return len(self._attempts)

    @property
    def count(self) -> int:
        """Of all models."""
        return len(self._kept["rounds"])

    def fit(self, measure: Callable[[], Fit]) -> Fit:
        """The fit that is kept, else a new one by `measure`."""
        if self._kept["fit"] is None:
            lines, rates = measure()
            self._kept["fit"] = {
                "attempt": self._attempt,
                "lines": {kind: [line.alpha_s, line.beta_s] for kind, line in lines.items()},
                "rates": {kind: [rate.bytes_per_s, rate.launch_s] for kind, rate in rates.items()},
            }
            self._write()
        fit = self._kept["fit"]
        return {kind: Line(*both) for kind, both in fit["lines"].items()}, {
            kind: Rates(flops_per_s=math.inf, bytes_per_s=bytes_per_s, launch_s=launch_s)
            for kind, (bytes_per_s, launch_s) in fit["rates"].items()
        }

    def of(self, subject: str) -> list[Round]:
        """The finished rounds of a model, in order."""
        found = [each["samples"] for each in self._kept["rounds"] if each["subject"] == subject]
        return [{Variant.parse(name): _samples(values) for name, values in one.items()} for one in found]

    def add(self, subject: str, made: Round) -> None:
        """A round that has just been finished. OSError where the disk is full; the rounds before stay."""
        samples = {variant.name: vars(own) for variant, own in made.items()}
        self._kept["rounds"].append({"attempt": self._attempt, "subject": subject, "samples": samples})
        self._write()
        self._say()

    def remove(self) -> None:
        """At the end of the run, whose record has everything."""
        if self.context.place.rank == 0:
            self.path.unlink(missing_ok=True)

    def _say(self) -> None:
        self.context.kept = f"{self.count} of {self.wanted} rounds are kept; the same command goes on with them"
        self.context.beat(step=self.count, steps=self.wanted, phase="rounds")

    def _read(self) -> str:
        """The file's text; none where there is no file, or none to go on with."""
        if not self.path.exists():
            return ""
        try:
            text = self.path.read_text(encoding="utf-8")
            where = json.loads(text)["where"]
        except (ValueError, KeyError, TypeError) as error:
            self.context.log.warning("%s: damaged: %s; all rounds are measured anew", self.path, error)
            return ""
        if where != self._where:
            keys = sorted(key for key, value in self._where.items() if where.get(key) != value)
            self.context.log.warning("%s: of another %s; all rounds are measured anew", self.path, ", ".join(keys))
            return ""
        return text

    def _same(self, text: str) -> str:
        """Rank 0's `text`, on every rank."""
        data, device = text.encode(), self.context.device
        size = collectives.agree(len(data), device)
        if not size:
            return ""
        found = torch.zeros(size, dtype=torch.uint8, device=device)
        if self.context.place.rank == 0:
            found.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        collectives.broadcast(found)
        return bytes(found.tolist()).decode()

    def _write(self) -> None:
        if self.context.place.rank == 0:
            write_atomic(self.path, json.dumps(self._kept))


def _samples(values: dict[str, Any]) -> Samples:
    calls = values["calls"]
    return Samples(**{**values, "calls": None if calls is None else Counter(calls), "bytes": Counter(values["bytes"])})
