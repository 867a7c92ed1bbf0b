"""What a config asks of machines, found before anything is started: no torch is needed for it."""

from __future__ import annotations

from collections.abc import Mapping

from llmsys import schema
from llmsys.cost.hardware import DEVICES
from llmsys.decentral import fleet_file, fleets
from llmsys.decentral.fleet import Fleet


def fleet(config: schema.Config, path: str | None) -> Fleet:
    """Of `task.fleet`, which lies at `path` where it is a file. ValueError for a file that is none."""
    task = config.task
    assert isinstance(task, schema.DecentralPlan)
    if task.fleet in fleets.FLEETS:
        return fleets.FLEETS[task.fleet](task.providers, task.fleet_seed)
    return fleet_file.read(path or task.fleet, precision(config))


def precision(config: schema.Config) -> str:
    """Of the cards' peaks: bf16's is fp16's, which older cards have as well."""
    return "fp16" if config.model.dtype == "bf16" else "fp32"


def check(config: schema.Config, inputs: Mapping[str, str]) -> None:
    """ValueError, which names the key, for a card that is not known, a region where nobody is, and whatever is wrong
    with a fleet's file."""
    task, model = config.task, config.model
    if isinstance(model, schema.Transformer) and model.quant != "none":
        raise ValueError(f"model.quant={model.quant}: plans are of models in fp32 or bf16; model.quant=none")
    if config.method.kind != "full":
        raise ValueError(
            f"method={config.method.kind}: plans are of models whose parameters are all trained; method=full"
        )
    if isinstance(task, schema.DecentralProfile) and not isinstance(model, schema.Transformer):
        raise ValueError(f"model={model.name}: a profile is of a transformer's layers, e.g. model=llama_6m")
    if isinstance(task, schema.DecentralPerf):
        for key, name in (("small", task.small), *(("large", name) for name in task.large)):
            if name not in DEVICES:
                raise ValueError(f"task.{key}={name}: must be one of {', '.join(DEVICES)}")
    if isinstance(task, schema.DecentralPlan):
        own = fleet(config, inputs.get("fleet"))
        if sum(task.private) and not any(each.trusted for each in own.providers):
            raise ValueError(
                f"task.private={task.private}: no provider is trusted; in a file one is, with trusted: true"
            )
        if task.replicas > len(own):
            raise ValueError(f"task.replicas={task.replicas}: the fleet has {len(own)} providers")
        there = sorted({each.region for each in own.providers})
        for name in task.regions:
            if name not in there:
                raise ValueError(
                    f"task.regions={task.regions}: no provider is in {name}; they are in {', '.join(there)}"
                )
    if isinstance(task, schema.DecentralSimulate) and task.begin > len(own):
        raise ValueError(f"task.begin={task.begin}: the fleet has {len(own)} providers")
