"""Scaling efficiency: tokens a second of one rank among several, over those of a rank alone."""

from __future__ import annotations

from collections.abc import Sequence

from llmsys.rows import Row, settings

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
