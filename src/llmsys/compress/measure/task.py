"""The tasks `compress_iteration` and `compress_replay`: checks, the fit, all variants in turns, and what it says.

What the summary's keys mean stands in `figures`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmsys import models, schema
from llmsys.comm import collectives
from llmsys.compress.measure import figures, fit, predicted, stack, tables, turns
from llmsys.compress.measure.paced import PacedModel
from llmsys.compress.measure.rounds import Fit, Rounds
from llmsys.compress.measure.stack import Forward
from llmsys.compress.measure.turns import Make, Samples
from llmsys.compress.measure.variants import Variant, variants
from llmsys.compress.paper_models import MODELS, PaperModel
from llmsys.cost import compressed, links, pace
from llmsys.errors import Refused
from llmsys.files import write_atomic
from llmsys.schema.measured import NOOP, TORCH
from llmsys.train import checks

if TYPE_CHECKING:
    from llmsys.context import Context


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured: `shapes` for the cost model by batch, `make` a fresh one for a variant. `passes_s`: of both
    passes, where a pace gives it. `name` stands before the variants, where there are several."""

    name: str
    shapes: Mapping[int, PaperModel]
    make: Make
    ranks: Sequence[int]
    update: bool
    passes_s: float | None = None


def copies(subject: Subject, cells: Sequence[Variant]) -> int:
    """Of the gradients, on each rank: gradients, errors and what compression needs for a while; weights, but for paced
    models, which have none; and one more by an exchange without overlap."""
    return 3 + subject.update + any(not variant.overlap for variant in cells)


def iteration(config: schema.Config, context: Context) -> dict[str, Any]:
    """`compress_iteration`. Refused where memory is short or it would take more than an hour on a CPU."""
    task = config.task
    assert isinstance(task, schema.Iteration)
    return _measure(config, context, task, [_trained(config, task, context)])


def replay(config: schema.Config, context: Context) -> dict[str, Any]:
    """`compress_replay`. Refused as for `iteration`."""
    task = config.task
    assert isinstance(task, schema.Replay)
    return _measure(
        config, context, task, [replayed(task, name, context.device, context.place.rank) for name in task.models]
    )


def _trained(config: schema.Config, task: schema.Iteration, context: Context) -> Subject:
    seed = 1 + context.place.rank

    def make(variant: Variant) -> tuple[nn.Module, Forward]:
        if task.subject == "stack":
            return stack.stack(task, variant.batch, context.device, seed)
        return stack.whole_model(config, variant.batch, context.device, seed)

    with torch.device("meta"):
        model = stack.Stack(task.layers, task.width) if task.subject == "stack" else models.skeleton(config.model)
    tokens = 1 if task.subject == "stack" else config.train.length
    shapes = {batch: stack.as_paper_model(model, tokens, batch, task.r[0]) for batch in task.batch}
    return Subject(name="", shapes=shapes, make=make, ranks=task.r, update=True)


def replayed(task: schema.Replay, name: str, device: torch.device, rank: int) -> Subject:
    """A model of the paper."""
    model = MODELS[name]
    speed = pace.flops_per_s(task, device.type)
    make_model = functools.partial(PacedModel, model.parameters, model.batch, speed, device, 1 + rank)

    def make(variant: Variant) -> tuple[nn.Module, Forward]:
        return make_model(), lambda wrapped: wrapped(turns.token(device))

    flops = 3 * model.batch * sum(p.flops for p in model.parameters)
    return Subject(
        name=name,
        shapes={model.batch: model},
        make=make,
        ranks=task.r or [model.r],
        update=False,
        passes_s=flops / speed if speed else 0.0,
    )


