"""A job of the owner's, run: the broker in this process, its providers wherever the task says that they are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsys import schema
from llmsys.decentral import contributions, noise, owner, schedule
from llmsys.decentral.broker import Job
from llmsys.decentral.chain import Chain
from llmsys.decentral.compression import NONE
from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.cost import Workload
from llmsys.decentral.credentials import address, token_in
from llmsys.decentral.event_log import EVENTS, EventLog, last_step, read
from llmsys.decentral.fleet import Between
from llmsys.decentral.link import Credentials
from llmsys.decentral.processes import Processes
from llmsys.decentral.serve import Serving
from llmsys.decentral.training import Training
from llmsys.decentral.whereabouts import JobLost
from llmsys.errors import MissingPackage
from llmsys.files import write_atomic
from llmsys.schema.together import OWNER, fault

if TYPE_CHECKING:
    from llmsys.context import Context
    from llmsys.decentral.ray_runtime import Nodes

MIB = 2**20
ALONE_S = 5.0
KNOWN = "broker.json"
"""What whoever dials again knows of a broker: its port, the token, and the name of the job. There as long as the job is
not done."""


class Running:
    """Of `task`: `chain` for `work`, by `training(exports)`. `committed(step)` is called after each step,
    `made(coordinator)` before anything happens."""

    def __init__(
        self,
        task: schema.Together,
        context: Context,
        chain: Chain,
        work: Workload,
        training: Callable[[ThreadPoolExecutor], Training],
        committed: Callable[[int], None],
        made: Callable[[Coordinator], None] = lambda coordinator: None,
    ) -> None:
        self.task, self.context, self.chain, self.work = task, context, chain, work
        self.training, self.committed, self.made = training, committed, made
        self.coordinator: Coordinator
        self.ended_s: dict[int, float] = {}
        self.hit: dict[int, float] = {}  # when somebody was, by the step that had just been committed
        self.sent: dict[str, int] = {}  # bytes, by provider
        self.alone_s = 0.0  # since when nobody holds the job, and nobody will come
        self.warned = 0  # of what checks have found

    def run(self) -> None:
        """The broker, until the job is done. One that was killed goes on from its events, where its providers are not
        this machine's processes, which ended with it."""
        task, context = self.task, self.context
        host, wanted = address("task.listen", task.listen)
        own = Path(task.certificate).read_bytes() if task.certificate else None
        credentials = None if own is None else Credentials(certificate=own, key=Path(task.key).read_bytes())
        events = context.out / EVENTS
        if task.start == "process" or not (context.out / KNOWN).exists():  # begun anew, or done before
            events.unlink(missing_ok=True)
        noted = read(events)
        token, port, name = self._known(wanted, going_on=bool(noted))
        with (
            ThreadPoolExecutor(1, thread_name_prefix="export") as elsewhere,
            contextlib.closing(EventLog(events)) as log,
            self._started(token, own) as started,
        ):
            machines = owner.machines(task, self.chain, self.work) if started is not None else []
            pool: dict[str, Any] = {"least": task.providers, "reserve": task.reserve, "name": name}
            job = Job(chain=self.chain, work=self.work, other=Between(delay_ms=task.delay_ms), **pool)
            self.coordinator = Coordinator(job, self.training(elsewhere), log.note, log.sync)
            self.made(self.coordinator)
            if noted:
                context.log.warning("going on after step %d, by %s", last_step(noted), events.name)
                self.coordinator.rebuild(noted, noted[-1][0].at_s)

            def ready(port: int) -> None:
                context.beat(phase=f"waiting for {task.providers} providers at port {port}")
                context.log.info("the broker listens on %s:%d", host, port)
                write_atomic(context.out / KNOWN, json.dumps({"port": port, "token": token, "job": name}), mode=0o600)
                for each in machines:
                    assert started is not None
                    started.start(each, f"{host}:{port}")

            def committed(step: int) -> None:
                self.ended_s[step] = time.perf_counter()
                self.committed(step)
                for who, what in [(who, what) for who, what, at in map(fault, task.faults) if at == step]:
                    assert isinstance(started, Processes)
                    stage = who.removeprefix(OWNER)
                    name = self.coordinator.owners[int(stage)] if stage.isdigit() else who
                    context.log.warning("step %d: %s to %s", step, what, name)
                    started.signal(name, what)
                    self.hit[step] = time.perf_counter()

            def looking() -> None:
                self._looking()
                if isinstance(started, Processes):
                    self._nobody_comes(started.gone())
                elif started is not None:
                    started.again()

            trusted = token_in(Path(task.trusted_token_file)) if task.trusted_token_file else ""
            serving = Serving(self.coordinator, token, committed, looking, trusted)
            try:
                asyncio.run(serving.run(host, port, credentials, ready))
            except JobLost:
                self._looking()
                events.rename(events.with_suffix(".lost"))  # or the next attempt would go on where nothing is left
                raise
            finally:
                given = self.coordinator.accounts.to_json()
                write_atomic(context.out / contributions.FILE, json.dumps(given, indent=1) + "\n")
            self.sent = serving.sent
            for name, why in started.wrong().items() if started is not None else ():
                context.log.warning("provider %s: %s", name, why)
        (context.out / KNOWN).unlink()
        (context.out / noise.FILE).unlink(missing_ok=True)

    def _looking(self) -> None:
        self.context.beat()
        verdicts = self.coordinator.checks.verdicts
        for each in verdicts[self.warned :]:
            self.context.log.warning("%s", each)
        self.warned = len(verdicts)

    def _nobody_comes(self, gone: list[str]) -> None:
        """JobLost where processes that we have started are gone, and those that are left hold no job, for a while."""
        waits = self.coordinator.state.plan is None and bool(gone) and not self.coordinator.finished
        self.alone_s = (self.alone_s or time.monotonic()) if waits else 0.0
        if waits and time.monotonic() > self.alone_s + ALONE_S:
            who = ", ".join(gone)
            raise JobLost(f"{who}: gone, and the other providers do not hold the job: more of them (task.providers), "
                          "or larger ones (task.mem_gib)")  # fmt: skip

    def _known(self, port: int, *, going_on: bool) -> tuple[str, int, str]:
        """The token, the port and, of a job that goes on, its name, which whoever dials again knows already."""
        path = self.context.out / KNOWN
        before = json.loads(path.read_text()) if path.exists() and self.task.start != "process" else {}
        if self.task.token_file:
            token = token_in(Path(self.task.token_file))
        else:
            token = str(before.get("token", secrets.token_hex(16)))
        name = before.get("job", "") if going_on else secrets.token_hex(8)
        return token, port or int(before.get("port", 0)), str(name)

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
            lines: dict[str, Any] = {"emulate": task.emulate, "delay_ms": task.delay_ms, "direct": task.direct}
            with Processes(context.out / "providers", token, context.threads, path, **lines) as processes:
                yield processes

    # --- what came of it ---

    def took_ms(self, step: int) -> float | None:
        """From the commit before it to its own; None where this process saw only one of them."""
        both = self.ended_s.get(step), self.ended_s.get(step - 1)
        return None if None in both else (self.ended_s[step] - self.ended_s[step - 1]) * 1e3

    def figures(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Summary and samples that all such tasks share."""
        own, steps = self.coordinator, sorted(self.coordinator.updates)
        seen, moved = own.happened, sum(self.sent.values())
        took = [each for step in steps if (each := self.took_ms(step)) is not None]
        recovered = [self.ended_s[s + 1] - at for s, at in self.hit.items() if s + 1 in self.ended_s]
        summary: dict[str, float] = {
            "steps": len(steps),
            "steps_again": own.again,
            "plans": seen["Planned"],
            "joined": seen["Joined"],
            "lost": seen["Lost"] + seen["Left"],
            "stages": len(own.owners),
            "moved_mib": moved / MIB,
            "per_step_mib": moved / MIB / max(1, len(self.ended_s)),  # both of this process alone
        }
        if own.training.checks:
            summary |= own.checks.counts()
        if self.task.direct:
            summary["direct_mib"] = sum(own.directory.carried.values()) / MIB
        if took:
            summary["step_ms_p50"] = statistics.median(took)
        state = own.state
        if state.plan is not None:
            timing = schedule.Timing.of(state.costs, state.plan.pipelines[0])
            spans = schedule.run(timing, self.work.schedule, self.work.micro_batches)
            summary["predicted_step_ms"] = schedule.ends_s(spans) * 1e3
            codecs = own.recovery.where.now.codecs
            summary["compressed"] = sum(each != NONE for each in (*codecs.ahead[:-1], *codecs.back[1:]))
        if recovered:
            summary["recovery_s_p50"] = statistics.median(recovered)
        for name, given in own.accounts.to_json().items():
            for key in ("share", "tflop", "forward", "sent_mib", "copies_mib", "present_s"):
                summary[f"provider/{name}/{key}"] = given[key]
        samples = {"step_ms": took, "recovery_s": recovered}
        return summary, {key: each for key, each in samples.items() if each}

    def notes(self) -> dict[str, str]:
        """To the summary, in words."""
        checks = self.coordinator.checks
        found = {"cheats": "; ".join(checks.verdicts)} if checks.verdicts else {}
        if checks.doubtful is not None:
            found["loss"] = f"not to be trusted after step {checks.doubtful}"
        if checks.unchecked:
            found["unchecked"] = "no copies or logs to begin with, or nobody free with the same stack and room for it"
        return found
