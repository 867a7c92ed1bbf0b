"""The tasks `decentral_train` and `decentral_finetune`: the one trainer's model, data and steps, run by providers.

The owner, this process, traces the model, plans, and is the broker; providers compute. A step's loss is the mean over
all its label positions, as in `llmsys.train.loop`: each micro-batch's loss is traced with a weight. Keys:

    loss, val_loss, ...            of the last step; of the trained model on the whole validation split
    tokens_per_s, step_ms_p50      of committed steps; samples have each step's loss and ms
    predicted_step_ms              by the planner's own events, for the last plan and what providers say of themselves
    steps, steps_again             that were committed, each once; attempts of one that were given up
    recovery_s_p50                 of faults: from the signal to the next commit
    lost, joined, plans, stages    how often somebody went, came, and a new plan was made; stages of the last one
    compressed                     lines of the last plan, each way by itself, that are; not all where `adaptive`
    moved_mib, per_step_mib        what providers sent, and what each step moves of it
    direct_mib                     what of that went past the broker, as those say who received it
    provider/<name>/share, ...     what each has done (`contributions`)
    checked, unchecked             with `task.checks`: steps of stages that were computed again; that could not be
    cheats, undecided              who was sent away for what it said; how often nobody could say who is wrong
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

from llmsys import schema
from llmsys.decentral import contributions, noise, owner
from llmsys.decentral.chain import chain
from llmsys.decentral.cost import Workload
from llmsys.decentral.event_log import EVENTS
from llmsys.decentral.exports import Exports
from llmsys.decentral.planes import AdamW, Rules
from llmsys.decentral.planes.layout import packed, unpacked
from llmsys.decentral.running import Running
from llmsys.decentral.training import Training
from llmsys.train.task import Trainer, trainer

if TYPE_CHECKING:
    from llmsys.context import Context


def train(config: schema.Config, context: Context) -> dict[str, Any]:
    """The record's summary and samples; `weights`, `events.jsonl`, `contributions.json`, and in `providers/` what
    providers have said."""
    with trainer(config, context) as ready:
        context.beat(phase="tracing the model")
        job = _Job(config, context, ready)
        job.running.run()
        return job.record()


class _Job:
    def __init__(self, config: schema.Config, context: Context, ready: Trainer) -> None:
        task, own = config.task, config.train
        assert isinstance(task, schema.DecentralTrain)
        self.config, self.context, self.task, self.ready = config, context, task, ready
        self.loop, self.batches = ready.loop, owner.Batches(ready.loop)
        self.traced = owner.traced(self.loop.model, self.batches.of(1)[0])
        size = {"train.micro_batch": own.micro_batch, "train.length": own.length}
        self.chain = owner.carried(chain(self.traced.graph), task, size)
        work = Workload(
            micro_batches=own.global_batch // own.micro_batch,
            most=1,
            private=owner.pins(self.chain, task.private),
            compress=task.compress,
        )
        self.rules = Rules(
            micro_batches=work.micro_batches, optimizer=AdamW(weight_decay=own.weight_decay), seed=own.seed
        )
        self.running = Running(task, context, self.chain, work, self.training, self.committed)

    def training(self, elsewhere: Executor) -> Training:
        own, loop, task = self.config.train, self.loop, self.task
        return Training(
            graph=self.traced.graph,
            chain=self.chain,
            tensors={key: packed(tensor) for key, tensor in self.traced.tensors.items()},
            rules=self.rules,
            data=lambda step: [{k: packed(v) for k, v in each.items()} for each in self.batches.of(step)],
            steps=own.steps,
            rate=lambda step: loop.lr * loop.schedule(step - 1),
            clip=own.clip,
            exports=Exports(self.rules, elsewhere),
            copies=task.copies,
            owner_keeps=task.owner_keeps,
            hung_s=task.hung_s,
            copy_every=task.copy_every,
            checks=task.checks,
            on_cheat=task.on_cheat,
            noise=noise.of(task.noise, self.context.out),
        )

    def committed(self, step: int) -> None:
        own, train = self.running.coordinator, self.config.train
        update, took_ms = own.updates[step], self.running.took_ms(step)
        row: dict[str, Any] = {"step": step, "loss": update.loss, "lr": update.rate}
        row["providers"] = len(own.state.present)
        if took_ms is not None:
            row |= {"step_ms": took_ms, "tokens_per_s": self.batches.tokens[step] / took_ms * 1e3}
        shown = {key: row[key] for key in ("loss", "tokens_per_s") if key in row}
        self.context.beat(step=step, steps=train.steps, **shown)
        if step % train.log_every == 0 or step == train.steps:
            self.context.track(row)

    def record(self) -> dict[str, Any]:
        config, running = self.config, self.running
        updates = running.coordinator.updates
        owner.put(self.loop.model, {key: unpacked(each) for key, each in running.coordinator.trained.items()})
        scores = self.loop.evaluate(config.train.steps)
        files = {"events": EVENTS, "contributions": contributions.FILE}
        if config.train.save_final:
            meta = {"exp": config.name, "method": config.method.kind, "base": dataclasses.asdict(config.model)}
            kept = self.context.method.state(self.loop.model)
            self.context.method.save(kept, self.context.out / "weights", {**meta, "steps": config.train.steps})
            files["weights"] = "weights"
        figures, samples = running.figures()
        steps = sorted(updates)
        timed = [step for step in steps if running.took_ms(step) is not None]
        spent_s = sum(running.took_ms(step) or 0.0 for step in timed) / 1e3
        summary = {
            "loss": updates[steps[-1]].loss,
            **scores,
            **figures,
            "trainable_params": self.loop.sizes["trainable_params"],
            "total_params": self.loop.sizes["total_params"],
        }
        if timed:
            summary["tokens_per_s"] = sum(self.batches.tokens[step] for step in timed) / spent_s
        return {
            "summary": summary,
            "samples": {"loss": [updates[step].loss for step in steps], **samples},
            "notes": running.notes(),
            "files": files,
            "data_hash": self.ready.data_hash,
        }
