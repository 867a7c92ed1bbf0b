"""The answer to "which configuration": all combinations ranked by a goal, and what the first one's letters are worth.

    throughput  most tokens a second of all devices together, each combination at its fastest micro-batch
    fit         least memory of a device, each at the smallest micro-batch
    batch       most examples in a step without accumulating any; of equal ones the faster
    cost        least for a token, on the machine or on fewer of its devices

What differs by less than `EVEN` no prediction tells apart, and hardly a measurement: of those the one with the fewest
letters is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmsys import schema
from llmsys.bench.advise import space
from llmsys.bench.advise.cells import Cell, Predict
from llmsys.bench.advise.space import Candidate, Space
from llmsys.bench.advise.trials import Trials, alike
from llmsys.job import Record

EVEN = 0.005


@dataclass(frozen=True, kw_only=True)
class Drop:
    """The choice without one of its letters: `cell` is the best that is then left, None where nothing is to choose, for
    the reason `why`. A cell that does not fit is the nearest to it."""

    letter: str
    techniques: str
    cell: Cell | None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`ranking` of what fits, the choice first and then the best; `short`: of what does not, each at its smallest
    micro-batch, the nearest first. `next_size`: the choice at the next micro-batch, which does not fit (None: it is not
    limited by that). `bound`: the setting that ended the search for a larger micro-batch ("": none did, or none was
    looked for). `unlike`: how many runs of these combinations do not count, by the reason."""

    goal: str
    stage: str
    ranking: tuple[Cell, ...]
    short: tuple[Cell, ...]
    drops: tuple[Drop, ...]
    left_out: tuple[str, ...]
    next_size: Cell | None = None
    bound: str = ""
    unlike: dict[str, int] = field(default_factory=dict)

    @property
    def choice(self) -> Cell:
        """The best; where nothing fits the nearest to it."""
        return (self.ranking or self.short)[0]

    @property
    def runner_up(self) -> Cell | None:
        return self.ranking[1] if len(self.ranking) > 1 else None

    @property
    def margin_percent(self) -> float | None:
        """By how much the runner-up is worse; None where there is none."""
        return None if self.runner_up is None else worse_percent(self.goal, self.choice, self.runner_up)

    @property
    def simplest(self) -> Cell | None:
        """Of what fits the combination of fewest letters, the best of several."""
        return min(self.ranking, key=lambda cell: len(cell.techniques.letters), default=None)


def value(goal: str, cell: Cell) -> float:
    """What the goal asks for; more is better."""
    if goal == "fit":
        return -float(cell.peak_bytes)
    if goal == "batch":
        return float(cell.examples)
    return cell.tokens_per_s / (cell.world if goal == "cost" else 1)


def order(goal: str) -> Callable[[Cell], tuple[float, ...]]:
    """A sorting key, the best first."""
    return lambda cell: (-value(goal, cell), -cell.tokens_per_s, len(cell.techniques.letters), cell.world)


def worse_percent(goal: str, best: Cell, other: Cell) -> float:
    """How much less it has of what is wanted, or how much more it takes: bytes of a device, or of what is paid."""
    ours, theirs = value(goal, best), value(goal, other)
    if goal == "fit":
        return 100 * (theirs / ours - 1)
    if goal == "cost":
        return 100 * (ours / theirs - 1)
    return 100 * (1 - theirs / ours)


def answer(config: schema.Config, predict: Predict, records: Sequence[Record] = ()) -> Answer:
    """The answer for `config` on its hardware, by predictions and by `records` (of `measured.read`).

    ValueError where no combination is to choose among, or one cannot be predicted.
    """
    task = space.advise(config)
    found: Space = space.space(config)
    trials, by = Trials(config, found.candidates, predict, records), order(task.goal)
    best = {each: trials.best(each, task.goal, by) for each in sorted(found.candidates, key=alike)}
    fitting = _chosen(task.goal, sorted((cell for cell in best.values() if cell.fits), key=by))
    short = sorted((cell for cell in best.values() if not cell.fits), key=lambda c: (_over(c), c.peak_bytes))
    choice = (fitting or short)[0]
    at = Candidate(techniques=choice.techniques, world=choice.world)
    return Answer(
        goal=task.goal,
        stage=task.stage,
        ranking=tuple(fitting),
        short=tuple(short),
        drops=_drops(config, choice, best, trials),
        left_out=found.left_out,
        unlike=trials.unlike,
        next_size=trials.too_large(choice) if fitting else None,
        bound=space.bound(config, at, choice.micro_batch) if fitting and task.goal != "fit" else "",
    )


def _chosen(goal: str, ranked: list[Cell]) -> list[Cell]:
    """`ranked` with the simplest of the best in front."""
    even = [cell for cell in ranked if worse_percent(goal, ranked[0], cell) <= 100 * EVEN]
    choice = min(even, key=lambda cell: (len(cell.techniques.letters), order(goal)(cell)), default=None)
    return ranked if choice is None else [choice, *(cell for cell in ranked if cell is not choice)]


def _over(cell: Cell) -> float:
    """How far it is from fitting, on the device or on the host."""
    host = cell.host_bytes / cell.host_capacity_bytes if cell.host_capacity_bytes else 0.0
    return max(cell.peak_bytes / cell.capacity_bytes, host)


def _drops(config: schema.Config, choice: Cell, best: dict[Candidate, Cell], trials: Trials) -> tuple[Drop, ...]:
    """For each letter of the choice what is left without it, also where that is none of `task.letters`."""
    drops = []
    for letter in choice.techniques.letters:
        less = Candidate(techniques=choice.techniques.without(letter), world=choice.world)
        name, cell = str(less.techniques), best.get(less)
        why = "" if cell else space.why_not(config, less)  # on so many ranks: on others it may be another one
        if not cell and not why:
            goal = space.advise(config).goal
            cell = trials.best(less, goal, order(goal))
        drops.append(Drop(letter=letter, techniques=name, cell=cell, why=why))
    return tuple(drops)
