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
    bandwidth_percent                                            see `share`; `peak_gbps` of the device
    server_start_s, host_peak_gib, device_peak_gib, cache_used_max
    max_rate_per_s                                               where it was searched

`requests.jsonl` has a line for each request, written as it ends, with the time of each token.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import statistics
import time
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

from llmsys import schema
from llmsys.bench.serve import figures, rate, servers, tables
from llmsys.bench.serve.client import Client
from llmsys.bench.serve.load import Request, draw
from llmsys.bench.serve.outcome import OK, Outcome
from llmsys.bench.serve.share import share
from llmsys.bench.serve.watch import Watch
from llmsys.train import peaks

if TYPE_CHECKING:
    from llmsys.context import Context

REQUESTS = "requests.jsonl"
SETTLED_S = 2.0
WARMING, SEARCHING = -1, 10_000
"""In place of a repeat's number: loads that are none of them, and are drawn anew."""


def serve(config: schema.Config, context: Context) -> dict[str, Any]:
    """The record. ValueError for requests that the model has no positions for, and what `servers.started` raises."""
    task, model = config.task, config.model
    assert isinstance(task, schema.Serve)
    if not isinstance(model, schema.Transformer) or model.objective != "causal_lm":
        raise ValueError(f"model={model.name}: generates no text; e.g. model=llama_6m")
    loads = [draw(task, model.vocab_size, repeat) for repeat in range(task.repeats)]
    longest = max(len(each.prompt) + each.new for load in loads for each in load)
    if longest > model.max_length:
        raise ValueError(f"task.prompt_tokens and task.output_tokens: a request has {longest} tokens, and "
                         f"model={model.name} at most {model.max_length}: model.max_length")  # fmt: skip
    with (context.out / REQUESTS).open("w", encoding="utf-8") as file:
        return asyncio.run(_Serving(config, context, file).run(loads, longest))


class _Serving:
    def __init__(self, config: schema.Config, context: Context, file: IO[str]) -> None:
        assert isinstance(config.task, schema.Serve)
        assert isinstance(config.model, schema.Transformer)
        self.task, self.config, self.context, self.file = config.task, config, context, file
        self.vocabulary = config.model.vocab_size
        self.probes: list[tuple[float, dict[str, float]]] = []

    async def run(self, loads: Sequence[Sequence[Request]], longest: int) -> dict[str, Any]:
        task, context = self.task, self.context
        found: list[list[Outcome]] = []
        async with servers.started(self.config, context, longest) as running:
            watch = Watch(running.pid, running.metrics, context.beat)
            looking = asyncio.create_task(watch.run())
            try:
                if task.warmup:
                    context.beat(phase="warming up")
                    await self._load(running, draw(task, self.vocabulary, WARMING)[: task.warmup], WARMING)
                self._reset()
                for repeat, load in enumerate(loads):
                    if running.ended():
                        break
                    context.beat(phase=f"repeat {repeat + 1} of {len(loads)}")
                    found.append(await self._load(running, load, repeat))
                    await self._settled(running, found[-1])
                    one = figures.of(found[-1], task)
                    context.track({"step": repeat, **one})
                    context.log.info("repeat %d: %s", repeat, tables.line(one))
                most = await self._search(running) if task.max_rate and not running.ended() else None
                gone = running.ended()
            finally:
                looking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await looking
        return self._record(found, running, watch, most, gone)

    async def _settled(self, running: servers.Running, outcomes: Sequence[Outcome]) -> None:
        """A server whose lines broke may be about to end: its process is given a moment to say so."""
        deadline = time.monotonic() + SETTLED_S
        while any(each.status in ("refused", "closed") for each in outcomes) and not running.ended():
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(0.05)

    async def _load(self, running: servers.Running, load: Sequence[Request], repeat: int) -> list[Outcome]:
        task = self.task
        searched = repeat >= SEARCHING

        def ended(outcome: Outcome) -> None:
            self.context.beat()
            if repeat != WARMING:
                self.file.write(json.dumps({"repeat": repeat, **outcome.to_json()}) + "\n")
                self.file.flush()

        most = 0 if searched else task.concurrency
        client = Client(running.server, most=most, request_s=task.request_s, all_s=task.repeat_s, ended=ended)
        return await client.run(load)

    async def _search(self, running: servers.Running) -> float:
        task = self.task
        poisson = schema.Serve(**{**vars(task), "arrivals": "poisson", "trace": "", "rate": 1.0})

        async def good(wanted: float) -> bool:
            if running.ended():
                return False
            self.context.beat(phase=f"{wanted:.3g} requests a second")
            number = SEARCHING + len(self.probes)
            one = figures.of(await self._load(running, draw(poisson, self.vocabulary, number, wanted), number), task)
            self.probes.append((wanted, one))
            return one["good_share"] >= task.attained

        return await rate.highest(good, task.rate or 1.0, task.max_rate_percent)

    def _reset(self) -> None:
        import torch

        if self.context.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.context.device)

    def _record(
        self,
        found: Sequence[Sequence[Outcome]],
        running: servers.Running,
        watch: Watch,
        most: float | None,
        gone: str,
    ) -> dict[str, Any]:
        import torch

        task, context = self.task, self.context
        repeats = [figures.of(each, task) for each in found]
        summary = {**figures.together(repeats), **running.summary, "loads": len(repeats)}
        if watch.peak_bytes:
            summary["host_peak_gib"] = watch.peak_bytes / 2**30
        if context.device.type == "cuda" and isinstance(self.config.server, schema.InProcessServer):
            summary["device_peak_gib"] = torch.cuda.max_memory_allocated(context.device) / 2**30
        if watch.cache:
            summary["cache_used_max"] = max(used for _, used in watch.cache)
        if most is not None:
            summary["max_rate_per_s"] = most
        every = [each for one in found for each in one]
        if not isinstance(self.config.server, schema.StubServer) and not getattr(self.config.server, "url", ""):
            memory = peaks.measured_memory(self.config, context.device)
            assert isinstance(self.config.model, schema.Transformer)
            shares = [share(one, self.config.model) / memory.per_s for one in found]
            summary |= (
                {"bandwidth_percent": 100 * statistics.fmean(shares), "peak_gbps": memory.per_s / 1e9} if shares else {}
            )
        latencies = figures.latencies(every)
        del latencies["itl_ms"]  # one for each token: `requests.jsonl` has their times
        samples = {key: [round(each, 4) for each in values] for key, values in latencies.items()}
        samples["output_tokens_per_s"] = [each.get("output_tokens_per_s", 0.0) for each in repeats]
        notes = dict(running.notes)
        if "peak_gbps" in summary:
            notes["peak_gbps"] = memory.source
        counted = {each.counted for each in every if each.token_s}
        if counted - {"ids"}:
            notes["tokens"] = "the server shows no ids: pieces of text are counted, which may have several tokens each"
        title = f"{self.config.model.name} by {self.config.server.name}"
        text = tables.markdown(summary, repeats, self.probes, title, notes)
        (context.out / "serve.md").write_text(text, encoding="utf-8")
        made: dict[str, Any] = {"summary": summary, "samples": {k: v for k, v in samples.items() if v}, "notes": notes,
                                "files": {"tables": "serve.md", "requests": REQUESTS}}  # fmt: skip
        return {**made, **_ending(every, len(found), task, gone)}


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
