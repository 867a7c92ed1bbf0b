"""The task `decentral_profile`: how much of its peak this machine reaches on a model, for its line in a fleet's file.

FusionAI's lambda: an operator takes FLOPs / (lambda x peak) seconds. The model with one, two and three of its layers
runs forward, and backward where it is trained, some rounds in turn; lambda is the one that fits the medians best. Keys:

    efficiency, peak_tflops      lambda, and the peak that it is a share of (`notes.peak`: from where)
    worst_percent                how far the farthest of these models is from what lambda says of it
    mem_gib, host_gib            of the device and the host, as they are free now
    layers/<n>/ms, tflop         of a pass (three: backward takes two), in the median; samples have every round

`provider.yaml` is a fleet of this one provider, with its lines where `network` has them; `profile.md` has both.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from llmsys import schema
from llmsys.cost import cards
from llmsys.decentral import shapes
from llmsys.decentral.fleet import GIB
from llmsys.device import host_available
from llmsys.files import write_atomic
from llmsys.models import build
from llmsys.table import piped
from llmsys.train.peaks import Peak, peak_flops, wait

if TYPE_CHECKING:
    from llmsys.context import Context

WARMUP = 2


def profile(config: schema.Config, context: Context) -> dict[str, Any]:
    """The record's summary and samples, and `provider.yaml`."""
    task, model, device = config.task, config.model, context.device
    assert isinstance(task, schema.DecentralProfile)
    assert isinstance(model, schema.Transformer)
    rows, length = config.train.micro_batch, config.train.length
    shapes_of = [dataclasses.replace(model, num_layers=n) for n in range(1, min(shapes.TRACED, model.num_layers) + 1)]
    passes = 3 if task.train else 1
    flops = [passes * float(shapes.of_model(each, rows, length, train=task.train).work.sum()) for each in shapes_of]
    models = [_built(each, device, config.train.seed) for each in shapes_of]
    likes = shapes.example(model, rows, length, task.train)
    batch = {key: _drawn(like, model.vocab_size, device) for key, like in likes.items()}
    samples: dict[str, list[float]] = {}
    for turn in range(WARMUP + task.rounds):
        for at, each in enumerate(models, start=1):
            seconds = _timed(each, batch, device, train=task.train)
            if turn >= WARMUP:
                samples.setdefault(f"layers/{at}/ms", []).append(seconds * 1e3)
        context.beat(step=turn)
    took = [statistics.median(values) / 1e3 for values in samples.values()]
    peak = peak_flops(config, device)
    share = fitted(flops, took, peak.per_s)
    if share > 1:  # of a peak that was measured, or is another card's: there is no such share
        peak, share = Peak(peak.per_s * share, f"what was reached; more than {peak.source}"), 1.0
    off = [abs(work / (share * peak.per_s) / seconds - 1) for work, seconds in zip(flops, took, strict=True)]
    summary = {
        "efficiency": share,
        "peak_tflops": peak.per_s / 1e12,
        "worst_percent": 100 * max(off),
        "mem_gib": _free(device) / GIB,
        "host_gib": host_available() / GIB,
    }
    for at, (work, seconds) in enumerate(zip(flops, took, strict=True), start=1):
        summary |= {f"layers/{at}/ms": seconds * 1e3, f"layers/{at}/tflop": work / 1e12}
    text = entry(config, summary, _card(device))
    write_atomic(context.out / "provider.yaml", text)
    write_atomic(context.out / "profile.md", f"{table(summary)}\n\n{text}")
    notes = {"peak": peak.source}
    if config.network.up_mbit is None:
        notes["lines"] = "unknown: add up_mbit and down_mbit to provider.yaml, or give network.up_mbit and .down_mbit"
    files = {"tables": "profile.md", "provider": "provider.yaml"}
    return {"summary": summary, "samples": samples, "files": files, "notes": notes}


def fitted(flops: Sequence[float], seconds: Sequence[float], peak: float) -> float:
    """The share of `peak` (FLOP/s) with the least sum of squares of what times predicted by it are off, as shares of
    `seconds`."""
    ratios = [work / peak / took for work, took in zip(flops, seconds, strict=True)]
    return sum(each * each for each in ratios) / sum(ratios)


def table(found: dict[str, float]) -> str:
    """A row for each of the models."""
    share, peak, rows = found["efficiency"], found["peak_tflops"], []
    for at in range(1, 1 + sum(key.endswith("/tflop") for key in found)):
        took, work = found[f"layers/{at}/ms"], found[f"layers/{at}/tflop"]
        rows.append([str(at), f"{work:.4g}", f"{took:.4g}", f"{work / (share * peak) * 1e3:.4g}"])
    heads = ("layers", "TFLOP", "ms", "ms by the fit")
    return "\n".join([f"**{share:.3f} of {peak:.4g} TFLOP/s**", "", *piped(heads, rows)])


def entry(config: schema.Config, found: dict[str, float], card: str | None) -> str:
    """A file for `task.fleet`, of this machine alone."""
    task, network = config.task, config.network
    assert isinstance(task, schema.DecentralProfile)
    values = {"name": task.provider} | ({"card": card} if card else {})
    rows = [f"{key}: {value}" for key, value in values.items()]
    rows += [f"tflops: {found['peak_tflops']:.4g}", f"efficiency: {found['efficiency']:.4f}"]
    rows += [f"mem_gib: {found['mem_gib']:.2f}", f"host_gib: {found['host_gib']:.2f}"]
    for key, rate in (("up_mbit", network.up_mbit), ("down_mbit", network.down_mbit)):
        rows.append(f"{key}: {rate:g}" if rate is not None else f"# {key}: of its line to the others, in 10**6 bit/s")
    model = f"{config.model.name} in {config.model.dtype}, {config.train.micro_batch} x {config.train.length}"
    what = "training" if task.train else "a forward pass"
    head = f"# Measured on {model}, {what}; its times are {found['worst_percent']:.1f} % off at most."
    lines = [head, "providers:", f"  - {rows[0]}", *(f"    {row}" for row in rows[1:])]
    return "\n".join(lines) + "\n"


def _built(cfg: schema.Transformer, device: torch.device, seed: int) -> torch.nn.Module:
    model: Any = build.load(cfg, objective=cfg.objective, num_labels=0, device=device, seed=seed, folder=None)
    model.config.use_cache = False
    found: torch.nn.Module = model
    return found


def _drawn(like: torch.Tensor, vocabulary: int, device: torch.device) -> torch.Tensor:
    """Tokens, or the first of the classes."""
    if like.dim() == 1:
        return torch.zeros(like.shape, dtype=torch.long, device=device)
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, like.shape, generator=draw).to(device)


def _timed(model: torch.nn.Module, batch: dict[str, torch.Tensor], device: torch.device, *, train: bool) -> float:
    wait(device)
    begin = time.perf_counter()
    with torch.set_grad_enabled(train):
        out = model(**batch)
        if train:
            out.loss.backward()
    wait(device)
    seconds = time.perf_counter() - begin
    model.zero_grad(set_to_none=True)
    return seconds


def _free(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else host_available()


def _card(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    return cards.card(torch.cuda.get_device_name(device), total)
