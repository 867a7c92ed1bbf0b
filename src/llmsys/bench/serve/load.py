"""What is asked, and when: drawn from a seed, so that the same seed is the same load for every server."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmsys import schema
from llmsys.bench.serve import rate

FIRST = 4
"""Tokens below it may be special: none is drawn."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """`due_s` after the load has begun; math.nan: when another has ended. `prompt`: token ids; `new` tokens are to
    come, and the end-of-text token ends nothing."""

    index: int
    due_s: float
    prompt: tuple[int, ...]
    new: int


def draw(task: schema.Serve, vocabulary: int, repeat: int = 0) -> list[Request]:
    """The load of a repeat. ValueError, naming the file and its line, for a trace that is none."""
    random = np.random.default_rng([task.seed, repeat + 1])
    return _asked(task, vocabulary, *_shape(task, random), random)


def longest(task: schema.Serve) -> int:
    """Tokens, in and out, of the longest request that a run can ask for. Raises as `draw`."""
    draws = max(task.repeats, rate.MOST_TRIES + 1 if task.max_rate else 0)
    shapes = [_shape(task, np.random.default_rng([task.seed, repeat + 1])) for repeat in range(draws)]
    return max(each + new for _, ins, outs in shapes for each, new in zip(ins, outs, strict=True))


def _shape(task: schema.Serve, random: np.random.Generator) -> tuple[Sequence[float], list[int], list[int]]:
    """When the requests are due, and how many tokens go in and come out."""
    if task.arrivals == "trace":
        rows = read_trace(Path(task.trace))[: task.requests or None]
        return [row[0] - rows[0][0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]
    due = _due(task, random)
    ins = _lengths(task, task.prompt_tokens, task.requests, random)
    return due, ins, _lengths(task, task.output_tokens, task.requests, random)


def warming(task: schema.Serve, vocabulary: int) -> list[Request]:
    """`task.warmup` requests at once, as long as the first ones of the load, with prompts of their own."""
    first = draw(task, vocabulary)
    like = [first[at % len(first)] for at in range(task.warmup)]
    ins, outs = [len(each.prompt) for each in like], [each.new for each in like]
    return _asked(task, vocabulary, [0.0] * len(like), ins, outs, np.random.default_rng([task.seed, 0]))


def probe(task: schema.Serve, vocabulary: int, number: int, wanted: float, draws: int = 0) -> list[Request]:
    """`wanted` requests a second at random, for `task.probe_s` or longer. Each probe has prompts of its own, by
    `number`; gaps, but for the rate, and lengths are the same for all of the same `draws`, so that a search compares
    rates and not draws."""
    count = max(len(draw(task, vocabulary)), math.ceil(wanted * task.probe_s))
    gaps, lengths, prompts = (np.random.default_rng([task.seed, kind, each]) for kind, each in
                              ((PROBES, draws), (PROBES + 1, draws), (PROBES + 2, number)))  # fmt: skip
    due = np.cumsum(gaps.gamma(task.burstiness, 1 / (wanted * task.burstiness), count))
    like = draw(task, vocabulary, draws)
    own = [like[int(at)] for at in lengths.integers(0, len(like), count)]
    return _asked(task, vocabulary, [*map(float, due - due[0])], [len(each.prompt) for each in own],
                  [each.new for each in own], prompts)  # fmt: skip


PROBES = 1 << 20
"""In place of a repeat's number."""


def _asked(
    task: schema.Serve,
    vocabulary: int,
    due: Sequence[float],
    ins: Sequence[int],
    outs: Sequence[int],
    random: np.random.Generator,
) -> list[Request]:
    prefix = np.random.default_rng([task.seed]).integers(FIRST, vocabulary, task.shared_prefix)
    found = []
    for index, (due_s, count, new) in enumerate(zip(due, ins, outs, strict=True)):
        shared = prefix[: int(count) - 1]
        prompt = tuple(int(each) for each in (*shared, *random.integers(FIRST, vocabulary, int(count) - len(shared))))
        found.append(Request(index=index, due_s=float(due_s), prompt=prompt, new=int(new)))
    return found


def _due(task: schema.Serve, random: np.random.Generator) -> Sequence[float]:
    if task.arrivals == "burst":
        return [0.0] * task.requests
    if task.arrivals == "concurrency":
        return [math.nan] * task.requests
    if task.arrivals == "constant":
        return [at / task.rate for at in range(task.requests)]
    gaps = random.gamma(task.burstiness, 1 / (task.rate * task.burstiness), task.requests)
    return [float(each) for each in np.cumsum(gaps)]


def _lengths(task: schema.Serve, middle: int, count: int, random: np.random.Generator) -> list[int]:
    if task.lengths == "fixed" or not task.spread:
        return [middle] * count
    if task.lengths == "uniform":
        found = random.uniform(middle * (1 - task.spread), middle * (1 + task.spread), count)
    else:
        found = middle * np.exp(random.normal(0.0, task.spread, count))
    return [max(1, round(float(each))) for each in found]


TRACE = ("arrival_s", "input_tokens", "output_tokens")


def read_trace(path: Path) -> list[tuple[float, int, int]]:
    """Rows of a CSV file with these columns, by arrival. ValueError naming file and line for what is none."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if lacking := set(TRACE) - set(rows.fieldnames or ()):
                raise ValueError(f"task.trace={path}: lacks the columns {', '.join(sorted(lacking))}")
            found = []
            for line, row in enumerate(rows, 2):
                try:
                    each = (float(row[TRACE[0]]), int(row[TRACE[1]]), int(row[TRACE[2]]))
                except (TypeError, ValueError):
                    each = (math.nan, 0, 0)
                if not (0 <= each[0] < math.inf and each[1] > 0 and each[2] > 0):
                    raise ValueError(f"task.trace={path}: line {line}: must be seconds and two numbers of tokens")
                found.append(each)
    except OSError as error:
        raise ValueError(f"task.trace={path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"task.trace={path}: is no CSV file: {error}") from None
    if not found:
        raise ValueError(f"task.trace={path}: has no rows")
    return sorted(found)
