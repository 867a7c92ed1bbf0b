"""The task `train`: checks in order of their price, then the loop, then what it cost.

Order: config, data, memory, time, weights. What cannot run says so before anything large is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from llmsys import schema
from llmsys.profile import memory
from llmsys.schema import recompute
from llmsys.train import checks
from llmsys.train.loop import Loop, Outcome
from llmsys.train.references import Majority, Probe, Reference
from llmsys.train.reproducible import reproducible

SAMPLE = 8
"""Micro-batches that a method may look at before it begins."""

if TYPE_CHECKING:
    from pathlib import Path

    from llmsys.context import Context
    from llmsys.data import Dataset
    from llmsys.data.examples import Source
    from llmsys.data.tokenizer import Tokenizer


def train(config: schema.Config, context: Context) -> dict[str, Any]:
    """Trains and evaluates as `config` says, in `context.out`; returns what goes into the record.

    ValueError for a setting that cannot be, Refused for too little memory or time, NotANumber for a diverged run.
    """
    if isinstance(context.method, Reference):
        return _refer(config, context, context.method)
    with trainer(config, context) as ready:
        return {**fit(context, ready.loop, ready.predicted), "data_hash": ready.data_hash}


def _refer(config: schema.Config, context: Context, reference: Reference) -> dict[str, Any]:
    """What needs no training to be compared with."""
    from llmsys import data
    from llmsys.models import weights

    checks.libraries(config)
    source = data.open(config.data, config.model.objective)
    if isinstance(reference, Majority):
        return {**reference.record(source), "data_hash": source.hash}
    assert isinstance(reference, Probe)
    folder = weights.find(config.model, config.results, context.run_folder)
    with reproducible(config.train.seed, context.threads, config.train.deterministic):
        _, dataset, model = _load(config, context, source, folder)
        return {**reference.record(config, context, model, dataset, source), "data_hash": source.hash}


class Trainer(NamedTuple):
    """A loop that has taken no step yet, what was predicted of its steps, and the hash of its data."""

    loop: Loop
    predicted: dict[str, float]
    data_hash: str


@contextlib.contextmanager
def trainer(config: schema.Config, context: Context) -> Iterator[Trainer]:
    """What `train` trains with, also for tasks that take single steps of it; its settings hold within the block. Raises
    what `train` does; not for methods without steps."""
    from llmsys import data
    from llmsys.models import weights

    lr = checks.learning_rate(config)
    checks.libraries(config)
    source = data.open(config.data, config.model.objective)
    config = checks.resolved(config, context.device)
    predicted = predict(config, context)
    folder = weights.find(config.model, config.results, context.run_folder)
    with reproducible(config.train.seed, context.threads, config.train.deterministic):
        tokenizer, dataset, model = _load(config, context, source, folder)
        yield Trainer(_loop(config, context, model, dataset, lr, tokenizer), predicted, source.hash)


def _load(
    config: schema.Config, context: Context, source: Source, folder: Path | None
) -> tuple[Tokenizer | None, Dataset, nn.Module]:
    """Tokenizer, encoded data, and the model as it was built or published."""
    from llmsys import data, models

    tokenizer = load_tokenizer(config.model, folder)
    dataset = data.encode(source, tokenizer, config.train, config.model)
    model = models.load(
        config.model,
        objective=source.objective,
        num_labels=len(source.labels),
        device=context.device,
        seed=config.train.seed,
        folder=folder,
    )
    return tokenizer, dataset, model


def _loop(
    config: schema.Config,
    context: Context,
    model: nn.Module,
    dataset: Dataset,
    lr: float,
    tokenizer: Tokenizer | None,
) -> Loop:
    """Prepares `model`, in place: method, recomputation, loss."""
    from llmsys.models import blocks, chunk_loss

    model = context.method.prepare(model, _sample(config, context, dataset))
    if isinstance(config.model, schema.Transformer):
        context.method.recompute(model, recompute.policies(config.train.recompute, len(blocks(model))))
    if config.train.loss == "chunked":
        chunk_loss(model)
    return Loop(config, context, model, dataset, lr, tokenizer)


def load_tokenizer(model: schema.Model, folder: Path | None) -> Tokenizer | None:
    """The tokenizer of a model for text; None for images. ValueError where it has more tokens than the model."""
    from llmsys.data import tokenizer as tokenizers

    if not isinstance(model, schema.Transformer):
        return None
    tokenizer = tokenizers.load(model.tokenizer, folder)
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"model.vocab_size={model.vocab_size}: the tokenizer {model.tokenizer} has {tokenizer.vocab_size} tokens"
        )
    return tokenizer


def predict(config: schema.Config, context: Context) -> dict[str, float]:
    """Predicted peak memory and step time for the record; Refused where either is too much."""
    return {
        "predicted_peak_gib": checks.check_memory(config, context.device) / memory.GIB,
        "predicted_step_ms": checks.check_time(config, context.device),
    }


def fit(context: Context, loop: Loop, predicted: dict[str, float]) -> dict[str, Any]:
    """Trains the loop's model, saves it and measures it."""
    config = loop.config
    outcome = loop.run()
    files = {}
    if config.train.save_final:
        meta = {"exp": config.name, "method": config.method.kind, "base": dataclasses.asdict(config.model)}
        state = loop.saver.weights(loop.model)
        if context.place.rank == 0:
            context.method.save(state, context.out / "weights", {**meta, "steps": config.train.steps})
        files["weights"] = "weights"
    summary, kernel = measure(config, loop, outcome)
    files |= loop.saver.finish(config.train.steps)
    return {
        "summary": {**summary, **predicted},
        "samples": loop.spans.samples,
        "files": files,
        "kernel": kernel,
        "resumed_from_step": outcome.resumed_from_step,
    }


