"""Memory and speed of fine-tuning LLaMA-2 7B on one GPU: peft's LoRA and LoRA-FA, our fused LoRA, and our LoRA-FA.

    python benchmarks/lorafa_gpu.py --out $OUT                      on a machine with a CUDA device of 80 GB; 9 minutes
    python benchmarks/lorafa_gpu.py --small --device cpu --out DIR  the same script, tried at a tiny size

Weights are random, bf16, of the full size: time and bytes do not depend on their values. The base is made once and each
subject (`lorafa_subjects.py`) puts its adapters on it in turn. A cell is a batch x length: after one step, which makes
the optimizer's state, the peak of the allocator over some steps is read, less the weights' bytes, and their time. So
a peak here is adapters' gradients and optimizer state, what is saved for the backward pass, and what comes and goes.
First the grid; then, at one cell, dropout, the chunked loss, and both; then the largest batch that fits, looked for
from where the line through the grid's peaks says it is. A cell that runs out of memory is one of the results. What
--minutes leave no time for is named in the record as left out.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import lorafa_subjects as subjects
from llmsys import compose, job, models, schema
from llmsys.profile import environment, memory

NAMES = ("peft_lora", "peft_lora_bf16", "peft_lorafa", "lora/none", "lorafa/none", "lorafa/mlp", "lorafa/attn+mlp")
NAMES += ("lorafa/block",)
GRID = [(1, 512), (4, 512), (16, 512), (1, 2048), (4, 2048), (8, 2048)]
SMALL_GRID = [(1, 16), (2, 16), (1, 32)]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.1},
    "chunked": {"chunked_loss": True},
    "dropout+chunked": {"dropout": 0.1, "chunked_loss": True},
}
MODEL = ["model=llama2_7b", "model.dtype=bf16", "train.precision=bf16", "model.attention=sdpa"]
SMALL = ["model=llama_tiny"]
GIB = 2**30
Cell = dict[str, Any]


class Bench:
    """The base model, and the cells measured so far."""

    def __init__(self, config: schema.Config, steps: int, minutes: float, r: int) -> None:
        self.device = torch.device(config.hardware.device)
        self.steps, self.r = steps, r
        self.deadline = time.monotonic() + 60 * minutes
        assert isinstance(config.model, schema.Transformer)
        self.vocab = config.model.vocab_size
        self.base = models.load(
            config.model, objective="causal_lm", num_labels=0, device=self.device, seed=0, folder=None
        )
        self.cells: list[Cell] = []

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def measure(self, name: str, variant: str, size: int, length: int, steps: int | None = None) -> Cell:
        """One cell, which also goes to `cells`: `status` is ok, oom or left_out."""
        cell: Cell = {"subject": name, "variant": variant, "batch": size, "length": length, "status": "left_out"}
        if not self.late:
            try:
                cell |= {"status": "ok", **self._numbers(name, variant, size, length, steps or self.steps)}
            except torch.OutOfMemoryError:
                cell["status"] = "oom"
            self._tidy()  # outside of `except`, whose traceback holds tensors
        self.cells.append(cell)
        print(text(cell), flush=True)
        return cell

    def _numbers(self, name: str, variant: str, size: int, length: int, steps: int) -> Cell:
        batch = subjects.batch(self.vocab, size, length, self.device)
        setting = subjects.Setting(r=self.r, **VARIANTS[variant])
        with subjects.trainer(self.base, name, setting) as trainer:
            weights = subjects.held_bytes(trainer.model)
            loss = trainer.step(batch)
            self._wait()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times = []
            for _ in range(steps):
                before = time.perf_counter()
                trainer.step(batch)
                self._wait()
                times.append((time.perf_counter() - before) * 1e3)
            found = {
                "loss": loss,
                "weights_gib": weights / GIB,
                "tokens_per_s": size * length / statistics.median(times) * 1e3,
                "step_ms": [round(ms, 3) for ms in times],
            }
            if self.device.type == "cuda":
                found["peak_gib"] = (torch.cuda.max_memory_allocated() - weights) / GIB
                found["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
            else:  # a CPU's allocator keeps no count: what autograd saves
                forward: Callable[[], Any] = lambda: trainer.model(**batch).loss  # noqa: E731
                found["saved_gib"] = memory.saved_tensors(trainer.model, forward) / GIB
            return found

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _tidy(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def largest(self, name: str, variant: str, length: int, first: int) -> int | None:
        """The largest batch of `length` tokens that fits; None where there was no time to find it.

        Begins at `first` and goes up or down from there.
        """
        size, best = max(first, 1), 0
        while True:
            status = self.measure(name, variant, size, length, steps=1)["status"]
            if status == "left_out":
                return None
            if status == "ok":
                best = size
                size += 1
            elif best or size == 1:
                return best
            else:
                size -= 1

    def guess(self, name: str, length: int, capacity: float) -> int:
        """Where the line through this subject's two largest peaks at `length` meets `capacity` (GiB)."""
        found = [c for c in self.cells if (c["subject"], c["length"], c["status"]) == (name, length, "ok")]
        points = sorted({c["batch"]: c for c in found if c["variant"] == "plain" and "peak_gib" in c}.items())
        if len(points) < 2:
            return points[0][0] if points else 1
        (low, a), (high, b) = points[-2:]
        slope = (b["peak_gib"] - a["peak_gib"]) / (high - low)
        return high + int((capacity - b["weights_gib"] - b["peak_gib"]) / slope)


