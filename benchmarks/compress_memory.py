"""What compressed gradients take in memory beside DDP: the most bytes of live tensors, on real ranks, of every method.

    python benchmarks/compress_memory.py [--world 4] [--layers 8] [--width 768] [--subjects acpsgd "topk 1 %" ...]
                                         [--out benchmarks/records]
    python benchmarks/compress_memory.py --kept                      # the table of the committed record

Each subject trains the same stack of linear layers under DDP in fresh memory, for a few steps over gloo; so does DDP
alone. What is counted are the storages that operators make (`llmsys.profile.live`), in the thread that trains and in
those in which callbacks decompress. The difference of the two peaks, in copies of the gradients, is what a method
costs. How many buckets are under way at once depends a little on what else the machine does, by a few hundredths.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import multiprocessing
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import side_by_side
from llmsys.job import Record, code_hash

NAME = "compress_memory"
STEPS, BATCH, BUCKET_MIB = 5, 2, 25.0
"""Both factors of ACP-SGD, and a step that refreshes, are in five steps; 25 MiB is DDP's own size of buckets."""
MOST = 1.1
"""Copies of the gradients that were asked for."""


@dataclass(frozen=True)
class Subject:
    """`settings` of a `CompressConfig`; none of DDP alone. `dtype`: of the model."""

    settings: dict[str, Any] | None
    dtype: str = "float32"


@dataclass(frozen=True)
class Stack:
    """The model: `layers` matrices of width x width, with their biases."""

    layers: int
    width: int


METHODS = ("none", "fp16", "bf16", "sign", "efsign", "topk", "randomk", "powersgd", "acpsgd")
SUBJECTS = {
    **{method: Subject({"method": method}) for method in METHODS},
    "topk 1 %": Subject({"method": "topk", "density": 0.01}),
    "topk 1 %, threshold": Subject({"method": "topk", "density": 0.01, "select": "threshold"}),
    "acpsgd, refreshed": Subject({"method": "acpsgd", "refresh_every": 2}),
    "powersgd, refreshed": Subject({"method": "powersgd", "refresh_every": 2}),
    "acpsgd, bf16": Subject({"method": "acpsgd"}, "bfloat16"),
    "acpsgd, bf16, errors half": Subject({"method": "acpsgd", "error_dtype": "half"}, "bfloat16"),
    "topk, bf16": Subject({"method": "topk"}, "bfloat16"),
    "efsign, bf16": Subject({"method": "efsign"}, "bfloat16"),
}


@dataclass
class Found:
    """Of one subject, rank by rank: `peaks` in bytes, `alone` those of DDP by itself, and the `gradients`' bytes."""

    gradients: int = 0
    peaks: list[int] = field(default_factory=list)
    alone: list[int] = field(default_factory=list)

    @property
    def copies(self) -> list[float]:
        return [(peak - plain) / self.gradients for peak, plain in zip(self.peaks, self.alone, strict=True)]


def peak(subject: Subject, stack: Stack) -> tuple[int, int]:
    """(the most bytes alive that were not before, bytes of the gradients) of a training on this rank. Collective."""
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from llmsys.compress import CompressConfig, register
    from llmsys.compress.transfer import Transfer
    from llmsys.profile.live import Live

    torch.manual_seed(0)
    dtype = getattr(torch, subject.dtype)
    model = nn.Sequential(*(nn.Linear(stack.width, stack.width) for _ in range(stack.layers))).to(dtype)
    live, start = Live(), Transfer._start

    def counted(transfer: Transfer) -> bool:
        if threading.current_thread() is threading.main_thread():
            return start(transfer)
        with _also(live):  # the mode is a thread's own
            return start(transfer)

    Transfer._start = counted  # type: ignore[method-assign]
    try:
        with live:
            ddp = DistributedDataParallel(model, bucket_cap_mb=BUCKET_MIB, gradient_as_bucket_view=True)
            if subject.settings is not None:
                register(ddp, CompressConfig(**subject.settings))
            for step in range(STEPS):
                x = torch.randn(BATCH, stack.width, generator=torch.Generator().manual_seed(step)).to(dtype)
                ddp(x).square().mean().backward()
                with torch.no_grad():
                    for p in model.parameters():
                        p -= 0.01 * p.grad  # type: ignore[operator]
                model.zero_grad()
    finally:
        Transfer._start = start  # type: ignore[method-assign]
    return live.peak, sum(p.nbytes for p in model.parameters())


