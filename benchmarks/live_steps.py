"""One rank's real training steps under a counter of live bytes: the most that is alive in each span of a step.

The model is built, prepared, wrapped and trained by the shared trainer, with every storage counted from the first
(`llmsys.profile.live`; on a GPU by torch's allocator), so weights, gradients and the optimizer's state are in it. The
second step is looked at: the first one makes AdamW's state, and ZeRO-3 learns in it in which order weights are used.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmsys import data, job, models, schema, wiring
from llmsys.comm.group import group
from llmsys.comm.place import Place
from llmsys.context import Context
from llmsys.profile import memory
from llmsys.profile.live import Live
from llmsys.profile.spans import Spans
from llmsys.schema import recompute
from llmsys.track.jsonl import JsonLines
from llmsys.train.loop import Loop
from llmsys.train.reproducible import reproducible
from llmsys.train.task import load_tokenizer

STEPS = 2


class Allocator(contextlib.AbstractContextManager["Allocator"]):
    """What `Live` says of a GPU: the bytes that torch's allocator has given out."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> Allocator:
        torch.cuda.empty_cache()
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.empty_cache()

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def mark(self) -> int:
        torch.cuda.reset_peak_memory_stats(self.device)
        return self.now


class Marks(Spans):
    """Spans that note the most bytes alive within each, of the last step."""

    def __init__(self, device: torch.device, live: Live | Allocator) -> None:
        super().__init__(device)
        self.live = live
        self.peaks: dict[str, int] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if name == "step":
            self.peaks = {}
        self.live.mark()
        try:
            with super().__call__(name):
                yield
        finally:
            self.peaks[name] = max(self.peaks.get(name, 0), self.live.peak)
            self.live.mark()


def measured(place: Place, config: dict[str, Any]) -> dict[str, Any]:
    """`peaks` by span of the step, `peak` of all, `between`: bytes alive between two steps; `held`: the bytes of what
    the engine says it holds, and `saved`: those that autograd keeps of a micro-batch. `config` is a plain one, resolved
    to a device (`auto` is the CPU)."""
    typed = schema.build(config)
    device = torch.device("cuda" if typed.hardware.device == "cuda" else "cpu")
    alone = contextlib.nullcontext() if typed.engine.kind == "local" else group(place, device)
    linear = torch.nn.functional.linear
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            alone,
            reproducible(typed.train.seed, typed.train.threads, typed.train.deterministic),
            Live() if device.type == "cpu" else Allocator(device) as live,
        ):
            loop = made(typed, place, device, Path(folder))
            marks = loop.spans = Marks(device, live)
            loop.wrapped.train()
            before = 0
            for step in range(1, STEPS + 1):
                before = live.now
                with marks.step():
                    loop.step(step)
            peaks = {name: peak for name, peak in marks.peaks.items() if name != "step"}
            batch = {key: value.to(device) for key, value in loop.micro_batches(0)[0].items()}
            saved = memory.saved_tensors(loop.model, lambda: loop.forward(batch, 1))
            loop.engine.settle()
            kept = loop.context.grad_sync.held()
            held = memory.accounted({**loop.engine.held(), **({"compress": kept} if kept else {})}, 0)
    finally:
        torch.nn.functional.linear = linear  # which ZeRO-3 replaces for good
    static = int(held["accounted_bytes"])
    return {"peaks": peaks, "peak": max(peaks.values()), "between": before, "held": static, "saved": saved}


def made(config: schema.Config, place: Place, device: torch.device, out: Path) -> Loop:
    """The trainer's loop of a config, as `train.task` makes it."""
    source = data.open(config.data, config.model.objective)
    tokenizer = load_tokenizer(config.model, None)
    dataset = data.encode(source, tokenizer, config.train, config.model)
    context = Context(
        out=out,
        place=place,
        device=device,
        threads=config.train.threads,
        code_hash=job.code_hash(),
        log=logging.getLogger("llmsys.live"),
        method=wiring.method(config.method, config.train.seed),
        engine=wiring.engine(config, place, device),
        grad_sync=wiring.grad_sync(config),
        metrics=JsonLines(out / "metrics.jsonl"),
    )
    labels = len(source.labels)
    model = models.load(
        config.model, objective=source.objective, num_labels=labels, device=device, seed=config.train.seed, folder=None
    )
    model = context.method.prepare(model, ())
    if isinstance(config.model, schema.Transformer):
        context.method.recompute(model, recompute.policies(config.train.recompute, len(models.blocks(model))))
    if config.train.loss == "chunked":
        models.chunk_loss(model)
    return Loop(config, context, model, dataset, 1e-4, tokenizer)


if __name__ == "__main__":
    print(json.dumps(measured(Place(), json.loads(sys.stdin.read()))))