def text(cell: Cell) -> str:
    """A cell in a line."""
    what = f"{cell['subject']:16} {cell['variant']:16} {cell['batch']:3} x {cell['length']:5}  "
    if cell["status"] != "ok":
        return what + cell["status"]
    bytes_ = f"peak {cell['peak_gib']:7.3f}" if "peak_gib" in cell else f"saved {cell['saved_gib']:7.5f}"
    return what + f"{bytes_} GiB beside {cell['weights_gib']:.3f}  {cell['tokens_per_s']:9,.0f} tokens/s"


def cells_of(bench: Bench, names: Sequence[str], grid: list[tuple[int, int]], one: tuple[int, int]) -> None:
    """The grid, cell by cell so that a deadline cuts all subjects alike; then the variants at the cell `one`."""
    for (size, length), name in itertools.product(grid, names):
        bench.measure(name, "plain", size, length)
    for variant, name in itertools.product(list(VARIANTS)[1:], names):
        bench.measure(name, variant, *one)


def largest_batches(bench: Bench, names: Sequence[str], length: int) -> Iterator[tuple[str, int]]:
    """(key, batch): of each subject, with the plain and the chunked loss."""
    capacity = torch.cuda.get_device_properties(bench.device).total_memory / GIB
    for variant, name in itertools.product(("plain", "chunked"), names):
        found = bench.largest(name, variant, length, bench.guess(name, length, capacity))
        if found is not None:
            yield f"{name}|{variant}|largest_batch_of_{length}", found


def table(cells: list[Cell], key: str) -> str:
    """A line for each subject, a column for each cell, as Markdown; the last measurement of a cell counts."""
    columns = list(
        dict.fromkeys((c["variant"], c["batch"], c["length"]) for c in cells if len(c.get("step_ms", "..")) > 1)
    )
    found = {(c["subject"], c["variant"], c["batch"], c["length"]): c for c in cells}
    rows = [f"| {key} | " + " | ".join(f"{b} x {n} {v if v != 'plain' else ''}".strip() for v, b, n in columns) + " |"]
    rows.append("|---|" + "---|" * len(columns))
    for name in dict.fromkeys(c["subject"] for c in cells):
        texts = []
        for column in columns:
            cell = found.get((name, *column), {"status": "–"})
            texts.append(short(cell[key]) if key in cell else cell["status"])
        rows.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(rows)


def short(value: float) -> str:
    """Four digits, or a whole number."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def main(words: Sequence[str]) -> job.Record:
    """Measures, writes the record, prints its tables, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where lorafa_gpu/<id>/record.json goes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model")
    parser.add_argument("--only", default=",".join(NAMES), help="subjects, by name")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a cell")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    asked = parser.parse_args(words)
    names = asked.only.split(",")
    shape = SMALL if asked.small else MODEL
    where = [f"hardware.device={asked.device}", "name=lorafa_gpu", "data=synthetic", f"train.threads={asked.threads}"]
    run = job.make(compose.compose([*shape, *where]))
    config = schema.build(run.config)
    torch.set_num_threads(config.train.threads)
    start, started = time.monotonic(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    bench = Bench(config, asked.steps, asked.minutes, asked.r)
    grid = SMALL_GRID if asked.small else GRID
    summary: dict[str, float] = {}
    cells_of(bench, names, grid, grid[-2])
    if bench.device.type == "cuda" and not asked.small:
        summary |= dict(largest_batches(bench, names, grid[-1][1]))
    bf16 = config.model.dtype == "bf16"
    for _, group in itertools.groupby(
        sorted((c for c in bench.cells if c["status"] == "ok" and c["variant"] in ("plain", "chunked")), key=place),
        place,
    ):
        subjects.check_first_losses({c["subject"]: c["loss"] for c in group}, 2e-3 if bf16 else 1e-5)
    for cell in bench.cells:
        key = f"{cell['subject']}|{cell['variant']}|{cell['batch']}x{cell['length']}"
        numbers = {k: v for k, v in cell.items() if isinstance(v, float)}
        summary |= {f"{key}|{k}": round(v, 8) for k, v in numbers.items()}
        summary[f"{key}|oom"] = int(cell["status"] == "oom")
    record = job.Record(
        name="lorafa_gpu",
        run_id=f"{config.model.name}-{config.hardware.device}",
        task="benchmark",
        status="ok",
        config={**run.config, "benchmark": {"r": asked.r, "subjects": names, "cells": bench.cells}},
        env=environment.describe(config.hardware.device, config.train.threads),
        code_hash=job.code_hash(),
        started=started,
        seconds=round(time.monotonic() - start, 3),
        summary=summary,
    )
    record.leave(asked.out)
    for key in ("peak_gib" if bench.device.type == "cuda" else "saved_gib", "tokens_per_s"):
        print("\n" + table(bench.cells, key))
    for key, value in summary.items():
        if "largest" in key:
            print(f"{key}: {value}")
    return record


def place(cell: Cell) -> tuple[int, int]:
    return cell["batch"], cell["length"]


if __name__ == "__main__":
    main(sys.argv[1:])
