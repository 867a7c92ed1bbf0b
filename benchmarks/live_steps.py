"""One rank's real training steps under a counter of live bytes: the most that is alive in each span of a step.

The model is built, prepared, wrapped and trained by the shared trainer, with every storage counted from the first
(`llmsys.profile.live`), so weights, gradients and the optimizer's state are in it. The second step is looked at: the
first one makes AdamW's state, and ZeRO-3 learns in it in which order weights are used.
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
from llmsys.profile.live import Live
from llmsys.profile.spans import Spans
from llmsys.schema import recompute
from llmsys.track.jsonl import JsonLines
from llmsys.train.loop import Loop
from llmsys.train.reproducible import reproducible
from llmsys.train.task import load_tokenizer

STEPS = 2


class Marks(Spans):
    """Spans that note the most bytes alive within each, of the last step."""

    def __init__(self, device: torch.device, live: Live) -> None:
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
    """`peaks` by span of the step, `peak` of all, `between`: bytes alive between two steps. `config` is a plain one."""
    typed, device = schema.build(config), torch.device("cpu")
    alone = contextlib.nullcontext() if typed.engine.kind == "local" else group(place, device)
    linear = torch.nn.functional.linear
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            alone,
            reproducible(typed.train.seed, typed.train.threads, typed.train.deterministic),
            Live() as live,
        ):
            loop = _loop(typed, place, device, Path(folder))
            marks = loop.spans = Marks(device, live)
            loop.wrapped.train()
            before = 0
            for step in range(1, STEPS + 1):
                before = live.now
                with marks.step():
                    loop.step(step)
            peaks = {name: peak for name, peak in marks.peaks.items() if name != "step"}
    finally:
        torch.nn.functional.linear = linear  # which ZeRO-3 replaces for good
    return {"peaks": peaks, "peak": max(peaks.values()), "between": before}


def _loop(config: schema.Config, place: Place, device: torch.device, out: Path) -> Loop:
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