def _also(live: Any) -> Any:
    """A mode that counts for `live` in this thread."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Also(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return live.__torch_dispatch__(func, types, args, kwargs)

    return Also()


def rank_main(rank: int, world: int, wanted: Sequence[str], stack: Stack, pipe: Connection) -> None:
    """One rank: sends what it found of each of `wanted`."""
    import torch

    from llmsys.comm.group import group
    from llmsys.comm.place import LOOPBACK, Place, listen

    listener = None
    if rank == 0:
        listener, port = listen(LOOPBACK)
        pipe.send(port)
    else:
        port = pipe.recv()
    torch.set_num_threads(1)
    with group(Place(rank=rank, world=world, store=(LOOPBACK, port), listener=listener), torch.device("cpu")):
        plain: dict[str, int] = {}
        for name in wanted:
            subject = SUBJECTS[name]
            if subject.dtype not in plain:
                plain[subject.dtype], _ = peak(Subject(None, subject.dtype), stack)
            most, gradients = peak(subject, stack)
            pipe.send((name, gradients, most, plain[subject.dtype]))


def measure(wanted: Sequence[str], stack: Stack, world: int) -> dict[str, Found]:
    """Of each subject, on `world` fresh processes. RuntimeError where one ends early."""
    context = multiprocessing.get_context("spawn")
    found = {name: Found() for name in wanted}
    pipes, ranks = [], []
    for rank in range(world):
        ours, theirs = context.Pipe()
        ranks.append(context.Process(target=rank_main, args=(rank, world, list(wanted), stack, theirs), daemon=True))
        ranks[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        port = pipes[0].recv()
        for pipe in pipes[1:]:
            pipe.send(port)
        for name in wanted:
            for pipe in pipes:
                _, found[name].gradients, most, plain = pipe.recv()
                found[name].peaks.append(most)
                found[name].alone.append(plain)
            print(f"{name}: {max(found[name].copies):.3f} copies", flush=True)
    except EOFError:
        raise RuntimeError("a rank ended before it had measured everything; it says why above") from None
    finally:
        for process, pipe in zip(ranks, pipes, strict=True):
            process.join(timeout=30)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()
    return found


def table(record: Record) -> str:
    """As Markdown."""
    rows = ["| extra memory over DDP | copies of the gradients |", "|---|---|"]
    rows += [f"| {name} | {copies:.2f} |" for name, copies in by_subject(record).items()]
    stack = record.config["stack"]
    text = f"{stack['layers']} linear layers of width {stack['width']}, {record.world} ranks"
    return "\n".join([*rows, "", f"{text}, torch {record.env['packages']['torch']}"])


def by_subject(record: Record) -> dict[str, float]:
    """The worst rank's copies of the gradients."""
    return {name: record.summary[f"{name}/extra_copies"] for name in record.config["subjects"]}


def main(words: Sequence[str]) -> Record:
    """Measures, writes the record, prints its table, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=4)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--out", type=Path, default=side_by_side.RECORDS)
    parser.add_argument("--kept", action="store_true", help="the table of the record in benchmarks/records")
    asked = parser.parse_args(words)
    if asked.kept:
        from llmsys import results

        made = max(results.read(side_by_side.RECORDS / NAME), key=lambda each: each.started)
    else:
        made = record(asked)
        made.leave(asked.out)
    print(table(made))
    return made


def record(asked: argparse.Namespace) -> Record:
    from llmsys.profile import environment

    began, start = datetime.datetime.now(datetime.UTC), time.monotonic()
    stack = Stack(asked.layers, asked.width)
    found = measure(asked.subjects, stack, asked.world)
    config: dict[str, Any] = {
        "stack": {"layers": stack.layers, "width": stack.width},
        "steps": STEPS,
        "batch": BATCH,
        "bucket_mib": BUCKET_MIB,
        "subjects": {name: {"dtype": SUBJECTS[name].dtype, **(SUBJECTS[name].settings or {})} for name in found},
    }
    env = environment.describe("cpu", asked.world)
    text = json.dumps([config, asked.world, env["packages"]], sort_keys=True)
    return Record(
        name=NAME,
        run_id=hashlib.sha256(text.encode()).hexdigest()[:12],
        task="benchmark",
        status="ok",
        config=config,
        env=env,
        code_hash=code_hash(),
        started=began.isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - start, 1),
        world=asked.world,
        summary={f"{name}/extra_copies": round(max(each.copies), 4) for name, each in found.items()},
        samples={f"{name}/peak_bytes": [float(n) for n in each.peaks] for name, each in found.items()}
        | {f"{name}/ddp_peak_bytes": [float(n) for n in each.alone] for name, each in found.items()},
    )


if __name__ == "__main__":
    main(sys.argv[1:])
