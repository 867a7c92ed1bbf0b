"""What our training loop costs over a bare PyTorch loop.

    python benchmarks/loop_overhead.py [--steps 200] [--warmup 10] [--out benchmarks/records] [llmsys overrides ...]

Ours is the whole run of `pretrain_llama_6m` on synthetic tokens, by `llmsys.runner`, one rank: batches cut out of the
data set, spans, checks for NaN, metrics to the run's file after every step, progress sent into a descriptor.

The peer is what one would write by hand, and no more: batches made beforehand, forward, `loss.backward()`,
`clip_grad_norm_`, the fused AdamW in one group, `zero_grad`, `loss.item()`. No data, no schedule, no file.

Both start from the same weights and see the same batches; that all their losses are equal, bit for bit, is asserted.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import side_by_side
from llmsys import compose, data, job, models, runner, schema
from llmsys.data import tokenizer
from llmsys.dispatch.worker import Pipe
from llmsys.track import jsonl

SETTINGS = ["+exp=pretrain_llama_6m", "data=synthetic", "data.max_val=8", "train.schedule=constant"]
SETTINGS += ["train.warmup_steps=0", "train.weight_decay=0", "train.checkpoint_every=0", "train.save_final=false"]


class Bare:
    """The loop that one would write by hand. Makes its batches and model when made, and a step when called."""

    def __init__(self, config: schema.Config, rank: int = 0, world: int = 1) -> None:
        """`config` with one micro-batch a step and rank, of which this is rank `rank` of `world`."""
        train, model = config.train, config.model
        self.config = config
        self.batches = batches(config, rank, world)
        device = torch.device(config.hardware.device)
        built = models.load(model, objective=model.objective, num_labels=0, device=device, seed=train.seed, folder=None)
        self.parameters = list(built.parameters())
        self.model = self.wrap(built)
        rate = train.lr_by_method["full"]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0, fused=True)
        self.losses: list[float] = []

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call."""
        return model

    def __call__(self) -> None:
        loss = self.model(**self.batches[len(self.losses)]).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())


def batches(config: schema.Config, rank: int, world: int) -> list[dict[str, Tensor]]:
    """The rank's batch of every step, on the device."""
    train = config.train
    assert train.global_batch == world * train.micro_batch, "the bare loop accumulates nothing"
    source = data.open(config.data, config.model.objective)
    split = data.encode(source, tokenizer.load(config.model.tokenizer, None), train, config.model).train
    made = []
    for step in range(train.steps):
        rows = data.order(len(split), train.global_batch, train.seed, step)[rank * train.micro_batch :]
        batch = split.batch(rows[: train.micro_batch])
        made.append({key: value.to(config.hardware.device) for key, value in batch.items()})
    return made


class Progress:
    """Sends progress where a worker does, down a descriptor; to nobody. A context manager."""

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        self._descriptor = os.open(os.devnull, os.O_WRONLY)
        pipe = Pipe(self._descriptor)
        return lambda progress: pipe.send(progress=progress)

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def arguments(text: str, words: Sequence[str]) -> argparse.Namespace:
    """`steps`, `warmup`, `out` and `overrides`; ValueError where so few steps make no pairs."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--out", type=Path, default=side_by_side.RECORDS)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args(words)
    side_by_side.check_steps(asked.steps, asked.warmup)
    return asked


def main(words: Sequence[str]) -> job.Record:
    """Measures, writes the record, prints its table, and returns it."""
    asked = arguments(__doc__ or "", words)
    with tempfile.TemporaryDirectory() as folder:
        wanted = [*SETTINGS, f"train.steps={asked.steps}", f"results={folder}", *asked.overrides]
        run = job.make(compose.compose(wanted))
        config = schema.build(run.config)
        torch.set_num_threads(config.train.threads)
        peer = Bare(config)
        with Progress() as progress:
            turns = side_by_side.Turns(peer, told=progress)
            record = runner.run(run, turns)
        result = side_by_side.finish(record, "loop_overhead", turns, asked.warmup, asked.out)
        ours = [row["loss"] for row in jsonl.read(Path(run.out) / "metrics.jsonl") if "loss" in row]
    assert ours == peer.losses, "the two loops do not compute the same thing"
    print(side_by_side.show(result))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
