"""What `llmsys.bench.serve` is told: who serves a model, and the load that it is put under."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from llmsys.schema.fields import at_least, one_of
from llmsys.schema.task import Task

ARRIVALS = ("burst", "constant", "poisson", "concurrency", "trace")
LENGTHS = ("fixed", "uniform", "lognormal")
BATCHING = ("continuous", "static")
PROMPTS = ("ids", "text")


@dataclass(kw_only=True)
class Server:
    """Who answers. A task that serves nothing has one too, and does not look at it."""

    kind: str = "transformers"
    name: str = "transformers"

    @property
    def beside(self) -> str:
        """The adapter that each pass takes time for; empty: none, or one that is merged into the weights."""
        return ""


@dataclass(kw_only=True)
class ModelServer(Server):
    """Of the run's model. `adapter`: a folder of LoRA-FA's adapters, as `llmsys.lorafa.save_adapter` leaves it, or
    `random:16`, new ones of that rank, for what they cost; with `merge` they are added to the weights before. `python`:
    the interpreter of a command that is started, so that one sweep has all servers; in process there is no choice."""

    adapter: str = ""
    merge: bool = False
    python: str = ""

    def __post_init__(self) -> None:
        kind, _, rank = self.adapter.partition(":")
        if kind == "random" and not (rank.isdigit() and int(rank)):
            raise ValueError(f"server.adapter={self.adapter}: must be a folder, or a rank: random:16")
        if self.merge and not self.adapter:
            raise ValueError("server.merge=true: needs server.adapter, which says what to merge")

    @property
    def beside(self) -> str:
        return "" if self.merge else self.adapter

    @property
    def adapter_file(self) -> str:
        """The file with the adapters; empty where there are none, or new ones."""
        return f"{self.adapter}/adapter.safetensors" if self.adapter and not self.adapter.startswith("random:") else ""


@dataclass(kw_only=True)
class InProcessServer(ModelServer):
    """transformers, in the process of the run. `batching`: continuous (requests come and go while others are under
    way), or static (a batch of those that wait is done to its end before the next one begins). `max_batch`: so many
    requests at a time, at most. `page`: tokens of one layer that lie together in the paged cache."""

    batching: str = "continuous"
    max_batch: int = 64
    page: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("server.batching", self.batching, BATCHING)
        at_least("server.max_batch", self.max_batch, 1)
        at_least("server.page", self.page, 4)


@dataclass(kw_only=True)
class HttpServer(ModelServer):
    """A server that is spoken to by HTTP. `url`: of one that runs already, http://host:port; empty: `command` is
    started, in which {python} is `python` (empty: this one's), {model} the folder with the weights, its tokenizer and
    config, {dtype} that of the weights (float32), {host} and {port} where it is to listen; `arguments` go behind it. It
    has `start_s` seconds until `health` answers 200. `env`: for the command. `model`: its name to the server; empty:
    what {model} is. `prompts`: as token ids, or, to servers that take none, as text. `body`: more of each request; null
    takes away what is there. `sequences` and `pass_tokens`: so many requests at a time, and tokens of prompts in one
    pass, are what it does as it is started; for predictions, of which there is none where they are 0."""

    url: str = ""
    command: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    health: str = "/health"
    start_s: float = 600.0
    env: dict[str, str] = field(default_factory=dict)
    model: str = ""
    prompts: str = "ids"
    body: dict[str, Any] = field(default_factory=dict)
    sequences: int = 0
    pass_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("server.prompts", self.prompts, PROMPTS)
        at_least("server.sequences", self.sequences, 0)
        at_least("server.pass_tokens", self.pass_tokens, 0)
        if self.url and not _reachable(self.url):
            raise ValueError(f"server.url={self.url}: must be http://host:port, or https://")
        if self.command and not any("{port}" in word for word in self.command):
            raise ValueError(f"server.command={self.command}: says nowhere {{port}}, where it is to listen")
        if self.adapter and (self.url or not self.merge):
            raise ValueError("server.adapter: a server that we start is given the weights with adapters merged into "
                             "them: server.merge=true; one that runs has its own")  # fmt: skip
        if not self.start_s > 0:
            raise ValueError(f"server.start_s={self.start_s}: must be positive")


def _reachable(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


@dataclass(kw_only=True)
class StubServer(Server):
    """A server that computes nothing: it sends tokens at known times, so that what a client adds can be seen. Its first
    token comes `ttft_ms` after a request, each further one `tpot_ms` after the one before. `faults`: what it does to
    every request of a number that they divide, `500:7` to each seventh: 500 (an error), close (after half the
    tokens), stall (it says no more), malformed (no JSON), die (the process ends)."""

    ttft_ms: float = 20.0
    tpot_ms: float = 10.0
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        at_least("server.ttft_ms", self.ttft_ms, 0)
        at_least("server.tpot_ms", self.tpot_ms, 0)
        for text in self.faults:
            what, _, every = text.partition(":")
            one_of(f"server.faults={text}: fault", what, FAULTS)
            if not every.isdigit() or not int(every):
                raise ValueError(f"server.faults={text}: must be a fault and a number, e.g. 500:7")


FAULTS = ("500", "close", "stall", "malformed", "die")


@dataclass(kw_only=True)
class Serve(Task):
    """A load, and what is looked at.

    `arrivals`: when requests are sent: `burst`, all at once; `constant`, `rate` a second, evenly; `poisson`, so many at
    random, with gamma-distributed gaps of shape `burstiness` (1: a Poisson process; less: burstier); `concurrency`, the
    next one when one of `concurrency` has ended; `trace`: as the CSV file `trace` says, with columns arrival_s,
    input_tokens, output_tokens. With `concurrency` more than that are never under way, whatever `arrivals` says.

    `requests` of them (of a trace the first ones, 0: all), each of `prompt_tokens` in and `output_tokens` out, with
    `lengths`: fixed; uniform, up to `spread` times as many more or fewer; lognormal, these medians, and `spread` the
    deviation of their logarithm. The first `shared_prefix` tokens of all prompts are the same. What is drawn depends on
    `seed` and the number of the repeat, and nothing else.

    `repeats`: the load so many times, with prompts of their own. `warmup` requests before, which do not count. A
    request has `request_s` seconds, a repeat `repeat_s`.

    `slo_ttft_ms`, `slo_tpot_ms`, `slo_e2e_ms`: what a request has to keep to count as good; 0: anything. With
    `max_rate` the highest Poisson rate is searched at which a share of `attained` of all requests is good, to
    `max_rate_percent`; each rate is held for `probe_s` seconds at least.

    `speeds`: a folder or `record.json` of a run of `bench_serve_modules` on this machine, from whose passes the load is
    predicted; null: from the rooflines of the device, which is the least that it can take. `served`: one of a run of
    `bench_serve` with `speeds`, of the same server: so many times as long as it has found there passes take in this
    load's prediction too. `check_client`: before the server is started, what our own client adds to such a load is
    measured against the stub.
    """

    kind: str = "bench_serve"
    arrivals: str = "burst"
    requests: int = 64
    rate: float = 0.0
    burstiness: float = 1.0
    concurrency: int = 0
    trace: str = ""
    lengths: str = "fixed"
    spread: float = 0.0
    prompt_tokens: int = 128
    output_tokens: int = 64
    shared_prefix: int = 0
    seed: int = 0
    repeats: int = 1
    warmup: int = 4
    request_s: float = 120.0
    repeat_s: float = 900.0
    slo_ttft_ms: float = 0.0
    slo_tpot_ms: float = 0.0
    slo_e2e_ms: float = 0.0
    max_rate: bool = False
    attained: float = 0.9
    max_rate_percent: float = 10.0
    probe_s: float = 10.0
    check_client: bool = True
    speeds: str | None = None
    served: str | None = None

    def __post_init__(self) -> None:
        one_of("task.arrivals", self.arrivals, ARRIVALS)
        one_of("task.lengths", self.lengths, LENGTHS)
        for key in ("prompt_tokens", "output_tokens", "repeats"):
            at_least(f"task.{key}", getattr(self, key), 1)
        at_least("task.requests", self.requests, 0 if self.arrivals == "trace" else 1)
        for key in ("concurrency", "shared_prefix", "warmup", "rate", "spread", "seed"):
            at_least(f"task.{key}", getattr(self, key), 0)
        for key in ("slo_ttft_ms", "slo_tpot_ms", "slo_e2e_ms"):
            at_least(f"task.{key}", getattr(self, key), 0)
        for key in ("burstiness", "request_s", "repeat_s", "max_rate_percent", "probe_s"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"task.{key}={getattr(self, key)}: must be positive")
        if self.arrivals in ("constant", "poisson") and not self.rate:
            raise ValueError(f"task.rate=0: task.arrivals={self.arrivals} needs requests a second, e.g. task.rate=4")
        if self.arrivals == "concurrency" and not self.concurrency:
            raise ValueError("task.concurrency=0: task.arrivals=concurrency needs a number, e.g. task.concurrency=8")
        if (self.arrivals == "trace") != bool(self.trace):
            raise ValueError("task.trace: a CSV file, and task.arrivals=trace, go together")
        if self.lengths == "uniform" and self.spread >= 1:
            raise ValueError(f"task.spread={self.spread}: must be less than 1 with task.lengths=uniform")
        if self.shared_prefix >= self.prompt_tokens:
            raise ValueError(f"task.shared_prefix={self.shared_prefix}: must be less than task.prompt_tokens")
        if not 0 < self.attained <= 1:
            raise ValueError(f"task.attained={self.attained}: must lie in (0, 1]")
        if self.max_rate and not (self.slo_ttft_ms or self.slo_tpot_ms or self.slo_e2e_ms):
            raise ValueError("task.max_rate=true: needs what a request has to keep, e.g. task.slo_ttft_ms=500")
        if self.speeds == "":
            raise ValueError("task.speeds: empty; it is a run's folder, results/bench_serve_modules/<run id>")
        if self.served is not None and not (self.served and self.speeds):
            raise ValueError(f"task.served={self.served}: must be the folder of a run of bench_serve with task.speeds, "
                             "and needs task.speeds too, the passes of that run")  # fmt: skip


@dataclass(kw_only=True)
class ServeModules(Task):
    """Prefills of `contexts` tokens, and decoding steps behind so many, of `batches` sequences each, `rounds` times,
    half of them with clocks of modules; the first `warmup` rounds do not count. What passes take is fitted to those of
    the first context and the very last cell, and predicted for the others."""

    kind: str = "bench_serve_modules"
    batches: list[int] = field(default_factory=lambda: [1, 4, 16])
    contexts: list[int] = field(default_factory=lambda: [32, 128, 480])
    warmup: int = 2
    rounds: int = 10

    def __post_init__(self) -> None:
        for key in ("batches", "contexts"):
            values = getattr(self, key)
            if not values or min(values) < 1:
                raise ValueError(f"task.{key}={values}: needs positive numbers, e.g. task.{key}=[1,16]")
            if values != sorted(set(values)):
                raise ValueError(f"task.{key}={values}: must rise, each number once")
        if len(self.contexts) < 2 or len(self.batches) * (len(self.contexts) - 1) < 2:
            raise ValueError(
                "task.contexts: needs two or more, and another batch or a third: longer ones are predicted"
            )
        at_least("task.warmup", self.warmup, 0)
        at_least("task.rounds", self.rounds, 2)
