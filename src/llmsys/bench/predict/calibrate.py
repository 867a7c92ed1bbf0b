"""The task `bench_calibrate`: how fast the machine at hand is, in under a minute, for predictions of its own runs.

Operators by size and precision (`probes`), then at most two whole training steps of the config's model: as it is, and
with a quarter of the length at micro-batch 1 (`scales`). The summary's keys are those that `machine.calibrated` reads:

    rate/<kind>[/<precision>]/<size>   FLOP/s or bytes/s       start/<pass>            seconds to start an operator
    alpha_s/<kind>, beta_s/<kind>      of a collective         scale/<pass>/<of what>  of whole steps
    peak_tflops/<precision>            of products             copy_gb_per_s, host_adam_gb_per_s, mem_gib, host_gib

`cells/<n>/<phase>_ms` are the steps themselves. Where something could not be measured or fitted as meant, `notes` has a
line under `fallbacks`, which every prediction repeats. Ranks measure at the same time, as they will work; a CPU's ranks
share its cores, so it is calibrated with those that will be predicted.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from llmsys import schema
from llmsys.bench.predict import machine as machines
from llmsys.bench.predict import prediction, scales, steps
from llmsys.bench.predict.machine import Machine
from llmsys.bench.predict.probes import Probes
from llmsys.bench.predict.scales import Seen
from llmsys.cost import case as cases
from llmsys.cost import walk
from llmsys.cost.case import Case
from llmsys.cost.room import GIB
from llmsys.device import host_available
from llmsys.profile.spans import Spans
from llmsys.train.peaks import peak_flops
from llmsys.train.task import trainer

if TYPE_CHECKING:
    from llmsys.context import Context

PASSES = ("forward", "backward")
WARMUP = 2


def calibrate(config: schema.Config, context: Context) -> dict[str, Any]:
    """Every rank measures, and the first one's numbers are the record's. Raises what training does."""
    task, model = config.task, config.model
    assert isinstance(task, schema.Calibrate)
    if not isinstance(model, schema.Transformer):
        raise ValueError(f"model={model.name}: a calibration is of a transformer's operators, e.g. model=llama_6m")
    found = memory(context.device)
    peak, whose = peak_flops(config, context.device)
    found[f"peak_tflops/{config.train.precision}"] = peak / 1e12
    probes = Probes(context.device, model, config.train.precision, task.most_s)
    for key, value in probes.run(context.place.world):
        found[key] = value
        context.beat(step=len(found))
    for precision in {key.split("/")[2] for key in found if key.startswith("rate/product/")}:
        rates = [value for key, value in found.items() if key.startswith(f"rate/product/{precision}/")]
        found.setdefault(f"peak_tflops/{precision}", max(rates) / 1e12)
    if dist.is_initialized():
        dist.barrier()
    samples: dict[str, list[float]] = {}
    seen = []
    for number, cell in enumerate(_cells(config, task.cells)):
        took = _steps(cell, context, task.steps)
        samples |= {f"cells/{number}/{name}": values for name, values in took.items()}
        seen.append((cell, {name: statistics.median(values) for name, values in took.items()}))
    found |= {f"cells/{i}/{name}": value for i, (_, took) in enumerate(seen) for name, value in took.items()}
    fallbacks = []
    if not any(key.startswith("rate/dequant/") for key in found):
        fallbacks.append("4-bit weights: not measured, for bitsandbytes is not installed")
    if seen:
        record = {"summary": found, "config": {"hardware": {"device": context.device.type}}, "env": context.env}
        known = machines.measured({**record, "run_id": context.out.name, "world": context.place.world}, config)
        factors, said = fitted(known, seen)
        found |= factors
        fallbacks += said
    notes = {"peak_tflops": whose, **({"fallbacks": "; ".join(fallbacks)} if fallbacks else {})}
    return {"summary": found, "samples": samples, "notes": notes}


def memory(device: torch.device) -> dict[str, float]:
    """GiB of the device, and of the host what is free."""
    host = host_available() / GIB
    if device.type == "cpu":
        return {"mem_gib": host, "host_gib": host}
    return {"mem_gib": torch.cuda.get_device_properties(device).total_memory / GIB, "host_gib": host}


def _cells(config: schema.Config, number: int) -> list[schema.Config]:
    """The config's own, and a small one."""
    train, ranks = config.train, schema.data_world(config.train, config.engine)
    own = dataclasses.replace(train, global_batch=train.micro_batch * ranks)
    small = dataclasses.replace(train, micro_batch=1, global_batch=ranks, length=max(16, train.length // 4))
    return [dataclasses.replace(config, train=each) for each in (own, small)[:number]]


def _steps(config: schema.Config, context: Context, number: int) -> dict[str, list[float]]:
    """ms of each phase of `number` training steps, after `WARMUP`."""
    train = dataclasses.replace(config.train, steps=number + WARMUP, schedule="constant")
    with trainer(dataclasses.replace(config, train=train), context) as ready:
        loop = ready.loop
        loop.spans = Spans(context.device, WARMUP)
        loop.wrapped.train()
        for step in range(1, train.steps + 1):
            with loop.spans.step():
                loop.step(step)
            context.beat(step=step)
        return loop.spans.samples


def fitted(machine: Machine, seen: list[tuple[schema.Config, dict[str, float]]]) -> tuple[dict[str, float], list[str]]:
    """(`scale/<pass>/work` and `/start`, and `data_ms`, of cells (config, ms by phase), what did not go as meant). Of a
    backward pass in which ranks talk, what that is predicted to take is taken off first, but at most half of it."""
    of_pass: dict[str, list[Seen]] = {name: [] for name in (*PASSES, "optimizer")}
    fallbacks: list[str] = []
    for number, (config, took) in enumerate(seen):
        known = cases.facts(config, machine.device)
        case = Case(config.model, config.train, config.method, config.engine, **known)
        tape = walk.run(case)
        said = prediction.predict(config, machine).by_phase_ms["comm"]
        for name, passed in steps.alone(case, tape, machine).items():
            measured = took[f"{name}_ms"]
            if name == "backward" and said > measured / 2:
                fallbacks.append(
                    f"cell {number}, backward: {said:.3g} of {measured:.3g} ms are predicted for ranks to talk; half "
                    "was taken off"
                )
            if name == "backward":
                measured -= min(said, measured / 2)
            of_pass[name].append(Seen(passed.work, passed.start, measured / 1e3))
    found: dict[str, float] = {}
    for name, cells in of_pass.items():
        fit = scales.factors(cells, behind=machine.speeds.behind)
        found |= {f"scale/{name}/work": fit.work, f"scale/{name}/start": fit.start}
        if fit.why:
            fallbacks.append(f"scale/{name}: {fit.why}")
    found["data_ms"] = statistics.mean(took.get("data_ms", 0.0) + took.get("agreement_ms", 0.0) for _, took in seen)
    return found, fallbacks