def _measure(
    config: schema.Config, context: Context, task: schema.Measured, subjects: Sequence[Subject]
) -> dict[str, Any]:
    world, mbit = context.place.world, shaped_mbit(config.network)
    cells = {subject.name: variants(task, subject.ranks, list(subject.shapes)) for subject in subjects}
    check(config, subjects, context.device)
    rounds = Rounds(context, task.rounds * len(subjects))
    lines, rates = rounds.fit(lambda: _fit(task, cells, mbit, context)) if task.fit else ({}, {})
    summary = figures.fitted(lines, rates) if task.fit else {}
    samples: dict[str, list[float]] = {}
    for subject in subjects:
        for _ in range(task.rounds - len(rounds.of(subject.name))):
            made = {variant: Samples() for variant in cells[subject.name]}
            for variant, own in made.items():
                context.log.info("%s %s", subject.name, variant.name)
                turns.turn(variant, task, subject.make, own, context.beat, update=subject.update)
            rounds.add(subject.name, made)
        found = {variant: Samples() for variant in cells[subject.name]}
        for one in rounds.of(subject.name):
            for variant, own in one.items():
                found[variant].add(own)
        own_summary = figures.measured(found, world, mbit if world > 1 else None)
        if task.fit:
            own_summary |= figures.predictions(_predicted(task, subject, found, rates, lines, world), own_summary)
        before = f"{subject.name}/" if subject.name else ""
        summary |= {before + key: value for key, value in own_summary.items()}
        samples |= {before + key: values for key, values in figures.samples_ms(found).items()}
    summary["measured_in_attempts"] = rounds.attempts
    if context.place.rank == 0:
        write_atomic(context.out / "measured.md", tables.markdown(summary, world))
    rounds.remove()
    return {"summary": summary, "samples": samples, "files": {"tables": "measured.md"}}


def _fit(task: schema.Measured, cells: Mapping[str, Sequence[Variant]], mbit: float | None, context: Context) -> Fit:
    lines = fit.lines(mbit, context.device, context.beat)
    ours = {v.kind: v for each in cells.values() for v in each if v.method not in (NOOP, TORCH)}
    return lines, {kind: fit.rates(one.config(task), context.device) for kind, one in ours.items()}


def _predicted(
    task: schema.Measured,
    subject: Subject,
    found: Mapping[Variant, Samples],
    rates: Mapping[str, Any],
    lines: Mapping[str, Any],
    world: int,
) -> dict[Variant, float]:
    """Seconds of each variant of ours."""
    medians = {variant: statistics.median(own.pairs_s) for variant, own in found.items()}
    made = {}
    for variant in found:
        if variant.method in (NOOP, TORCH):
            continue
        passes = figures.noop_s(medians, variant) if subject.passes_s is None else subject.passes_s
        made[variant] = predicted.iteration(
            variant,
            task,
            subject.shapes[variant.batch],
            passes_s=passes,
            rates=rates[variant.kind],
            lines=lines,
            world=world,
        ).total_s
    return made


def shaped_mbit(network: schema.Network) -> float | None:
    """The nominal rate in 10**6 bits a second of the slower direction; None for links as they are."""
    if not network.shape or network.up_mbit is None or network.down_mbit is None:
        return None
    return min(network.up_mbit, network.down_mbit)


def check(config: schema.Config, subjects: Sequence[Subject], device: torch.device) -> None:
    """Refused, on all ranks alike, where memory is short, or the links alone would take more than an hour; `force` goes
    on."""
    task, world, mbit = config.task, config.train.world, shaped_mbit(config.network)
    assert isinstance(task, schema.Measured)
    if config.force:
        return
    free, where = checks.available_memory(config, device)
    have = float(collectives.all_gather(torch.tensor(free, dtype=torch.float64, device=device)).min())
    sharing = world if device.type == "cpu" else 1
    seconds = 0.0
    for subject in subjects:
        shapes = [(name, shape, 4) for name, shape in next(iter(subject.shapes.values())).shapes]
        cells = variants(task, subject.ranks, list(subject.shapes))
        need = copies(subject, cells) * 4 * sum(math.prod(shape) for _, shape, _ in shapes) * sharing
        if need > have:
            raise Refused(
                f"{subject.name or task.kind} needs about {checks.readable(need)} for {world} ranks; {where} has "
                f"{checks.readable(have)}: fewer ranks (train.world), or a smaller model",
                reason="memory",
            )
        for variant in cells:
            if mbit is None or variant.method in (NOOP, TORCH):
                continue
            sent = compressed.mean_bytes(shapes, variant.config(task), world, 2)
            once = sum(links.bus_factor(kind, world) * nbytes for kind, nbytes in sent.items()) * 8e-6 / mbit
            seconds += once * (task.warmup + task.steps) * task.rounds
    if seconds > checks.MAX_CPU_S:
        raise Refused(
            f"the links alone would take {seconds / 3600:.1f} hours at {mbit:g} Mbit/s: "
            "fewer task.methods, task.models or task.rounds, or force=true",
            reason="time",
        )
