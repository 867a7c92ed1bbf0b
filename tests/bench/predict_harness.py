"""What the tests of predictions share: configs, and a machine that does nothing but arithmetic."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from llmsys import compose, schema
from llmsys.bench.predict.machine import Machine
from llmsys.bench.predict.prediction import Prediction, predict
from llmsys.bench.predict.speeds import Speeds
from llmsys.cost import work
from llmsys.cost.links import Line

ROOT = Path(__file__).parents[2]
BENCHMARKS = str(ROOT / "benchmarks")
A800 = "hardware=a800x8"


@functools.cache
def config(*words: str) -> schema.Config:
    return schema.build(compose.compose(["+exp=bench_predict", *words]))


def predicted(*words: str, machine: Machine | None = None) -> Prediction:
    return predict(config(*words), machine)


def ideal(rate: float = 1e12, **changes: Any) -> Machine:
    """Arithmetic at one rate, everything else for nothing."""
    kinds = [f"{kind}/{precision}" for kind in work.ARITHMETIC for precision in ("bf16", "fp32")]
    curves = {**dict.fromkeys(kinds, ((1.0, rate),)), "stream": ((1.0, 1e30),)}
    values: dict[str, Any] = {
        "title": "ideal", "device": "cuda", "mem_gib": 80.0, "host_gib": None, "devices": 8,
        "speeds": Speeds(curves=curves, start_s={"forward": 0.0, "again": 0.0, "backward": 0.0}, behind=True),
        "lines": {"all": Line(0.0, 1e-30)}, "peak": {"bf16": rate, "fp32": rate},
        "copy_bytes_per_s": 1e30, "host_bytes_per_s": 1e30,
    }  # fmt: skip
    return Machine(**{**values, **changes})
