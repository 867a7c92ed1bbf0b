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
from llmsys.train.loop import Loop
from llmsys.train.measure import measure
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
    from llmsys.models.filling import Filler


def train(config: schema.Config, context: Context) -> dict[str, Any]:
    """Trains and evaluates as `config` says, in `context.out`; returns what goes into the record.

    ValueError for a setting that cannot be, Refused for too little memory or time, NotANumber for a diverged run.
    """
    context.kept = "an earlier checkpoint, if there is one, serves"
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
        _, dataset, model, fill = _load(config, context, source, folder)
        fill(model)
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
        tokenizer, dataset, model, fill = _load(config, context, source, folder)
        if context.method.reads_weights or not context.engine.cuts_weights:
            fill(model)
        loop = _loop(config, context, model, dataset, lr, tokenizer, fill)
        yield Trainer(loop, predicted, source.hash)


def _load(
    config: schema.Config, context: Context, source: Source, folder: Path | None
) -> tuple[Tokenizer | None, Dataset, nn.Module, Filler]:
    """Tokenizer, encoded data, the model, and what fills it as it was built or published."""
    from llmsys import data, models

    tokenizer = load_tokenizer(config.model, folder)
    dataset = data.encode(source, tokenizer, config.train, config.model)
    model, fill = models.unfilled(
        config.model,
        objective=source.objective,
        num_labels=len(source.labels),
        device=context.device,
        seed=config.train.seed,
        folder=folder,
    )
    return tokenizer, dataset, model, fill


def _loop(
    config: schema.Config,
    context: Context,
    model: nn.Module,
    dataset: Dataset,
    lr: float,
    tokenizer: Tokenizer | None,
    fill: Filler,
) -> Loop:
    """Prepares `model`, in place: method, recomputation, loss."""
    from llmsys.models import blocks, chunk_loss

    model = context.method.prepare(model, _sample(config, context, dataset))
    if isinstance(config.model, schema.Transformer):
        context.method.recompute(model, recompute.policies(config.train.recompute, len(blocks(model))))
    if config.train.loss == "chunked":
        chunk_loss(model)
    return Loop(config, context, model, dataset, lr, tokenizer, fill)


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
    """Predicted peak memory and step time for the record; Refused where either is too much, Contradiction where the
    device has not what is asked of it."""
    checks.formats(config, context.device)
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
    measured = measure(config, loop, outcome)
    files |= loop.saver.finish(config.train.steps)
    measured["summary"] |= predicted
    return {**measured, "files": files, "resumed_from_step": outcome.resumed_from_step}


def _sample(config: schema.Config, context: Context, dataset: Dataset) -> Iterator[dict[str, Tensor]]:
    """`SAMPLE` micro-batches of the training data, the first of the first epoch."""
    from llmsys.data import order

    train = config.train
    for step in range(SAMPLE):
        indices = order(len(dataset.train), train.micro_batch, train.seed, step)
        batch = dataset.train.batch(indices, seed=(train.seed, step))
        yield {key: value.to(context.device) for key, value in batch.items()}
