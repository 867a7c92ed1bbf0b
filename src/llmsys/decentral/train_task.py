"""The tasks `decentral_train` and `decentral_finetune`: the one trainer's model, data and steps, run by providers.

The owner, this process, traces the model, plans, and is the broker; providers compute. A step's loss is the mean over
all its label positions, as in `llmsys.train.loop`: each micro-batch's loss is traced with a weight. Keys:

    loss, val_loss, ...            of the last step; of the trained model on the whole validation split
    tokens_per_s, step_ms_p50      of committed steps; samples have each step's loss and ms
    steps_lost, steps_again        committed ones that were done again (none), attempts that were given up
    recovery_s_p50                 of faults: from the signal to the next commit
    lost, joined, plans            how often somebody went, came, and a new plan was made
    moved_mib, per_step_mib        what went over the broker's lines, of which each step moves
    provider/<name>/tasks, mib     forward and backward passes of stages that counted; what it sent
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import secrets
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsys import schema
from llmsys.decentral import owner
from llmsys.decentral.broker import Job
from llmsys.decentral.chain import chain
from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.cost import Workload
from llmsys.decentral.event_log import EventLog, last_step, read
from llmsys.decentral.exports import Exports
from llmsys.decentral.link import Credentials
from llmsys.decentral.planes import AdamW, Rules
from llmsys.decentral.planes.layout import packed, unpacked
from llmsys.decentral.processes import Processes
from llmsys.decentral.recovery import JobLost
from llmsys.decentral.serve import Serving
from llmsys.decentral.training import Training
from llmsys.errors import MissingPackage
from llmsys.files import write_atomic
from llmsys.schema.together import fault
from llmsys.train.task import Trainer, trainer

if TYPE_CHECKING:
    from llmsys.context import Context
    from llmsys.decentral.ray_runtime import Nodes

MIB = 2**20
KNOWN = "broker.json"
"""What whoever dials again knows of a broker: its port, and the token."""


def train(config: schema.Config, context: Context) -> dict[str, Any]:
    """The record's summary and samples; `weights`, `events.jsonl`, and what providers have said in `providers/`."""
    task = config.task
    assert isinstance(task, schema.DecentralTrain)
    with trainer(config, context) as ready:
        context.beat(phase="tracing the model")
        run = _Run(config, context, task, ready)
        run.go()
        return run.record()