def _policies(config: schema.Config, model: nn.Module) -> dict[str, int]:
    """How many blocks compute what again, as it was done: `blocks_<policy>` (`attn+mlp` as `attn_mlp`)."""
    from llmsys.models import blocks

    if config.train.recompute == "none":
        return {}
    each = recompute.policies(config.train.recompute, len(blocks(model)))
    return {f"blocks_{policy.replace('+', '_')}": each.count(policy) for policy in recompute.POLICIES if policy in each}


def _sample(config: schema.Config, context: Context, dataset: Dataset) -> Iterator[dict[str, Tensor]]:
    """`SAMPLE` micro-batches of the training data, the first of the first epoch."""
    from llmsys.data import order

    train = config.train
    for step in range(SAMPLE):
        indices = order(len(dataset.train), train.micro_batch, train.seed, step)
        batch = dataset.train.batch(indices, seed=(train.seed, step))
        yield {key: value.to(context.device) for key, value in batch.items()}


def measure(config: schema.Config, loop: Loop, outcome: Outcome) -> tuple[dict[str, float], str]:
    """(summary, attention kernel) of a finished loop. The probe step comes last, so it disturbs no measurement."""
    from llmsys.models import kernel

    spans = loop.spans
    batch = {key: value.to(loop.device) for key, value in loop.micro_batches(0)[0].items()}
    saved = memory.saved_tensors(loop.model, lambda: loop.forward(batch, 1)) if config.profile.probe else 0
    loop.engine.settle()
    kept = loop.context.grad_sync.held()
    accounted = memory.accounted({**loop.engine.held(), **({"compress": kept} if kept else {})}, saved)
    if not config.profile.probe:
        accounted = {key: value for key, value in accounted.items() if key not in ("saved_bytes", "accounted_bytes")}
    with loop.mixed():
        observed = kernel.observed(loop.model, batch)
    seconds = spans.summary["step_ms_p50"] / 1e3
    throughput = {"tokens_per_s": outcome.tokens_per_step / seconds} if outcome.tokens_per_step else {}
    summary = {
        "loss": outcome.loss,
        **outcome.evaluation,
        **throughput,
        "samples_per_s": config.train.global_batch / seconds,
        **spans.summary,
        **loop.peak.summary,
        **accounted,
        **loop.watch.summary,
        **loop.traffic.summary,
        **_policies(config, loop.model),
        **loop.sizes,
        "timed_steps": len(spans.samples["step_ms"]),
        "profiler_overhead_us_per_step": spans.overhead_us_per_step(),
    }
    return summary, observed
