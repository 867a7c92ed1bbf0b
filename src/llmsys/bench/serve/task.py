"""The task `bench_serve`: a server under load, `task.repeats` times. Keys of the summary, of each load's mean:

    requests_per_s, input_tokens_per_s, output_tokens_per_s      of requests that ended well; `_half_percent` and
                                                                 `_cv_percent`: their spread over repeats
    ttft_ms_p50, tpot_ms_p50, itl_ms_p50, e2e_ms_p50, ...        p50, p90, p95, p99, mean and max: first token, time per
                                                                 token, between tokens, all
    lag_ms_p99                                                   sent so much after it was due
    goodput_per_s, good_share                                    of requests that kept what they had to
    ok, refused, error, malformed, closed, timeout, cut          how requests ended
    waiting_max, under_way_max                                   without a token yet; in all
    added_ms_p50, ...                                            of the stub: a first token came so much later than the
                                                                 server says that it sent it
    client/added_ms_p50, client/lag_ms_p99, ...                  of our client alone, see `check`
    bandwidth_percent                                            see `share`; `peak_gbps` of the device
    predicted/output_tokens_per_s, predicted/ttft_ms_p50, ...    of the same loads, see `predict`
    slower                                                       passes in this engine, of the model's own, see `slower`
    server_start_s, host_peak_gib, device_peak_gib, cache_used_max
    max_rate_per_s, max_rate_bounded, max_rate_confirmed         where it was searched, see `rate.Found`

`requests.jsonl` has a line for each request, written as it ends, with the time of each token.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llmsys import schema
from llmsys.bench.serve import against, check, figures, limits, rate, servers, tables
from llmsys.bench.serve.client import Client
from llmsys.bench.serve.load import Request, draw, longest, probe, read_trace, warming
from llmsys.bench.serve.outcome import OK, Outcome
from llmsys.bench.serve.watch import Watch

if TYPE_CHECKING:
    from llmsys.context import Context

REQUESTS = "requests.jsonl"
SETTLED_S = 2.0
LATE_MS = 10.0
"""A load of which more than a hundredth is sent later than this is none of its rate."""
WARMING, SEARCHING = -1, 10_000
"""In place of a repeat's number: loads that are none of them, and are drawn anew."""


def serve(config: schema.Config, context: Context) -> dict[str, Any]:
    """The record. Raises what `servers.started` does; what can be said before a run begins, `asked.check` has said."""
    task, model = config.task, config.model
    assert isinstance(task, schema.Serve)
    assert isinstance(model, schema.Transformer)
    if trace := context.inputs.get("trace"):
        config = dataclasses.replace(config, task=(task := dataclasses.replace(task, trace=trace)))
    loads = [draw(task, model.vocab_size, repeat) for repeat in range(task.repeats)]
    limits.many_files()
    with (context.out / REQUESTS).open("w", encoding="utf-8") as file:
        return asyncio.run(_Serving(config, context, file).run(loads, longest(task)))


