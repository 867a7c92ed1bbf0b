"""By name and late: which method, engine and gradient synchroniser a config means.

The only shared file that knows the subsystems, so that `train` and `runner` need not.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsys import schema

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    import torch

    from llmsys.comm.place import Place
    from llmsys.train.protocols import Engine, GradSync, Method

METHODS = {
    "full": "llmsys.train.methods:Full",
    "lora_peft": "llmsys.lorafa.peft_baselines:LoRA",
    "lorafa_peft": "llmsys.lorafa.peft_baselines:LoRAFA",
    "lora": "llmsys.lorafa.methods:LoRAFA",
    "lorafa": "llmsys.lorafa.methods:LoRAFA",
    "majority": "llmsys.train.references:Majority",
    "probe": "llmsys.train.references:Probe",
}
ENGINES = {
    "local": "llmsys.train.engines.local:Local",
    "ddp": "llmsys.train.engines.ddp:DDP",
    "deepspeed": "llmsys.train.engines.zero:DeepSpeed",
    "fsdp2": "llmsys.train.engines.fsdp2:FSDP2",
    "tp": "llmsys.train.engines.tp:TP",
}
SYNCS = {
    "ddp": "llmsys.compress.sync:DDPSync",
    "deepspeed": "llmsys.compress.sync:DeepSpeedSync",
}


def _named(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def method(config: schema.Method, seed: int = 0) -> Method:
    """The method of `method.kind`; `schema.build` has checked the name and its settings. `seed`: for what it draws."""
    cls = _named(METHODS[config.kind])
    if isinstance(config, schema.LoRA):
        made: Method = cls(config, seed)
    else:
        made = cls(config) if isinstance(config, schema.Adapter) else cls()
    return made


def engine(config: schema.Config, place: Place, device: torch.device) -> Engine:
    """The engine of `engine.kind` for one rank, on its device."""
    made: Engine = _named(ENGINES[config.engine.kind])(config, place, device)
    return made


def grad_sync(config: schema.Config) -> GradSync:
    """How gradients of several ranks are made one: by the engine itself, or compressed (`compress.kind`).
    `schema.build` has checked that the engine leaves them whole."""
    if config.compress.kind == "none":
        from llmsys.train.engines.local import NoSync

        return NoSync()
    from llmsys.compress.config import CompressConfig

    values = dataclasses.asdict(config.compress)
    made: GradSync = _named(SYNCS[config.engine.kind])(CompressConfig(method=values.pop("kind"), **values))
    return made


def check_question(config: schema.Config, inputs: Mapping[str, str]) -> None:
    """ValueError where a prediction is asked about a machine that is not described, or a plan of machines that are not,
    or advice among letters that are not known, or for a folder to write to that is somebody else's, or a model for
    requests that it cannot answer."""
    if isinstance(config.task, schema.Planning):
        importlib.import_module("llmsys.decentral.asked").check(config, inputs)
        return
    if isinstance(config.task, (schema.Serve, schema.ServeModules)):
        importlib.import_module("llmsys.bench.serve.asked").check(config, inputs)
        return
    serving = isinstance(config.task, schema.Advise) and config.task.goal == "serve"
    if serving and "speeds" in inputs:
        importlib.import_module("llmsys.bench.serve.advice").here(config, Path(inputs["speeds"]))
    elif not serving or config.hardware.name != "auto":  # else it is about every card that is known
        importlib.import_module("llmsys.bench.predict.machine").of(config)
    if isinstance(config.task, schema.Advise):
        importlib.import_module("llmsys.bench.advise.space").check(config)
        if config.task.emit:
            importlib.import_module("llmsys.bench.advise.emit").check(config.task.emit)


def techniques() -> ModuleType:
    """`llmsys.bench.expand`, which knows what the key `techniques` stands for."""
    from llmsys.bench import expand

    return expand


def comparison() -> ModuleType:
    """The command line of `llmsys.results compare`, which lays published numbers beside records."""
    from llmsys.bench.published import __main__ as command

    return command
