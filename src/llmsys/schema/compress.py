"""How gradients are compressed on their way between ranks: settings and checks, of the library and of a run alike.

`Settings` is what both have; `llmsys.compress.CompressConfig` names the method `method`, a run's group `compress` has
it as its `kind`, as every group has.
"""

from __future__ import annotations

import difflib
import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

METHODS = ("none", "fp16", "bf16", "sign", "efsign", "topk", "randomk", "powersgd", "acpsgd")
LOW_RANK = ("powersgd", "acpsgd")
SPARSE = ("topk", "randomk")
ERROR_FEEDBACK = (*LOW_RANK, *SPARSE, "efsign")
"""Methods that keep, per parameter, what they have not sent yet."""
TYPES = (
    (("r", "refresh_every", "check_every", "seed"), (int,), "a whole number"),
    (("density", "min_rate"), (int, float), "a number"),
    (("reuse",), (bool,), "true or false"),
    (("error_feedback",), (bool, type(None)), "true or false"),
)
"""(settings, their types, in words). Exact, as True is an int too. Hydra sees to them on the command line alone."""


@dataclass(frozen=True, kw_only=True)
class Settings(ABC):
    """One way to exchange gradients, equal on all ranks; a subclass says the `method`.

    `r`: width of the factors of Power-SGD and ACP-SGD; a matrix [N, M] gets at most min(N, M). `ranks`: from which step
    on which other `r` holds, {0: 8, 1000: 4}; factors keep their widest shape, of which the first rows are used.
    `density`: the share of elements that Top-k and Random-k send. `select`: Top-k by `exact` selection, or by a
    `threshold` estimated on a sample.
    `error_feedback`: what was not sent is added to the next gradient; None: with every method that is made for it,
    which `sign` is not. `error_dtype`: in what it is kept: `gradient`, as gradients are, but in fp32 where they are in
    half precision, in which a sum of many loses half of itself (bf16) or overflows (fp16); `half`, as they are then
    too, for less memory. `fp32` means the same as `gradient`.
    `reuse`: ACP-SGD projects onto the factor of its last step; without it onto a new random one (the paper's ablation).
    `refresh_every`: low rank: after so many steps one is exchanged whole, with all that error feedback has kept, and
    the subspace is taken from it (PowerSGD+, arXiv 2509.11254); 0: never.
    `min_rate`: a matrix is compressed where its larger factor is more than so many times smaller than it, which is
    min(N, M) > min_rate r; others travel whole, as LoRA's adapters do. 0: every matrix is, as in the paper's code.
    `skip`: names of parameters, with wildcards (`*.embed_tokens.*`), that travel whole. One that no parameter has is an
    error.
    `wire`: in what factors and everything that travels whole are sent: `fp32` or `bf16`.
    `seed`: of everything random; what is drawn depends on it, the parameter's name and the step alone.
    `check_every`: before every so many steps ranks make sure that they have the same weights, to the bit; 0: never.
    """

    r: int = 4
    ranks: dict[Any, int] = field(default_factory=dict)
    density: float = 0.001
    select: str = "exact"
    error_feedback: bool | None = None
    error_dtype: str = "gradient"
    reuse: bool = True
    refresh_every: int = 0
    min_rate: float = 4.0
    skip: Sequence[str] = ()
    wire: str = "fp32"
    seed: int = 0
    check_every: int = 0

    GROUP: ClassVar[str] = ""
    """What stands before the name of a setting in an error message."""
    NAMED_BY: ClassVar[str] = "method"
    """The setting that says the method."""

    @property
    @abstractmethod
    def method(self) -> str:
        """One of `METHODS`."""

    def __post_init__(self) -> None:
        for keys, types, what in TYPES:
            for key in keys:
                if type(getattr(self, key)) not in types:
                    raise self._wrong(key, f"must be {what}")
        self._one_of(self.NAMED_BY, self.method, METHODS)
        self._one_of("select", self.select, ("exact", "threshold"))
        self._one_of("error_dtype", self.error_dtype, ("gradient", "fp32", "half"))
        self._one_of("wire", self.wire, ("fp32", "bf16"))
        if self.r < 1:
            raise self._wrong("r", "must be at least 1")
        if not 0 < self.density <= 1:
            raise self._wrong("density", "must be above 0 and at most 1; it is the share that is sent")
        object.__setattr__(self, "ranks", self._by_step())
        if self.refresh_every < 0:
            raise self._wrong("refresh_every", "a number of steps, or 0 for never")
        if not self.min_rate >= 0:
            raise self._wrong("min_rate", "must be 0 (every matrix is compressed) or more")
        if isinstance(self.skip, str) or not isinstance(self.skip, Sequence):
            raise self._wrong("skip", "a list of names, not one name")
        if not all(isinstance(pattern, str) for pattern in self.skip):
            raise self._wrong("skip", "names are text")
        if self.method == "sign" and self.skip:
            raise self._wrong("skip", "not with sign, whose votes are +-1 and not on the scale of a gradient")
        if self.method == "sign" and self.error_feedback:
            raise self._wrong("error_feedback", "not with sign, whose votes leave no error; efsign has it")
        if self.check_every < 0:
            raise self._wrong("check_every", "a number of steps, or 0 for never")
        self._only("ranks", bool(self.ranks), LOW_RANK)
        self._only("refresh_every", bool(self.refresh_every), LOW_RANK)
        self._only("reuse", not self.reuse, ("acpsgd",))
        self._only("select", self.select == "threshold", ("topk",))
        self._only("wire", self.wire == "bf16", (*LOW_RANK, "randomk"))

    @property
    def feedback(self) -> bool:
        """Whether this method keeps errors. Sign-SGD with majority vote has none by definition, the dense ones need
        none."""
        return self.error_feedback is not False and self.method in ERROR_FEEDBACK

    @property
    def widest(self) -> int:
        return max([self.r, *self.ranks.values()])

    def r_at(self, step: int) -> int:
        """The width in effect at `step` (from 0)."""
        past = [start for start in self.ranks if start <= step]
        return self.ranks[max(past)] if past else self.r

    def refreshes(self, step: int) -> bool:
        """Whether everything travels whole at `step` (from 0)."""
        return bool(self.refresh_every) and step > 0 and step % self.refresh_every == 0

    def checks(self, step: int) -> bool:
        """Whether ranks compare what they have before `step` (from 0)."""
        return bool(self.check_every) and step > 0 and step % self.check_every == 0

    def skips(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.skip)

    def check_skips(self, names: Collection[str]) -> None:
        """ValueError for a pattern that is the name of none of the parameters, `names`, that are exchanged."""
        for pattern in self.skip:
            if names and not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                near = (difflib.get_close_matches(pattern, names, n=1) or [*names])[0]
                what = f"{pattern} matches none of the {len(names)} parameters that are trained, e.g. {near}"
                raise self._wrong("skip", what)

    def _by_step(self) -> dict[int, int]:
        """`ranks` with numbers as keys: JSON has text in their place."""
        given = self.ranks.items() if isinstance(self.ranks, Mapping) else [(-1, 0)]
        found = {int(step) if isinstance(step, str) and step.isdecimal() else step: r for step, r in given}
        if any(type(step) is not int or type(r) is not int or step < 0 or r < 1 for step, r in found.items()):
            raise self._wrong("ranks", "{step: r} with steps from 0 and r from 1")
        return found

    def _one_of(self, key: str, value: str, known: Sequence[str]) -> None:
        if value not in known:
            raise ValueError(f"{self.GROUP}{key}={value}: must be one of {', '.join(known)}")

    def _only(self, key: str, asked: bool, methods: Sequence[str]) -> None:
        if asked and self.method not in methods:
            raise self._wrong(key, f"is for {self.GROUP}{self.NAMED_BY}={' or '.join(methods)}, not for {self.method}")

    def _wrong(self, key: str, what: str) -> ValueError:
        return ValueError(f"{self.GROUP}{key}={getattr(self, key)}: {what}")


@dataclass(frozen=True, kw_only=True)
class Compress(Settings):
    """A run's way. `none`: the engine itself exchanges gradients, as they are."""

    kind: str = "none"
    skip: list[str] = field(default_factory=list)

    GROUP: ClassVar[str] = "compress."
    NAMED_BY: ClassVar[str] = "kind"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.check_every and self.kind == "none":
            raise self._wrong("check_every", "not with compress.kind=none, whose gradients the engine itself exchanges")

    @property
    def method(self) -> str:
        return self.kind


def as_before(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run's group, as plain data, in the words of earlier versions, where it says what they could say: a run's id and
    the tables go by these, so that records of then and now are of the same run."""
    found = {key: value for key, value in values.items() if (key, value) != ("check_every", 0)}
    if found.get("error_feedback", True) is None:
        found["error_feedback"] = True  # and was so with `sign` too, which has never had any
    return found
