"""Every setting of a run, as dataclasses: types, defaults, units and the checks that need nothing but the values.

Hydra composes `conf/` over these classes in the parent process, where a typo or a wrong type stops with the key's
name; the result travels as a plain dict, and `build` makes the typed `Config` again wherever the run is executed.
Nothing here imports anything heavy or does I/O: `--help`, the launcher and the cost models all read it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

from llmsys.nearest import nearest
from llmsys.schema import coherence
from llmsys.schema.advise import Advise, Opportunities
from llmsys.schema.bench import Calibrate, Predict, Predicting
from llmsys.schema.compress import Compress
from llmsys.schema.data import Data
from llmsys.schema.decentral import DecentralPerf, DecentralPlan, DecentralProfile, DecentralSimulate, Planning
from llmsys.schema.fields import at_least, one_of
from llmsys.schema.machine import Dispatch, Hardware, Network, OnRay, Profile, Tracker
from llmsys.schema.measured import Iteration, Measured, Replay
from llmsys.schema.model import ConvNet, Model, Transformer
from llmsys.schema.modules import Modules, Ops
from llmsys.schema.search import Search
from llmsys.schema.serve import HttpServer, InProcessServer, ModelServer, Serve, ServeModules, Server, StubServer
from llmsys.schema.sweep import Sweep
from llmsys.schema.task import Ledger, Simulate, Task
from llmsys.schema.together import DecentralAttack, DecentralGenerate, DecentralTrain, Together
from llmsys.schema.train import (
    CLOSED_FORM,
    DDP,
    FSDP2,
    Adapter,
    DeepSpeed,
    Engine,
    LoRA,
    Method,
    Train,
    accumulation,
    data_world,
)

__all__ = [
    "CLOSED_FORM",
    "DDP",
    "FSDP2",
    "SCHEMAS",
    "Adapter",
    "Advise",
    "Calibrate",
    "Compress",
    "Config",
    "ConvNet",
    "Data",
    "DecentralAttack",
    "DecentralGenerate",
    "DecentralPerf",
    "DecentralPlan",
    "DecentralSimulate",
    "DecentralTrain",
    "DeepSpeed",
    "Dispatch",
    "Engine",
    "Hardware",
    "HttpServer",
    "InProcessServer",
    "Iteration",
    "Ledger",
    "LoRA",
    "Measured",
    "Method",
    "Model",
    "ModelServer",
    "Modules",
    "Network",
    "OnRay",
    "Opportunities",
    "Ops",
    "Planning",
    "Predict",
    "Predicting",
    "Profile",
    "Replay",
    "Search",
    "Serve",
    "ServeModules",
    "Server",
    "Simulate",
    "StubServer",
    "Sweep",
    "Task",
    "Together",
    "Tracker",
    "Train",
    "Transformer",
    "accumulation",
    "build",
    "data_world",
]


@dataclass(kw_only=True)
class Config:
    """One run, whole.

    `command`: the words after `python -m llmsys` that composed it, but for `results`; none where a program made it. It
    is known when all else is composed, so nobody sets it, and it is no part of what a run is.
    `techniques`: a combination of settings by its letters, F+R+Z3+O (`llmsys.bench.techniques`), typed or swept over;
    it has chosen groups and settings before they were composed, so they are the run's identity and it is not.
    `repeat`: which of several runs of the same settings this is, each in a fresh process; it changes nothing but the
    id.
    """

    name: str = "scratch"
    results: str = "results"
    reuse: str = "same_code"
    force: bool = False
    techniques: str | None = None
    smoke: list[str] = field(default_factory=list)
    baselines: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    repeat: int = 0
    task: Task
    model: Model
    data: Data
    train: Train
    method: Method
    engine: Engine
    compress: Compress = field(default_factory=Compress)
    server: Server = field(default_factory=InProcessServer)
    hardware: Hardware
    network: Network
    dispatch: Dispatch
    tracker: Tracker
    profile: Profile
    sweep: Sweep = field(default_factory=Sweep)
    search: Search = field(default_factory=Search)

    def __post_init__(self) -> None:
        at_least("repeat", self.repeat, 0)
        one_of("reuse", self.reuse, ("same_code", "any", "never"))
        if not self.results:
            raise ValueError("results: empty; it is the folder for results, e.g. results=results")
        if not re.fullmatch(r"\w[\w.-]*", str(self.name)) or self.name is None:
            raise ValueError(f"name={self.name}: it names a folder; letters, digits, '_', '-' and '.' only")
        coherence.check(self)


SCHEMAS: dict[str, dict[str, type]] = {
    "task": {
        "train": Task,
        "lorafa_ledger": Ledger,
        "compress_simulate": Simulate,
        "compress_iteration": Iteration,
        "compress_replay": Replay,
        "bench_advise": Advise,
        "bench_opportunities": Opportunities,
        "bench_modules": Modules,
        "bench_ops": Ops,
        "bench_serve": Serve,
        "bench_serve_modules": ServeModules,
        "decentral_plan": DecentralPlan,
        "decentral_perf": DecentralPerf,
        "decentral_profile": DecentralProfile,
        "decentral_simulate": DecentralSimulate,
        "decentral_train": DecentralTrain,
        "decentral_finetune": DecentralTrain,
        "decentral_generate": DecentralGenerate,
        "decentral_attack": DecentralAttack,
        "bench_predict": Predict,
        "bench_calibrate": Calibrate,
    },
    "model": {"transformer": Transformer, "convnet": ConvNet},
    "data": {"*": Data},
    "train": {"*": Train},
    "method": {
        "full": Method,
        "majority": Method,
        "probe": Method,
        "lora_peft": Adapter,
        "lorafa_peft": Adapter,
        "lora": LoRA,
        "lorafa": LoRA,
    },
    "engine": {"local": Engine, "ddp": DDP, "deepspeed": DeepSpeed, "fsdp2": FSDP2, "tp": Engine},
    "compress": {"*": Compress},
    "server": {"transformers": InProcessServer, "openai": HttpServer, "tgi": HttpServer, "stub": StubServer},
    "hardware": {"*": Hardware},
    "network": {"*": Network},
    "dispatch": {"inline": Dispatch, "process": Dispatch, "ray": OnRay, "torchrun": Dispatch},
    "tracker": dict.fromkeys(("none", "wandb", "tensorboard", "both"), Tracker),
    "profile": {"*": Profile},
    "sweep": {"*": Sweep},
    "search": {"*": Search},
}
"""Group -> kind -> the class of its settings; `*` where every choice in the group shares one class."""
LATER = ("compress", "server", "sweep", "search")
"""Groups that configs written by earlier versions of this package do not have; without one its defaults hold."""


def build(plain: dict[str, Any]) -> Config:
    """The typed config of a plain nested dict, as composed by Hydra or read back from a run's `config.yaml`.

    Raises ValueError, naming the dotted key, on an unknown key, an unknown kind or a value that a class refuses.
    """
    if "exp" in plain:
        raise ValueError("exp: the experiment's file must begin with the line '# @package _global_'")
    groups = {}
    for group, kinds in SCHEMAS.items():
        if group in LATER and group not in plain:
            continue
        if not isinstance(plain.get(group), dict):
            raise ValueError(f"{group}: missing; it is a group of settings")
        values = plain[group]
        cls = kinds.get("*") or kinds.get(values.get("kind"))
        if cls is None:
            raise ValueError(f"{group}.kind={values.get('kind')}: must be one of {', '.join(kinds)}")
        groups[group] = _make(cls, group + ".", values)
    return _make(Config, "", {**plain, **groups})


def _make(cls: type, prefix: str, values: dict[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise ValueError(f"{prefix}{key}: no such setting; {nearest(key, known)}")
    for key, value in values.items():
        for number in value.values() if isinstance(value, dict) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{prefix}{key}={number}: must be a finite number")
    return cls(**values)
