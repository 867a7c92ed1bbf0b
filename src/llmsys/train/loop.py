"""The one training loop.

A step trains on `global_batch` sequences, cut into micro-batches that fit into memory. The gradient is that of the mean
over all label positions of the *global* batch: with n_i positions in micro-batch i and n in all,

    loss = sum_i (n_i / n) loss_i

where loss_i is the mean that the model returns. So neither the micro-batch nor the number of ranks changes the result
(averaging the loss_i instead, as is often done, weights a token by how short its neighbours are).

Everything the next step depends on is in a checkpoint (weights, optimizer, schedule, random streams); the data order is
a pure function of (seed, step). So a run that was killed goes on with the same bits.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmsys import schema
from llmsys.errors import NotANumber
from llmsys.profile.memory import Peak
from llmsys.profile.spans import Spans
from llmsys.train import checkpoint, optimizer, reproducible
from llmsys.train.evaluate import autocast, evaluate, label_count, token_count

if TYPE_CHECKING:
    from llmsys.context import Context
    from llmsys.data import Dataset


@dataclass
class Outcome:
    """What a loop leaves: the last losses, raw measurements, and where it went on from (None: from the start)."""

    loss: float = math.nan
    evaluation: dict[str, float] = field(default_factory=dict)
    resumed_from_step: int | None = None
    tokens_per_step: float = 0.0


class Loop:
    """A prepared model with its optimizer; `run` trains it to the end."""

    def __init__(self, config: schema.Config, context: Context, model: nn.Module, dataset: Dataset, lr: float) -> None:
        self.config, self.context, self.dataset = config, context, dataset
        self.device = context.device
        self.model = model
        self.wrapped = context.engine.wrap(model)
        context.grad_sync.attach(self.wrapped)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer.adamw(model, config.train, lr)
        self.schedule = optimizer.schedule(self.optimizer, config.train)
        self.folder = context.out / "checkpoint"
        self.spans = Spans(self.device)
        self.peak = Peak(self.device)

    def mixed(self) -> AbstractContextManager[object]:
        return autocast(self.device, self.config.train.precision, self.config.model.dtype)

    def micro_batches(self, step: int) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of step `step` (from 0), on the host, each padded to `train.length`."""
        from llmsys.data import order

        train, engine = self.config.train, self.context.engine
        indices = order(len(self.dataset.train), train.global_batch, train.seed, step)[engine.rank :: engine.world]
        size = train.micro_batch
        return [self.dataset.train.batch(indices[i : i + size]) for i in range(0, len(indices), size)]

    def run(self) -> Outcome:
        """Trains from the newest checkpoint, or from the start, to the last step; evaluates the whole split at the end.

        Raises NotANumber, naming the step, before a NaN reaches the weights; OSError where a checkpoint cannot be
        written, with the previous one whole.
        """
        train = self.config.train
        start = self.resume()
        outcome = Outcome(resumed_from_step=start or None)
        self.context.trim_metrics(start)
        # At least one step is timed, however short the run.
        self.spans.warmup = min(self.config.profile.warmup, train.steps - start - 1)
        self.wrapped.train()
        tokens = 0
        self.peak.resume()
        for step in range(start + 1, train.steps + 1):
            before = time.perf_counter()
            with self.spans.step():
                row = self.step(step)
            tokens += int(row["tokens"])
            row["step_ms"] = (time.perf_counter() - before) * 1e3
            row["tokens_per_s"] = row.pop("tokens") / row["step_ms"] * 1e3
            outcome.loss = row["loss"]
            self.context.beat(step=step, steps=train.steps, loss=row["loss"], tokens_per_s=row["tokens_per_s"])
            if step % train.log_every == 0 or step == train.steps:
                self.context.track(row)
            last = step == train.steps
            due = bool(train.eval_every) and step % train.eval_every == 0
            if last or due:
                self.peak.pause()
                outcome.evaluation = self.evaluate(step)
                self.peak.resume()
            if train.checkpoint_every and step % train.checkpoint_every == 0 and not last:
                self.peak.pause()
                self.save(step)
                self.peak.resume()
        outcome.tokens_per_step = tokens / (train.steps - start)
        return outcome

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step (from 1); changes the model, the optimizer and the schedule in place.

        Returns the row for `metrics.jsonl`; `tokens` is what this rank trained on, padding left out.
        """
        engine, spans = self.context.engine, self.spans
        with spans("data"):
            batches = self.micro_batches(step - 1)
            labels = [label_count(batch) for batch in batches]
            tokens = sum(token_count(batch) for batch in batches)
            batches = [{key: value.to(self.device) for key, value in batch.items()} for batch in batches]
        everywhere = engine.sum(sum(labels))
        if everywhere == 0:
            raise ValueError(f"data: step {step} has no label token within train.length={self.config.train.length}")
        loss = torch.zeros((), device=self.device)
        for number, (batch, count) in enumerate(zip(batches, labels, strict=True), 1):
            with engine.accumulate(self.wrapped, last=number == len(batches)):
                with spans("forward"):
                    part = self.forward(batch, count) * (count / everywhere)
                with spans("backward"):
                    engine.backward(part * engine.divisor)
            loss += part.detach()
        if engine.world > 1:
            with spans("communication"):
                self.context.grad_sync.aggregate(self.wrapped)
        with spans("optimizer"):
            norm = engine.clip(self.parameters, self.config.train.clip)
            loss_value, norm_value = torch.stack([loss, norm.float()]).tolist()  # the step's one wait for the device
            loss_value = engine.sum(loss_value)
            for what, value in (("loss", loss_value), ("norm of the gradient", norm_value)):
                if not math.isfinite(value):
                    raise NotANumber(f"step {step}: the {what} is {value}")
            lr = self.optimizer.param_groups[0]["lr"]
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad(set_to_none=True)
        return {"step": step, "loss": loss_value, "lr": lr, "grad_norm": norm_value, "tokens": tokens}

    def forward(self, batch: dict[str, Tensor], labels: int) -> Tensor:
        """The mean loss over the batch's `labels` label positions, in fp32; 0 (with a graph) where it has none."""
        with self.mixed():
            out = self.wrapped(**batch)
        loss: Tensor = out.loss if labels else out.logits.sum() * 0.0
        return loss.float()

    def evaluate(self, step: int) -> dict[str, float]:
        """Scores on the whole validation split, tracked as a row of their own."""
        train = self.config.train
        result = evaluate(
            self.wrapped,
            self.dataset.val,
            train.eval_batch,
            device=self.device,
            mixed=self.mixed,
            beat=lambda: self.context.beat(step=step, steps=train.steps),
        )
        self.context.track({"step": step, **result})
        return result

    def save(self, step: int) -> None:
        """Writes a checkpoint of everything that the steps after `step` depend on."""
        state, plain = checkpoint.pack_optimizer(self.optimizer)
        random_tensors, random_plain = reproducible.streams()
        tensors = {
            **checkpoint.prefixed("model", self.context.method.state(self.model)),
            **checkpoint.prefixed("optimizer", state),
            **checkpoint.prefixed("random", random_tensors),
        }
        values = {
            "code_hash": self.context.code_hash,
            "run_id": self.context.out.name,
            "metric_rows": self.context.metrics.count(step),
            "optimizer": plain,
            "schedule": self.schedule.state_dict(),
            "random": random_plain,
        }
        checkpoint.save(self.folder, step, tensors, values)

    def resume(self) -> int:
        """Loads the newest checkpoint that this code and config wrote; returns its step, 0 where there is none."""
        if checkpoint.newest(self.folder) is None:
            return 0
        try:
            tensors, values = checkpoint.load(self.folder) or ({}, {})
            self._check_checkpoint(values)
        except ValueError as error:
            self.context.log.warning("%s; it is removed, and training begins at step 0", error)
            checkpoint.remove(self.folder)
            return 0
        self.context.method.load_state(self.model, checkpoint.unprefixed("model", tensors))
        checkpoint.unpack_optimizer(self.optimizer, checkpoint.unprefixed("optimizer", tensors), values["optimizer"])
        self.schedule.load_state_dict(values["schedule"])
        reproducible.set_streams(checkpoint.unprefixed("random", tensors), values["random"])
        self.context.log.info("resuming from step %d", values["step"])
        return int(values["step"])

    def _check_checkpoint(self, values: dict[str, Any]) -> None:
        """ValueError if a checkpoint is not of this code and run, or if rows of its metrics are gone."""
        wanted = {"schema": checkpoint.SCHEMA, "code_hash": self.context.code_hash, "run_id": self.context.out.name}
        for key, value in wanted.items():
            if values.get(key) != value:
                raise ValueError(f"{self.folder}: of another {key}")
        found = self.context.metrics.count(values["step"])
        if found != values["metric_rows"]:
            rows = f"{found} rows up to the checkpoint, not {values['metric_rows']}"
            raise ValueError(f"{self.context.metrics.path}: {rows}")
