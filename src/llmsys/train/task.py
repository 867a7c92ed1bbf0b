"""The task `train`: checks in order of their price, then the loop, then what it cost.

Order: config, data, memory, time, weights. What cannot run says so before anything large is loaded.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

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
    from collections.abc import Iterator
    from pathlib import Path

    from llmsys.context import Context
    from llmsys.data import Dataset
    from llmsys.data.tokenizer import Tokenizer


def train(config: schema.Config, context: Context) -> dict[str, Any]:
    """Trains and evaluates as `config` says, in `context.out`; returns what goes into the record.

    ValueError for a setting that cannot be, Refused for too little memory or time, NotANumber for a diverged run.
    """
    from llmsys import data, models
    from llmsys.models import weights

    context.kept = "an earlier checkpoint, if there is one, serves"
    reference = context.method if isinstance(context.method, Reference) else None
    lr = 0.0 if reference else checks.learning_rate(config)
    checks.libraries(config)
    source = data.open(config.data, config.model.objective)
    if isinstance(reference, Majority):
        return {**reference.record(source), "data_hash": source.hash}
    if not reference:
        config = checks.resolved(config, context.device)
    predicted = {} if reference else predict(config, context)
    folder = weights.find(config.model, config.results, context.run_folder)
    with reproducible(config.train.seed, context.threads, config.train.deterministic):
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
        if isinstance(reference, Probe):
            return {**reference.record(config, context, model, dataset, source), "data_hash": source.hash}
        return {**fit(config, context, model, dataset, lr, predicted, tokenizer), "data_hash": source.hash}


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


def fit(
    config: schema.Config,
    context: Context,
    model: nn.Module,
    dataset: Dataset,
    lr: float,
    predicted: dict[str, float],
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    """Prepares `model` (in place), trains it, saves it and measures it."""
    from llmsys.models import blocks, chunk_loss

    model = context.method.prepare(model, _sample(config, context, dataset))
    if isinstance(config.model, schema.Transformer):
        context.method.recompute(model, recompute.policies(config.train.recompute, len(blocks(model))))
    if config.train.loss == "chunked":
        chunk_loss(model)
    loop = Loop(config, context, model, dataset, lr, tokenizer)
    outcome = loop.run()
    files = {}
    if config.train.save_final:
        meta = {"exp": config.name, "method": config.method.kind, "base": dataclasses.asdict(config.model)}
        state = loop.saver.weights(model)
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
