"""Scaling efficiency: tokens a second of one rank among several, over those of a rank alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmsys.rows import Row, settings
from llmsys.spread import Spread, spread

WITH_RANKS = ("train.global_batch", "engine.", "sweep.", "repeat", "data.num_examples")
"""Settings that go with the number of ranks, by how their keys begin: a share of the batch stays as it was."""


def efficiency(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """(row, efficiency) of every row whose settings were also run on one rank, that one itself included (1.0).

    Two rows belong together if they are of the same code and alike but for the number of ranks, the global batch and
    the engine; one rank needs no engine, so `local` and `ddp` of one rank are the same to several. Of equals the first
    one counts.
    """
    alone: dict[tuple[str, ...], float] = {}
    for row in _measured(rows):
        if row["config"]["train.world"] == 1:
            alone.setdefault(_place(row), row["tokens_per_s"])
    return [
        (row, row["tokens_per_s"] / row["config"]["train.world"] / alone[_place(row)])
        for row in _measured(rows)
        if _place(row) in alone
    ]


@dataclass(frozen=True)
class Scaled:
    """One cell over its rounds: the `row` of its first, tokens/s, and `efficiency` with the interval of its mean."""

    row: Row
    tokens_per_s: Spread
    efficiency: Spread
    rounds: int


def over_rounds(rows: Sequence[Row]) -> list[Scaled]:
    """`efficiency` of each round of repeats by itself, and then over the rounds.

    A sweep makes every cell once before it makes any again, so both sides of a round's quotient are of the same
    minutes: what drifts while the sweep lasts is in neither. Rounds without the one or the other side, as further
    measurements of a reference cell, are left out.
    """
    cells: dict[tuple[str, ...], list[tuple[Row, float]]] = {}
    for repeat in sorted({row["repeat"] or 0 for row in rows}):
        found = efficiency([row for row in rows if (row["repeat"] or 0) == repeat])
        whole = {_place(row) for row, _ in found if row["config"]["train.world"] > 1}
        for row, share in found:
            if _place(row) in whole:
                asked = sorted(settings(row, seed=True).items())
                key = (*_place(row), str(row["engine"]), *(f"{name}={value}" for name, value in asked))
                cells.setdefault(key, []).append((row, share))
    return [
        Scaled(
            row=members[0][0],
            tokens_per_s=spread([row["tokens_per_s"] for row, _ in members]),
            efficiency=spread([share for _, share in members]),
            rounds=len(members),
        )
        for members in cells.values()
    ]


def _measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == "ok" and row.get("tokens_per_s") and "train.world" in row["config"]]


def _place(row: Row) -> tuple[str, ...]:
    kind = str(row["config"].get("engine.kind"))
    zero = [str(row["config"].get(f"engine.{key}")) for key in ("zero", "offload")] if kind == "deepspeed" else []
    engine = "plain" if kind in ("local", "ddp") else kind
    drop = WITH_RANKS if row["config"].get("hardware.device") == "cpu" else (*WITH_RANKS, "train.threads")
    rest = {key: value for key, value in settings(row, seed=True).items() if not key.startswith(drop)}
    return (
        str(row["device"]),
        str(row.get("code_hash", "")),
        engine,
        *zero,
        *(f"{key}={value}" for key, value in sorted(rest.items())),
    )
