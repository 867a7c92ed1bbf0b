"""What a provider does when a broker measures it (`probe`): it takes and sends bytes, and multiplies matrices."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from llmsys.decentral.planes import Arrays, Plane
from llmsys.decentral.wire import Array
from llmsys.device import host_available

MEASURE, MEASURED = "measure", "measured"
MOST_BYTES, MOST_SIZE = 64 << 20, 4096
TURNS = 5


def answer(body: Mapping[str, Any], plane: Plane) -> tuple[dict[str, Any], Arrays]:
    """Of a frame `measure`, what the one says that goes back: `bytes` that are asked for; `tflops` of a product of
    `matmul`: [rows, size] by [size, size]. ValueError where that is too much."""
    said: dict[str, Any] = {"id": body["id"], "free_gib": host_available() / 2**30}
    if "matmul" in body:
        rows, size = (int(each) for each in body["matmul"])
        if not (0 < rows <= MOST_SIZE and 0 < size <= MOST_SIZE):
            raise ValueError(f"measure: a product of {rows} x {size}: at most {MOST_SIZE}")
        return {**said, "tflops": 2 * rows * size**2 / plane.matmul_s(rows, size) / 1e12}, {}
    count = int(body["bytes"])
    if not 0 <= count <= MOST_BYTES:
        raise ValueError(f"measure: {count} bytes: at most {MOST_BYTES}")
    return said, {"bytes": Array.of_bytes(bytes(count))} if count else {}


def best_s(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls, after one that warms up."""
    call()
    best = math.inf
    for _ in range(TURNS):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best
