"""Where a run happens and who watches: device, network, dispatch, tracker, profile."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmsys.schema.fields import at_least, one_of

DEVICES = ("auto", "cpu", "cuda")


@dataclass(kw_only=True)
class Hardware:
    """The device a run is for. `device=auto` is resolved before the run's id is computed.

    `name` is a machine of `llmsys.cost.hardware`, for checks and predictions about another machine than this one;
    `auto` is this one. `mem_gib`, `tflops` and `gbps` (GB/s to the next device in the machine) replace what is listed
    or would be measured; so do, for predictions, `mem_gbps` (the device's memory) and `host_gbps` (to the host's
    memory), in GB/s. With `name=auto` the first two describe a card that is not listed. `devices` of this kind are in
    the machine: the ranks of a prediction, unless `train.world` is more, which are then in several machines that a
    `network` joins. `nvlink=false`: without the bridges or the switch that the card can have. `host_gib` is the host's
    memory.
    """

    device: str = "auto"
    name: str = "auto"
    mem_gib: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    mem_gbps: float | None = None
    host_gbps: float | None = None
    host_gib: float | None = None
    devices: int = 1
    nvlink: bool = True

    def __post_init__(self) -> None:
        one_of("hardware.device", self.device, DEVICES)
        _positive(self, "hardware", "mem_gib", "tflops", "gbps", "mem_gbps", "host_gbps", "host_gib")
        at_least("hardware.devices", self.devices, 1)


@dataclass(kw_only=True)
class Network:
    """The link of each rank to all others. Null rates: as it is, nothing is shaped.

    `up_mbit`, `down_mbit`: what a rank can send and receive, in 10**6 bits a second. `delay_ms`: added one way.
    `shape`: put ranks on links that have these rates (`llmsys.comm.link`); false leaves them to predictions alone.
    """

    name: str = "none"
    up_mbit: float | None = None
    down_mbit: float | None = None
    delay_ms: float = 0.0
    shape: bool = True

    def __post_init__(self) -> None:
        _positive(self, "network", "up_mbit", "down_mbit")
        at_least("network.delay_ms", self.delay_ms, 0)
        if (self.up_mbit is None) != (self.down_mbit is None):
            missing, given = ("up_mbit", "down_mbit") if self.up_mbit is None else ("down_mbit", "up_mbit")
            raise ValueError(f"network.{missing}: missing; network.{given} is given, and a link has both")
        if self.delay_ms and self.up_mbit is None:
            raise ValueError(f"network.delay_ms={self.delay_ms}: needs network.up_mbit and network.down_mbit")


@dataclass(kw_only=True)
class Dispatch:
    """Where a job runs and when it is given up.

    `timeout_s`: the deadline of the whole run. `heartbeat_s`: no sign of life for so long is a hang (a stopped
    process). `stall_s`: alive, but no step done for so long after an earlier one, is a hang too. `grace_s`: how long an
    interrupted run may take to finish its step and write a checkpoint. `memory_gib` limits each process's data segment
    (RLIMIT_DATA), so that running out of memory can be tried without harm; on a GPU it is not set.
    """

    kind: str = "process"
    timeout_s: float = 7 * 24 * 3600.0
    heartbeat_s: float = 60.0
    stall_s: float = 1800.0
    grace_s: float = 30.0
    memory_gib: float | None = None

    def __post_init__(self) -> None:
        _positive(self, "dispatch", "timeout_s", "heartbeat_s", "stall_s", "grace_s", "memory_gib")


@dataclass(kw_only=True)
class OnRay(Dispatch):
    """On the nodes of a Ray cluster that have what a rank needs.

    `address`: `auto`, a cluster that this machine is a node of; `ray://host:10001`, one that is reached through its
    client server; `host:6379`; null: as RAY_ADDRESS says, else one is started here for the time of the runs. Of each
    rank: `gpus` (null: one where `hardware.device=cuda`), `cpus` (null: one for each of `train.threads`), `memory_gib`,
    and `resources` by names of the cluster's own. `world`: ranks, another word for `train.world`. `nodes`: so many
    nodes share the ranks evenly; 0: as few as have room. `max_parallel`: runs at once; 0: as many as there is room for.
    `retries`: how often a run is begun again, from its last checkpoint, whose node or worker was taken away; a run that
    fails is not. `start_s`: how long the ranks' processes may take to come about once there is room for them.
    """

    kind: str = "ray"
    address: str | None = None
    gpus: float | None = None
    cpus: float | None = None
    resources: dict[str, float] = field(default_factory=dict)
    world: int = 0
    nodes: int = 0
    max_parallel: int = 0
    retries: int = 0
    start_s: float = 120.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "dispatch", "cpus", "start_s")
        for key in ("world", "nodes", "max_parallel", "retries"):
            at_least(f"dispatch.{key}", getattr(self, key), 0)
        own = {f"resources.{key}": value for key, value in self.resources.items()}
        for key, value in {"gpus": self.gpus or 0.0, **own}.items():
            at_least(f"dispatch.{key}", value, 0)
            if value > 1 and value != int(value):
                raise ValueError(f"dispatch.{key}={value:g}: must be a whole number, or a share of one below 1")
        for name, key in {"CPU": "cpus", "GPU": "gpus", "memory": "memory_gib"}.items():
            if name in self.resources:
                raise ValueError(f"dispatch.resources.{name}: is dispatch.{key}")


@dataclass(kw_only=True)
class Tracker:
    """Who is told beside the local record; none of this can harm a run.

    `mode` and `project` are W&B's; WANDB_MODE and WANDB_PROJECT win. `system_s`: between two samples of W&B's system
    metrics; 0: none. `start_s`: how long the run's begin may wait for a mirror to come up, `finish_s` how long its end
    may wait for one to be done (what W&B uploads, say); then the mirror is left, and the record says so.
    """

    kind: str = "none"
    project: str = "llmsys"
    mode: str = "offline"
    system_s: float = 15.0
    start_s: float = 60.0
    finish_s: float = 60.0

    def __post_init__(self) -> None:
        _positive(self, "tracker", "start_s", "finish_s")
        if self.system_s:
            at_least("tracker.system_s", self.system_s, 0.1)
        one_of("tracker.mode", self.mode, ("offline", "online", "disabled"))


@dataclass(kw_only=True)
class Profile:
    """What is measured: timings leave the first `warmup` steps out; `probe` counts saved tensors after training, and
    the bytes that ranks exchange in the first of the steps left out."""

    warmup: int = 3
    probe: bool = True

    def __post_init__(self) -> None:
        at_least("profile.warmup", self.warmup, 0)


def _positive(settings: object, group: str, *keys: str) -> None:
    for key in keys:
        value = getattr(settings, key)
        if value is not None and not value > 0:
            raise ValueError(f"{group}.{key}={value}: must be positive")
