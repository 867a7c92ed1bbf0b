"""One rank of a run of a tiny model, for tests to call by name in a `rank_pool`, or in their own process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from llmsys import compose, runner
from llmsys import job as jobs
from llmsys.comm.place import Place
from llmsys.context import Context
from llmsys.track.jsonl import read

TINY = ["train.steps=6", "train.global_batch=8", "train.micro_batch=2", "train.length=32", "train.threads=1"]
TINY += ["data.num_examples=24", "train.lr_by_method.full=3e-3", "train.weight_decay=0.1", "dispatch.kind=process"]
TINY += ["model.num_kv_heads=2", "profile.warmup=1", "train.schedule=cosine", "train.warmup_steps=2"]


def run(
    place: Place,
    results: str,
    overrides: list[str],
    stop_after: int | None = None,
    seen: list[Context] | None = None,
) -> dict[str, Any]:
    """One rank of a run of the tiny model; the last rank is asked to stop when it has done step `stop_after`. `seen`
    gets the run's context."""
    # another model has other settings
    base = [o for o in TINY if not (o.startswith("model.") and any(x.startswith("model=") for x in overrides))]
    made = jobs.make(compose.compose([*base, f"train.world={place.world}", f"results={results}", *overrides]))
    out = Path(made.out)
    out.mkdir(parents=True, exist_ok=True)
    seen = [] if seen is None else seen

    def listener(progress: dict[str, Any]) -> None:
        if progress.get("step") == stop_after and place.rank == place.world - 1:
            seen[0].stop_asked = True

    record = runner.run(made, listener, seen.append, place=place)
    rows = read(out / "metrics.jsonl") if place.rank == 0 and (out / "metrics.jsonl").exists() else []
    return {
        "out": str(out),
        "status": record.status,
        "error": record.error,
        "resumed": record.resumed_from_step,
        "losses": [row["loss"] for row in rows if "loss" in row],
        "norms": [row["grad_norm"] for row in rows if "loss" in row],
        "val_loss": record.summary.get("val_loss"),
        "summary": record.summary,
    }


def weights(run: dict[str, Any]) -> dict[str, Tensor]:
    """What a run left."""
    (path,) = (Path(run["out"]) / "weights").glob("*.safetensors")
    return load_file(path)
