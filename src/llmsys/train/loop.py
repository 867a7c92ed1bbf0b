"""The one training loop.

A step trains on `global_batch` examples, cut into micro-batches that fit into memory. The gradient is that of the mean
over all label positions of the *global* batch: with n_i positions in micro-batch i and n in all,

    loss = sum_i (n_i / n) loss_i

where loss_i is the mean that the model returns. So neither the micro-batch nor the number of ranks changes the result
(averaging the loss_i instead, as is often done, weights a token by how short its neighbours are).

Where there are batch norms the micro-batch does matter: its statistics normalise it. The micro-batches are the same
sets of examples on any number of ranks, so the ranks still do not. The running statistics, which evaluation uses, are
averaged over the ranks; their momentum is that of all ranks' micro-batches one after another, 1 - (1 - m)^ranks, which
weights those of one step alike instead of the later ones more.

Everything the next step depends on is in a checkpoint (weights, optimizer, random streams); the data order and the
learning rate are pure functions of the step. So a run that was killed goes on with the same bits.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmsys import schema
from llmsys.comm import collectives
from llmsys.comm.traffic import Traffic
from llmsys.errors import Interrupted
from llmsys.models import float8, inventory, quant
from llmsys.profile.energy import Energy
from llmsys.profile.memory import Peak
from llmsys.profile.spans import Spans
from llmsys.train import optimizer
from llmsys.train.evaluate import autocast, evaluate, label_count, token_count
from llmsys.train.protocols import filled
from llmsys.train.saver import Saver
from llmsys.train.watch import Watch

if TYPE_CHECKING:
    from llmsys.context import Context
    from llmsys.data import Dataset
    from llmsys.data.tokenizer import Tokenizer
    from llmsys.models.filling import Filler


@dataclass
class Outcome:
    """What a loop leaves: the last losses, raw measurements, and where it went on from (None: from the start)."""

    loss: float = math.nan
    evaluation: dict[str, float] = field(default_factory=dict)
    resumed_from_step: int | None = None
    tokens_per_step: float = 0.0


class Loop:
    """A prepared model with its optimizer; `run` trains it to the end."""

    def __init__(
        self,
        config: schema.Config,
        context: Context,
        model: nn.Module,
        dataset: Dataset,
        lr: float,
        tokenizer: Tokenizer | None = None,
        fill: Filler | None = None,
    ) -> None:
        """Loads this run's newest checkpoint, if there is one, into the model, in place, and hands it to the engine,
        with what fills those of its parameters that are not filled yet."""
        self.config, self.context, self.dataset, self.tokenizer = config, context, dataset, tokenizer
        self.device, self.engine = context.device, context.engine
        self.model, self.lr = model, lr
        self.watch = Watch(config.train)
        self.saver = Saver(config, context, self.watch)
        if config.train.fp8:
            float8.convert(model)
        self.saver.find()
        self.saver.load_model(model, fill)
        if self.engine.data_rank:  # equal until here, so that ranks start from one model; their dropout must differ
            torch.manual_seed(config.train.seed + 2**32 * self.engine.data_rank)
        self.sizes = {  # before an engine cuts the weights
            "trainable_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "total_params": quant.parameter_count(model),
            "linear_weights_trained": int(quant.linear_weights_trained(model)),
        }
        context.table("modules", inventory.COLUMNS, inventory.rows(model))
        self.wrapped = self.engine.wrap(model, lambda whole: optimizer.adamw(whole, config.train, lr), fill or filled)
        context.grad_sync.attach(self.wrapped)
        # Elsewhere gradients are exchanged within the backward pass, and `aggregate` has nothing to do.
        self.exchanges = config.compress.kind != "none" and self.engine.world > 1 and config.engine.kind == "deepspeed"
        self.saver.load_rest(model)
        self._speed_up_statistics()
        self.schedule = optimizer.schedule(config.train)
        self.spans = Spans(self.device)
        self.peak = Peak(self.device)
        self.energy = Energy(self.device)
        self.traffic = Traffic()

    def mixed(self) -> AbstractContextManager[object]:
        return autocast(self.device, self.config.train.precision, self.config.model.dtype)

    def micro_batches(self, step: int) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of step `step` (from 0), on the host, each padded to `train.length`."""
        from llmsys.data import order

        train, engine = self.config.train, self.engine
        indices = order(len(self.dataset.train), train.global_batch, train.seed, step)
        size = train.micro_batch
        cut = [indices[i : i + size] for i in range(0, len(indices), size)]
        return [
            self.dataset.train.batch(part, seed=(train.seed, step))
            for part in cut[engine.data_rank :: engine.data_world]
        ]

    def run(self) -> Outcome:
        """Trains from the newest checkpoint, or from the start, to the last step; evaluates the whole split at the end.

        Raises NotANumber, naming the step, before a NaN reaches the weights; Interrupted, with a checkpoint written,
        when the context is asked to stop; OSError where a checkpoint cannot be written, with the previous one whole.
        """
        train, start = self.config.train, self.saver.start
        outcome = Outcome(resumed_from_step=start or None)
        self.context.trim_metrics(start)
        # At least one step is timed, however short the run.
        self.spans.warmup = min(self.config.profile.warmup, train.steps - start - 1)
        self.wrapped.train()
        self.context.stoppable = True
        tokens = 0
        self.peak.resume()
        for step in range(start + 1, train.steps + 1):
            before = time.perf_counter()
            if step == start + 1 + self.spans.warmup:
                self.energy.resume()
            # Counted in a step that is not timed: a dispatch mode costs microseconds an operator.
            counted = self.config.profile.probe and step == start + 1 and self.spans.warmup > 0
            with self.spans.step(), self.traffic if counted else nullcontext():
                row = self.step(step)
            self.energy.tick()
            stop = bool(row.pop("stop"))
            tokens += int(row["tokens"])
            row["step_ms"] = (time.perf_counter() - before) * 1e3
            if trained_on := row.pop("tokens"):  # images have none
                row["tokens_per_s"] = trained_on / row["step_ms"] * 1e3
            self._note(step, row)
            if row["loss"] is not None:  # of the last step that was not left out
                outcome.loss = row["loss"]
            last = step == train.steps
            if last or (train.eval_every and step % train.eval_every == 0):
                self._pause()
                outcome.evaluation = self.evaluate(step)
                self._resume(step)
                better = self.saver.better(step, outcome.evaluation["val_loss"])
            else:
                better = False
            due = bool(train.checkpoint_every) and (better or step % train.checkpoint_every == 0)
            if (due or stop) and not last:
                self._pause()
                self.save(step)
                self._resume(step)
            if stop and not last:
                raise Interrupted(f"stopped after step {step}; the same command goes on from there")
        if self.saver.keeps_last:
            self._pause()
            self.saver.save_last(train.steps, self.model)  # after an evaluation: statistics are averaged
            self._resume(train.steps)
        self.context.stoppable = False
        outcome.tokens_per_step = tokens / max(train.steps - start, 1)
        return outcome

    def _pause(self) -> None:
        """What follows is no part of the steps that are measured."""
        self.peak.pause()
        self.energy.pause()

    def _resume(self, step: int) -> None:
        """The steps go on, of which `step` was done."""
        self.peak.resume()
        if step < self.config.train.steps and step > self.saver.start + self.spans.warmup:
            self.energy.resume()

    def _note(self, step: int, row: dict[str, Any]) -> None:
        """Tells the progress bar, the metrics, and the watch over losses, which may end the run."""
        train = self.config.train
        verdict = self.watch.see(step, row["loss"], row["grad_norm"])
        if verdict:
            row[verdict] = True
            self.context.log.warning("step %d: %s (loss %g, norm %g)", step, verdict, row["loss"], row["grad_norm"])
        row.update({key: None for key in ("loss", "grad_norm") if not math.isfinite(row[key])})  # JSON has no NaN
        shown = {key: row[key] for key in ("loss", "tokens_per_s") if row.get(key) is not None}
        self.context.beat(step=step, steps=train.steps, **shown)
        if step % train.log_every == 0 or step == train.steps or verdict:
            self.context.track(row)

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step (from 1); changes the model and the optimizer in place.

        Returns the row for `metrics.jsonl`; `tokens` is what all ranks trained on, padding left out, and `stop`
        whether one of them has been asked to stop.
        """
        engine, spans = self.engine, self.spans
        with spans("data"):
            batches = self.micro_batches(step - 1)
            objective = self.config.model.objective
            labels = [label_count(batch, objective) for batch in batches]
            own = [sum(labels), sum(token_count(batch, objective) for batch in batches)]
            batches = [{key: value.to(self.device) for key, value in batch.items()} for batch in batches]
        with spans("agreement") if engine.world > 1 else nullcontext():
            everywhere, tokens = engine.sum(torch.tensor(own, dtype=torch.float64)).tolist()
        if everywhere == 0:
            raise ValueError(f"data: step {step} has no label token within train.length={self.config.train.length}")
        loss = torch.zeros((), device=self.device)
        for number, (batch, count) in enumerate(zip(batches, labels, strict=True), 1):
            with engine.accumulate(last=number == len(batches)):
                with spans("forward"):
                    part = self.forward(batch, count) * (count / everywhere)
                with spans("backward"):
                    engine.backward(part * engine.divisor)
            loss += part.detach()
        with spans("communication") if self.exchanges else nullcontext():
            self.context.grad_sync.aggregate(self.wrapped)
        with spans("optimizer"):
            lr = self.lr * self.schedule(step - 1)
            for group in engine.optimizer.param_groups:
                group["lr"] = lr
            asked = torch.full_like(loss, self.context.stop_asked)
            (loss_value, stop), norm = engine.step(torch.stack([loss, asked]), self.config.train.clip)
        return {"step": step, "loss": loss_value, "lr": lr, "grad_norm": norm, "tokens": tokens, "stop": stop}

    def forward(self, batch: dict[str, Tensor], labels: int) -> Tensor:
        """The mean loss over the batch's `labels` label positions, in fp32; 0 (with a graph) where it has none."""
        with self.mixed():
            out = self.wrapped(**batch)
        # train.loss=chunked has no logits, and of a batch without labels that loss of 0
        loss: Tensor = out.loss if labels or out.logits is None else out.logits.sum() * 0.0
        return loss.float()

    def evaluate(self, step: int) -> dict[str, float]:
        """Scores on the whole validation split, tracked as a row of their own."""
        train = self.config.train
        self.average_statistics()
        result = evaluate(
            self.wrapped,
            self.dataset.val,
            train.eval_batch,
            objective=self.config.model.objective,
            engine=self.engine,
            device=self.device,
            mixed=self.mixed,
            beat=lambda: self.context.beat(step=step, steps=train.steps),
            tokenizer=self.tokenizer,
            generate_max=train.generate_max,
            target_length=train.target_length,
        )
        self.context.track({"step": step, **result})
        return result

    def save(self, step: int) -> None:
        """Writes a checkpoint of everything that the steps after `step` depend on."""
        self.average_statistics()
        self.saver.save(step, self.model)

    def _speed_up_statistics(self) -> None:
        """Each rank's running statistics see one of `data_world` micro-batches: see this file's docstring."""
        for norm in self._batch_norms():
            if norm.momentum is not None:
                norm.momentum = 1 - (1 - norm.momentum) ** self.engine.data_world

    @torch.no_grad()
    def average_statistics(self) -> None:
        """Makes batch norms' running statistics, of which each rank has seen a share, one on all ranks, in place."""
        if self.engine.data_world == 1:
            return
        for norm in self._batch_norms():
            for statistic in (norm.running_mean, norm.running_var):
                collectives.all_reduce(statistic)
                statistic /= self.engine.data_world

    def _batch_norms(self) -> list[Any]:
        kind = nn.modules.batchnorm._BatchNorm
        return [module for module in self.model.modules() if isinstance(module, kind) and module.track_running_stats]