class _Run:
    def __init__(self, config: schema.Config, context: Context, task: schema.DecentralTrain, ready: Trainer) -> None:
        self.config, self.context, self.task, self.ready = config, context, task, ready
        self.loop, self.batches = ready.loop, owner.Batches(ready.loop)
        self.traced = owner.traced(self.loop.model, self.batches.of(1)[0])
        self.chain = chain(self.traced.graph)
        own = config.train
        self.work = Workload(micro_batches=own.global_batch // own.micro_batch, most=1)
        self.ended_s: dict[int, float] = {}
        self.hit: dict[int, float] = {}  # when somebody was, by the step that had just been committed
        self.sent: dict[str, int] = {}

    # --- the job ---

    def job(self) -> Job:
        task = self.task
        return Job(chain=self.chain, work=self.work, least=task.providers, reserve=task.reserve)

    def training(self, elsewhere: ThreadPoolExecutor) -> Training:
        own, loop, task = self.config.train, self.loop, self.task
        rules = Rules(
            micro_batches=self.work.micro_batches,
            optimizer=AdamW(weight_decay=own.weight_decay),
            seed=own.seed,
        )
        return Training(
            graph=self.traced.graph,
            chain=self.chain,
            tensors={key: packed(tensor) for key, tensor in self.traced.tensors.items()},
            rules=rules,
            data=lambda step: [{k: packed(v) for k, v in each.items()} for each in self.batches.of(step)],
            steps=own.steps,
            rate=lambda step: loop.lr * loop.schedule(step - 1),
            clip=own.clip,
            exports=Exports(rules, elsewhere),
            copies=task.copies,
            copy_every=task.copy_every,
        )

    # --- the run ---

    def go(self) -> None:
        """The broker, until the job is done. One that was killed goes on from its events, where its providers are not
        this machine's processes, which ended with it."""
        task, context = self.task, self.context
        host, _, wanted = task.listen.rpartition(":")
        token, port = self._known(int(wanted))
        own = Path(task.certificate).read_bytes() if task.certificate else None
        credentials = None if own is None else Credentials(certificate=own, key=Path(task.key).read_bytes())
        events = context.out / "events.jsonl"
        if task.start == "process":
            events.unlink(missing_ok=True)
        noted = read(events)
        with (
            ThreadPoolExecutor(1, thread_name_prefix="export") as elsewhere,
            contextlib.closing(EventLog(events)) as log,
            self._started(token, own) as started,
        ):
            machines = owner.machines(task, self.chain, self.work) if started is not None else []
            self.coordinator = Coordinator(self.job(), self.training(elsewhere), log.note)
            if noted:
                context.log.warning("going on after step %d, by %s", last_step(noted), events.name)
                self.coordinator.rebuild(noted, noted[-1][0].at_s)

            def ready(port: int) -> None:
                context.beat(phase=f"waiting for {task.providers} providers at port {port}")
                context.log.info("the broker listens on %s:%d", host, port)
                write_atomic(context.out / KNOWN, json.dumps({"port": port, "token": token}), mode=0o600)
                for each in machines:
                    assert started is not None
                    started.start(each, f"{host}:{port}")

            def committed(step: int) -> None:
                self._note(step)
                for name, what in [(name, what) for name, what, at in map(fault, task.faults) if at == step]:
                    assert isinstance(started, Processes)
                    context.log.warning("step %d: %s to %s", step, what, name)
                    started.signal(name, what)
                    self.hit[step] = time.perf_counter()

            serving = Serving(self.coordinator, token, committed)
            try:
                asyncio.run(serving.run(host, port, credentials, ready))
            except JobLost:
                events.rename(events.with_suffix(".lost"))  # or the next attempt would go on where nothing is left
                raise
            self.sent = serving.hub.received
            for name, why in started.wrong().items() if started is not None else ():
                context.log.warning("provider %s: %s", name, why)
        (context.out / KNOWN).unlink()

    def _known(self, port: int) -> tuple[str, int]:
        """The token, and the port, which whoever dials again knows already."""
        path = self.context.out / KNOWN
        before = json.loads(path.read_text()) if path.exists() and self.task.start != "process" else {}
        if self.task.token_file:
            token = Path(self.task.token_file).read_text(encoding="utf-8").strip()
        else:
            token = str(before.get("token", secrets.token_hex(16)))
        return token, port or int(before.get("port", 0))

    @contextlib.contextmanager
    def _started(self, token: str, certificate: bytes | None) -> Iterator[Processes | Nodes | None]:
        task, context = self.task, self.context
        if task.start == "none":
            yield None
        elif task.start == "ray":
            try:
                from llmsys.decentral import ray_runtime
            except ModuleNotFoundError as error:
                raise MissingPackage(f"task.start=ray: needs {error.name}: pip install 'llmsys[ray]'") from None
            given: dict[str, Any] = {"threads": context.threads, "certificate": certificate}
            with ray_runtime.Nodes(context.out.name, token, task.providers, **given) as nodes:
                yield nodes
        else:
            path = Path(task.certificate) if task.certificate else None
            with Processes(context.out / "providers", token, context.threads, path) as processes:
                yield processes

    def _note(self, step: int) -> None:
        now, own = time.perf_counter(), self.coordinator.updates[step]
        before = self.ended_s.get(step - 1)
        self.ended_s[step] = now
        row: dict[str, Any] = {"step": step, "loss": own.loss, "lr": own.rate}
        row["providers"] = len(self.coordinator.state.present)
        if before is not None:
            row["step_ms"] = (now - before) * 1e3
            row["tokens_per_s"] = self.batches.tokens[step] / (now - before)
        shown = {key: row[key] for key in ("loss", "tokens_per_s") if key in row}
        self.context.beat(step=step, steps=self.config.train.steps, **shown)
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            self.context.track(row)

    # --- what came of it ---

    def record(self) -> dict[str, Any]:
        config, own = self.config, self.coordinator
        state = {key: unpacked(each) for key, each in own.trained.items()}
        owner.put(self.loop.model, state)
        scores = self.loop.evaluate(config.train.steps)
        files = {"events": "events.jsonl"}
        if config.train.save_final:
            meta = {"exp": config.name, "method": config.method.kind, "base": dataclasses.asdict(config.model)}
            kept = self.context.method.state(self.loop.model)
            self.context.method.save(kept, self.context.out / "weights", {**meta, "steps": config.train.steps})
            files["weights"] = "weights"
        seen = own.happened
        steps = sorted(own.updates)
        took = [(self.ended_s[s] - self.ended_s[s - 1]) * 1e3 for s in steps if s - 1 in self.ended_s]
        timed = sorted(self.ended_s)
        spent = self.ended_s[timed[-1]] - self.ended_s[timed[0]]
        moved = sum(self.sent.values())
        summary: dict[str, float] = {
            "loss": own.updates[steps[-1]].loss,
            **scores,
            "steps_lost": seen["Committed"] - len(steps),
            "steps_again": own.again,
            "plans": seen["Planned"],
            "joined": seen["Joined"],
            "lost": seen["Lost"] + seen["Left"],
            "stages": len(own.owners),
            "moved_mib": moved / MIB,
            "per_step_mib": moved / MIB / len(steps),
            "trainable_params": self.loop.sizes["trainable_params"],
            "total_params": self.loop.sizes["total_params"],
        }
        if took:
            summary["step_ms_p50"] = statistics.median(took)
            summary["tokens_per_s"] = sum(self.batches.tokens[s] for s in timed[1:]) / spent
        recovered = [self.ended_s[s + 1] - at for s, at in self.hit.items() if s + 1 in self.ended_s]
        if recovered:
            summary["recovery_s_p50"] = statistics.median(recovered)
        for name, count in sorted(own.tasks.items()):
            summary[f"provider/{name}/tasks"] = count
            summary[f"provider/{name}/mib"] = self.sent.get(name, 0) / MIB
        samples = {"loss": [own.updates[s].loss for s in steps], "step_ms": took, "recovery_s": recovered}
        return {
            "summary": summary,
            "samples": {key: each for key, each in samples.items() if each},
            "files": files,
            "data_hash": self.ready.data_hash,
        }