class _Serving:
    def __init__(self, config: schema.Config, context: Context, file: IO[str]) -> None:
        assert isinstance(config.task, schema.Serve)
        assert isinstance(config.model, schema.Transformer)
        self.task, self.config, self.context, self.file = config.task, config, context, file
        self.model, self.vocabulary = config.model, config.model.vocab_size
        self.loads: list[list[Outcome]] = []
        self.others: list[Outcome] = []
        """Those of warming up and of the search that did not end well: no figure is of them."""
        self.probes: list[tuple[float, dict[str, float]]] = []
        self.summary: dict[str, float] = {}
        self.notes: dict[str, str] = {}

    async def run(self, loads: Sequence[Sequence[Request]], longest: int) -> dict[str, Any]:
        task, context = self.task, self.context
        if task.check_client and not isinstance(self.config.server, schema.StubServer):
            context.beat(phase="checking the client")
            self.summary |= await check.client(task, loads[0], context)
        device = self._device_bytes()  # before there is a server on it
        async with servers.started(self.config, context, longest) as running:
            watch = Watch(running.pid, running.metrics, device, context.beat)
            looking = asyncio.create_task(watch.run())
            try:
                context.beat(phase="warming up")
                outcomes = await self._load(running, warming(task, self.vocabulary), WARMING)
                await self._settled(running, outcomes)
                self.others += [each for each in outcomes if each.status != OK]
                watch.reset()
                for repeat, load in enumerate(loads):
                    if running.ended():
                        break
                    context.beat(phase=f"repeat {repeat + 1} of {len(loads)}")
                    self.loads.append(await self._load(running, load, repeat))
                    await self._settled(running, self.loads[-1])
                    one = figures.of(self.loads[-1], task)
                    context.track({"step": repeat, **one})
                    context.log.info("repeat %d: %s", repeat, tables.line(one))
                self._watched(watch)
                if task.max_rate and not running.ended():
                    await self._search(running)
                gone = running.ended()
            finally:
                looking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await looking
        return self._record(running, gone, loads)

    async def _settled(self, running: servers.Running, outcomes: Sequence[Outcome]) -> None:
        """A server whose lines broke may be about to end: its process is given a moment to say so."""
        deadline = time.monotonic() + SETTLED_S
        while any(each.status in ("refused", "closed") for each in outcomes) and not running.ended():
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(0.05)

    async def _load(self, running: servers.Running, load: Sequence[Request], repeat: int) -> list[Outcome]:
        task = self.task

        def ended(outcome: Outcome) -> None:
            self.context.beat()
            outcome.left(self.file, repeat)

        most = 0 if repeat >= SEARCHING else task.concurrency
        client = Client(running.server, most=most, request_s=task.request_s, all_s=task.repeat_s, ended=ended)
        return await client.run(load)

    async def _search(self, running: servers.Running) -> None:
        task = self.task

        async def good(wanted: float, draws: int) -> bool:
            if running.ended():
                return False
            self.context.beat(phase=f"{wanted:.3g} requests a second")
            number = len(self.probes)
            load = probe(task, self.vocabulary, number, wanted, draws)
            outcomes = await self._load(running, load, SEARCHING + number)
            await self._settled(running, outcomes)
            self.others += [
                each for each in outcomes if each.status not in (OK, "timeout", "cut")
            ]  # these are overload
            one = figures.of(outcomes, task)
            self.probes.append((wanted, one))
            kept = one["good_share"] >= task.attained
            apart = not isinstance(self.config.server, schema.ModelServer)
            if one.get("lag_ms_p99", 0.0) > LATE_MS and (kept or apart):  # in one process what is late is the service
                raise rate.TooFast
            return kept

        found = await rate.highest(good, task.rate or 1.0, task.max_rate_percent)
        self.summary |= {"max_rate_per_s": found.rate, "max_rate_bounded": int(found.bounded),
                         "max_rate_confirmed": int(found.confirmed)}  # fmt: skip
        said = []
        if found.undecided:
            said.append(f"at {found.undecided:.3g} a second our client was late, and the search ended: what the server "
                        "makes of that rate is not known")  # fmt: skip
        elif found.rate and not found.bounded:
            said.append(f"more than {rate.MOST_PROBES} rates were not tried")
        if found.bounded and found.rate and not found.confirmed:
            said.append("another draw of the same rate was not kept, or not sent in time: it is not to be relied on")
        if said:
            self.notes["max_rate_per_s"] = "; ".join(said)

    def _device_bytes(self) -> Callable[[], int]:
        """On a GPU what is used there beyond what is now, by whomever; 0 elsewhere."""
        import torch

        device = self.context.device
        if device.type != "cuda":
            return lambda: 0
        before = torch.cuda.mem_get_info(device)[0]
        return lambda: max(0, before - torch.cuda.mem_get_info(device)[0])

    def _watched(self, watch: Watch) -> None:
        if watch.peak_bytes:
            self.summary["host_peak_gib"] = watch.peak_bytes / 2**30
        if watch.device_bytes:
            self.summary["device_peak_gib"] = watch.device_bytes / 2**30
        if watch.cache_used >= 0:
            self.summary["cache_used_max"] = watch.cache_used

    def _record(self, running: servers.Running, gone: str, loads: Sequence[Sequence[Request]]) -> dict[str, Any]:
        task, context = self.task, self.context
        repeats = [figures.of(each, task) for each in self.loads]
        summary = {**figures.together(self.loads, task), **running.summary, "loads": len(repeats), **self.summary}
        notes = {**running.notes, **self.notes}
        if running.here and repeats:
            done = loads[: len(repeats)]
            summary |= against.machine(self.config, context, running.batching, done, self.loads, notes)
        every = [each for one in self.loads for each in one]
        latencies = figures.latencies(every)
        del latencies["itl_ms"]  # one for each token: `requests.jsonl` has their times
        samples = {key: [round(each, 4) for each in values] for key, values in latencies.items()}
        samples["output_tokens_per_s"] = [each.get("output_tokens_per_s", 0.0) for each in repeats]
        samples |= figures.thinned(figures.queued(self.loads[0])) if self.loads else {}
        if any(each.counted != "ids" for each in every if each.token_s):
            notes["tokens"] = "the server shows no ids: pieces of text have times, and its own count is the count"
        if any(each.tokens_in != each.input for each in every):
            notes["input"] = "by its count the server has read other numbers of tokens than were meant"
        if task.arrivals == "trace":
            notes["trace"] = f"{len(loads[0])} of {len(read_trace(Path(task.trace)))} rows"
        if len(every) < 100:
            notes["p99"] = f"of {len(every)} requests it is nearly the largest value"
        title = f"{self.model.name} by {tables.server(dataclasses.asdict(self.config.server))}"
        text = tables.markdown(summary, repeats, self.probes, title, notes)
        (context.out / "serve.md").write_text(text, encoding="utf-8")
        made: dict[str, Any] = {"summary": summary, "samples": {k: v for k, v in samples.items() if v}, "notes": notes,
                                "files": {"tables": "serve.md", "requests": REQUESTS}}  # fmt: skip
        return {**made, **_ending([*self.others, *every], len(repeats), task, gone)}


def _ending(every: Sequence[Outcome], done: int, task: schema.Serve, server: str) -> dict[str, str]:
    """How the run ended, where not every request ended well: its figures are of those that did."""
    wrong = [each for each in every if each.status != OK]
    if not wrong and done == task.repeats and not server:
        return {}
    counts = collections.Counter(each.status for each in wrong)
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    parts = [f"{len(wrong)} of {len(every)} requests did not end well: {said}" if wrong else ""]
    parts += [f"{done} of {task.repeats} repeats were begun" if done < task.repeats else "", server]
    parts += [f"the first: {wrong[0].why}" if wrong else ""]
    reason = "server" if server else "requests"
    return {"status": "failed", "reason": reason, "error": "; ".join(each for each in parts if each)}
