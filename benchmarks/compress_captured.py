"""How much of what is to be sent Power-SGD and ACP-SGD send in a step: why the one needs fewer steps than the other.

    python benchmarks/compress_captured.py                  # r = 4 and 8 of both, 200 steps each: 6 minutes on one core
    python benchmarks/compress_captured.py --kept           # the table of the committed record

The setting is that of `compress_convergence.py`, on one process: what low-rank methods do depends on the mean of the
ranks' gradients alone. In a step, with G the gradients of all compressed matrices, E what error feedback has kept of
earlier ones, and S what is sent:

    captured    |S|^2 / |G + E|^2
    cosine      of S and G: whether what is applied is this step's gradient
    kept        |E'| / |G|, E' what is kept now

each the median over the steps of a quarter of the run, ACP-SGD's even steps (which send P, by the factor of the
matrix's inputs) and odd ones (Q, by that of its outputs) apart.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import comparison
import quality_table
from llmsys import compose, schema
from llmsys.job import Record

NAME = "compress_captured"
RECORDS = Path(__file__).parent / "records"
WAYS = (("powersgd", 4), ("powersgd", 8), ("acpsgd", 4), ("acpsgd", 8))
SEED, RATE, BATCH = 100, 5e-4, 8
"""The seed on which the comparison tunes, the rate that it finds best for all four."""
QUARTERS = 4
WHAT = ("captured", "cosine", "kept")


def setting(steps: int, overrides: Sequence[str]) -> schema.Config:
    """That of the comparison, whose schedule is for its own number of steps whatever `steps` are made here."""
    words = ["+exp=compress_convergence", "train.world=1", f"train.micro_batch={BATCH}", f"train.seed={SEED}"]
    config = schema.build(compose.compose([*words, *overrides]))
    if steps > config.train.steps:
        raise ValueError(f"--steps {steps}: the schedule ends after {config.train.steps}")
    return config


def train(config: schema.Config, method: str, r: int, steps: int) -> dict[str, list[float]]:
    """`loss`, and each of `WHAT`, by step."""
    from llmsys import data, models
    from llmsys.compress import Aggregator, CompressConfig
    from llmsys.train import optimizer
    from llmsys.train.task import load_tokenizer

    source = data.open(config.data, config.model.objective)
    dataset = data.encode(source, load_tokenizer(config.model, None), config.train, config.model)
    model = models.load(
        config.model, objective=source.objective, num_labels=0, device=torch.device("cpu"), seed=SEED, folder=None
    ).train()
    named = list(model.named_parameters())
    aggregator = Aggregator(named, CompressConfig(method=method, r=r))
    adamw, schedule = optimizer.adamw(model, config.train, RATE), optimizer.schedule(config.train)
    found: dict[str, list[float]] = defaultdict(list)
    for step in range(steps):
        chosen = data.order(len(dataset.train), BATCH, SEED, step)
        loss = model(**dataset.train.batch(chosen, seed=(SEED, step))).loss
        loss.backward()
        gradients = [parameter.grad for _, parameter in named]
        before = {name: parameter.grad.clone() for name, parameter in named}
        aggregator.aggregate(gradients)
        kept = {name[: -len("/error")]: e for name, e in aggregator.tensors().items() if name.endswith("/error")}
        sent = {name: parameter.grad for name, parameter in named if name in kept}
        for what, value in measured({name: before[name] for name in sent}, sent, kept).items():
            found[what].append(value)
        found["loss"].append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
        for group in adamw.param_groups:
            group["lr"] = RATE * schedule(step)
        adamw.step()
        adamw.zero_grad()
    return found


def measured(gradients: dict[str, Tensor], sent: dict[str, Tensor], kept: dict[str, Tensor]) -> dict[str, float]:
    """`WHAT` of one step. On one process S + E' is G + E."""
    dot = sum(float((sent[name] * gradient).sum()) for name, gradient in gradients.items())
    own, whole = _square(gradients.values()), _square(sent[name] + kept[name].view_as(sent[name]) for name in sent)
    s = _square(sent.values())
    return {
        "captured": s / whole,
        "cosine": dot / math.sqrt(s * own),
        "kept": math.sqrt(_square(kept.values()) / own),
    }


def _square(tensors: Iterable[Tensor]) -> float:
    return sum(float(each.square().sum()) for each in tensors)


def record(config: schema.Config, steps: int, overrides: Sequence[str]) -> Record:
    """Samples `<method>/<r>/<what>` by step."""
    samples = {
        f"{method}/{r}/{what}": [round(value, 5) for value in values]
        for method, r in WAYS
        for what, values in train(config, method, r, steps).items()
    }
    told = {"steps": steps, "seed": SEED, "rate": RATE, "batch": BATCH, "overrides": list(overrides)}
    return comparison.record(NAME, told, [], config.train.threads or torch.get_num_threads(), {}, samples)


def table(whole: Record) -> str:
    """A row for each way and kind of step, a column for each quarter of the run."""
    steps = whole.config["steps"]
    cuts = [(steps * i // QUARTERS, steps * (i + 1) // QUARTERS) for i in range(QUARTERS)]
    header = ["", "steps", *(f"{what}, step {a + 1} to {b}" for what in WHAT for a, b in cuts)]
    rows = []
    for way in dict.fromkeys(key.rpartition("/")[0] for key in whole.samples):
        method, _, r = way.partition("/")
        kinds = (("even (P)", 0, 2), ("odd (Q)", 1, 2)) if method == "acpsgd" else (("all", 0, 1),)
        for name, first, stride in kinds:
            cells = []
            for what in WHAT:
                values = whole.samples[f"{way}/{what}"]
                for a, b in cuts:
                    cells.append(f"{statistics.median(values[a + (first - a) % stride : b : stride]):.2f}")
            rows.append([f"{method}, r = {r}", name, *cells])
    return quality_table.markdown(header, rows)


def main(argv: Sequence[str]) -> Record:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kept", action="store_true", help="the table of the record in benchmarks/records")
    parser.add_argument("--keep", action="store_true", help="write the record to benchmarks/records")
    parser.add_argument("--override", dest="overrides", nargs="+", default=[], help="settings: KEY=VALUE")
    asked = parser.parse_args(argv)
    if asked.kept:
        whole = quality_table.newest(RECORDS / NAME)
    else:
        torch.set_num_threads(1)
        whole = record(setting(asked.steps, asked.overrides), asked.steps, asked.overrides)
    print(table(whole))
    if asked.keep:
        comparison.keep([whole], RECORDS)
    return whole


if __name__ == "__main__":
    main(sys.argv[1:])
