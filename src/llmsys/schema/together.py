"""What the tasks of `llmsys.decentral` are told that run a job on providers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from llmsys.schema.fields import at_least, one_of
from llmsys.schema.task import Task

OWNER = "stage"
STARTED = ("process", "ray", "none")
ON_CHEAT = ("stop", "go_on")
RUN_PLANES = ("torch", "torch_compiled", "onnx")
COMPRESS = ("none", "fp16", "bf16", "int8", "adaptive")


@dataclass(kw_only=True)
class Together(Task):
    """A job run by providers that may come and go.

    `start`: `providers` of them are started on this machine as processes, or one on each node of a Ray cluster that has
    the resource `provider`; none: they dial in, and the job begins when so many have come. `planes` of those that are
    started, in turn. What each says of itself: `tflops` that it reaches, `up_mbit` and `down_mbit`, `mem_gib`; 0: as
    much as makes `stages` of them hold the job. `reserve` of them are in the backup pool. `copies` of each stage's
    state are kept by others, and one by the owner, unless `owner_keeps` is false.

    `delay_ms`: one way, between two of them. `emulate`: processes' lines are made as slow as all that says. `direct`:
    processes talk to each other, where that is not slower than by the broker.

    `private`: layers, at the beginning and at the end, that with the embedding, the head and the loss only trusted
    providers have, or copies of it: the first `trusted` of those that are started, of those who dial in who show what
    is in `trusted_token_file`; empty: nothing is. That is reduced exposure and not privacy: see the task
    `decentral_attack`.

    `compress`: how hidden states and their gradients go from stage to stage: none, fp16, bf16 or int8 everywhere, or
    as each line needs it (adaptive). `noise`: of so many times a hidden state's standard deviation, is added to what
    private stages send on to others, in training and generation.

    `hung_s`: a provider that is at one task for longer (to compile its stage is one) hangs: it is sent away, and others
    take over.

    `listen`: host and port; beyond loopback with `certificate` and `key`, files that
    `python -m llmsys.decentral certificate` makes. `token_file`: with what providers must show; empty: drawn anew.
    `faults`: of those that are started, who is hit by which signal once a step is committed: `p1 SIGKILL 5`, or
    `stage1 SIGSTOP 5`, whoever has that stage then.
    """

    start: str = "process"
    providers: int = 4
    planes: list[str] = field(default_factory=lambda: ["torch"])
    stages: int = 3
    reserve: int = 1
    tflops: float = 0.05
    up_mbit: float = 1000.0
    down_mbit: float = 1000.0
    delay_ms: float = 0.0
    emulate: bool = False
    direct: bool = False
    private: list[int] = field(default_factory=list)
    trusted: int = 2
    trusted_token_file: str = ""
    compress: str = "none"
    noise: float = 0.0
    mem_gib: float = 0.0
    copies: int = 1
    owner_keeps: bool = True
    hung_s: float = 600.0
    listen: str = "127.0.0.1:0"
    certificate: str = ""
    key: str = ""
    token_file: str = ""
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        one_of("task.start", self.start, STARTED)
        for plane in self.planes:
            one_of("task.planes", plane, RUN_PLANES)
        if not self.planes:
            raise ValueError("task.planes: empty; e.g. task.planes=[torch,onnx]")
        for key, least in (("providers", 1), ("stages", 1), ("reserve", 0), ("copies", 0), ("trusted", 0)):
            at_least(f"task.{key}", getattr(self, key), least)
        if self.stages > self.providers:
            raise ValueError(f"task.stages={self.stages}: task.providers={self.providers} are fewer")
        for key in ("tflops", "up_mbit", "down_mbit", "hung_s"):
            if not getattr(self, key) > 0:
                raise ValueError(f"task.{key}={getattr(self, key)}: must be positive")
        if not self.delay_ms >= 0:
            raise ValueError(f"task.delay_ms={self.delay_ms}: must be 0 or more")
        if len(self.private) not in (0, 2) or min(self.private, default=0) < 0:
            raise ValueError(f"task.private={self.private}: must be two numbers of layers, e.g. [1,1]; empty: none")
        if self.private and self.start == "none" and not self.trusted_token_file:
            raise ValueError("task.trusted_token_file: empty; with task.private it has what those show who may see it")
        if self.trusted_token_file and self.start != "none":
            raise ValueError("task.trusted_token_file: is of providers that dial in: task.start=none")
        if self.private and self.start == "ray":
            raise ValueError(f"task.private={self.private}: Ray's nodes are not told apart: task.start=process or none")
        one_of("task.compress", self.compress, COMPRESS)
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"task.noise={self.noise}: must be 0 or more")
        if self.noise and not self.private:
            raise ValueError(f"task.noise={self.noise}: needs task.private, which says whose states it hides: [1,1]")
        if self.emulate and self.start != "process":
            raise ValueError("task.emulate=true: is for providers that are processes: task.start=process")
        if self.direct and self.start != "process":
            raise ValueError("task.direct=true: is for task.start=process; who dials in says --direct HOST:PORT")
        if not self.mem_gib >= 0:
            raise ValueError(f"task.mem_gib={self.mem_gib}: must be 0 or more")
        host, _, port = self.listen.rpartition(":")
        if not host or not port.isdigit() or int(port) >= 2**16:
            raise ValueError(f"task.listen={self.listen}: must be host:port, e.g. 127.0.0.1:0")
        if bool(self.certificate) != bool(self.key):
            missing = "key" if self.certificate else "certificate"
            raise ValueError(f"task.{missing}: empty; a certificate and its key go together")
        if self.start == "none" and (not int(port) or not self.token_file):
            raise ValueError("task.start=none: whoever dials in has to know task.listen's port and task.token_file")
        if self.faults and self.start != "process":
            raise ValueError(f"task.faults={self.faults}: are of providers that are processes: task.start=process")
        names = [f"p{at}" for at in range(self.providers)] + [f"{OWNER}{at}" for at in range(self.stages)]
        for text in self.faults:
            one_of(f"task.faults={text}: provider", fault(text)[0], names)


@dataclass(kw_only=True)
class DecentralTrain(Together):
    """Training of `model` on `data` as `train` says. Copies are kept of every `copy_every`-th step; 0: as often as the
    lines allow.

    `checks`: the share of what stages compute between two copies that another provider computes again, and that is
    compared. Where that shows that the model is not what it should be, `on_cheat` the job stops, or does go_on."""

    kind: str = "decentral_train"
    copy_every: int = 0
    checks: float = 0.0
    on_cheat: str = "stop"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("task.copy_every", self.copy_every, 0)
        one_of("task.on_cheat", self.on_cheat, ON_CHEAT)
        if not 0 <= self.checks <= 1:
            raise ValueError(f"task.checks={self.checks}: must be a share, of 0 to 1")
        if self.checks and not self.owner_keeps:
            raise ValueError(f"task.checks={self.checks}: begin with the owner's copies: task.owner_keeps=true")


@dataclass(kw_only=True)
class DecentralGenerate(Together):
    """Generation by `model`: `streams` of `rows` sequences each, one behind the other, `new_tokens` to each.

    `prompts`: texts, repeated until there are enough; none: the first `prompt_tokens` of validation examples.
    `temperature` 0: the likeliest token, always.
    """

    kind: str = "decentral_generate"
    streams: int = 4
    rows: int = 2
    new_tokens: int = 64
    prompts: list[str] = field(default_factory=list)
    prompt_tokens: int = 16
    temperature: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("streams", "rows", "new_tokens", "prompt_tokens"):
            at_least(f"task.{key}", getattr(self, key), 1)
        if not self.temperature >= 0:
            raise ValueError(f"task.temperature={self.temperature}: must be 0 or more")


@dataclass(kw_only=True)
class DecentralAttack(Task):
    """How many tokens of the validation split are found again from what the layers `depths` are sent (none: all of
    them), by decoders that have seen `public_tokens` of the training split; also with noise of `noises` times the
    standard deviation. About `private_tokens` are looked for."""

    kind: str = "decentral_attack"
    depths: list[int] = field(default_factory=list)
    noises: list[float] = field(default_factory=lambda: [1.0])
    public_tokens: int = 20_000
    private_tokens: int = 4_000

    def __post_init__(self) -> None:
        if min(self.depths, default=0) < 0:
            raise ValueError(f"task.depths={self.depths}: must be 0 or more")
        if min(self.noises, default=1) <= 0:
            raise ValueError(f"task.noises={self.noises}: must be positive; none at all is measured anyway")
        for key in ("public_tokens", "private_tokens"):
            at_least(f"task.{key}", getattr(self, key), 1)


def fault(text: str) -> tuple[str, str, int]:
    """(provider, signal, step). ValueError for what is none."""
    words = text.split()
    good = len(words) == 3 and words[1] in ("SIGKILL", "SIGSTOP", "SIGTERM") and words[2].isdigit()
    if not good:
        raise ValueError(
            f"task.faults={text}: must be a provider, SIGKILL, SIGSTOP or SIGTERM, and a step: stage1 SIGKILL 5"
        )
    return words[0], words[1], int(words[2])
