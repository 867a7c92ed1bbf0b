"""Training tokens/s, end to end, of our LoRA-FA and LoRA beside peft's: forward, backward and optimizer.

    python benchmarks/lorafa_speed.py [--size moderate|small] [--rounds 20] [--out benchmarks/records]
                                      [--dtype bf16|fp32] [--r 16] [--threads 0] [--device cpu] [--only NAME,NAME]

The peers are peft's LoRA (fp32 adapters, torch's fused AdamW) and peft's LoRA-FA with its own optimizer, both at our
rank. In every round each subject makes one step on the same batch; rounds go through the subjects forwards and
backwards in turn. What is quoted is the median over the rounds of the ratio of two subjects' times in one round, with
a bootstrap interval (`side_by_side.py`), on the wall's clock and in CPU time.

That all begin with the same loss is asserted, and that what a block computes again changes no bit of later ones.
`moderate` is bound by matrix products, `small` by what is around them.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import lorafa_subjects as subjects
import side_by_side
from llmsys import compose, job, models, schema
from llmsys.profile import environment

NAMES = ["peft_lora", "peft_lorafa", "lora/none", "lora/mlp", "lorafa/none", "lorafa/mlp"]
PAIRS = ["lorafa/none:peft_lora", "lorafa/none:peft_lorafa", "lorafa/none:lora/none", "lora/none:peft_lora"]
PAIRS += ["lorafa/mlp:lorafa/none", "lorafa/mlp:peft_lora", "lorafa/mlp:peft_lorafa"]
"""What is claimed: the first's speed over the second's."""
LLAMA = ["model=llama_6m", "model.tokenizer=bytes", "data=synthetic"]
SIZES = {
    "moderate": (["model.hidden_size=768", "model.intermediate_size=2064", "model.num_heads=12"], 4, 4, 256),
    "small": (["model.hidden_size=64", "model.intermediate_size=176", "model.num_heads=4"], 4, 4, 64),
    "tiny": (["model.hidden_size=32", "model.intermediate_size=80", "model.num_heads=4"], 1, 2, 16),
}
"""Name -> (overrides, layers, batch, length)."""


class Subject:
    """A model of its own, so that all of a round lie beside each other in memory."""

    def __init__(self, stack: ExitStack, config: schema.Config, name: str, setting: subjects.Setting) -> None:
        device = torch.device(config.hardware.device)
        model = config.model
        base = models.load(model, objective=model.objective, num_labels=0, device=device, seed=0, folder=None)
        self.trainer = stack.enter_context(subjects.trainer(base, name, setting))
        self.device = device
        self.losses: list[float] = []
        self.times: list[list[float]] = []
        """Of each step, ms on each clock of `side_by_side.CLOCKS`."""
        self.optimizer_ms: list[float] = []
        step = self.trainer.optimizer.step

        def timed_step() -> None:
            self._wait()
            before = time.perf_counter()
            step()
            self._wait()
            self.optimizer_ms.append((time.perf_counter() - before) * 1e3)

        self.trainer.optimizer.step = timed_step  # type: ignore[assignment, method-assign]

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        before = side_by_side.read_clocks()
        self.losses.append(self.trainer.step(batch))
        self._wait()
        self.times.append([(b - a) * 1e3 for a, b in zip(before, side_by_side.read_clocks(), strict=True)])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(config: schema.Config, names: list[str], setting: subjects.Setting, rounds: int, warmup: int) -> Any:
    """Name -> `Subject` that has made `warmup + rounds` steps."""
    train = config.train
    batch = subjects.batch(
        config.model.vocab_size,  # type: ignore[attr-defined]  # a transformer
        train.micro_batch,
        train.length,
        torch.device(config.hardware.device),
    )
    with ExitStack() as stack:
        made = {name: Subject(stack, config, name, setting) for name in names}
        for number in range(warmup + rounds):
            for name in names if number % 2 else reversed(names):
                made[name].step(batch)
    bf16 = config.model.dtype == "bf16"
    subjects.check_first_losses({name: subject.losses[0] for name, subject in made.items()}, 1e-3 if bf16 else 1e-5)
    for method in ("lora", "lorafa"):
        curves = {name: subject.losses for name, subject in made.items() if name.startswith(f"{method}/")}
        assert len({tuple(curve) for curve in curves.values()}) <= 1, f"policies differ: {curves}"
    return made


def summarise(made: dict[str, Subject], pairs: list[str], tokens: int, warmup: int) -> dict[str, float]:
    """Medians and quartiles of each subject, and for each pair the ratio of speeds on each clock."""
    found: dict[str, float] = {}
    columns = dict(zip(side_by_side.CLOCKS, range(len(side_by_side.CLOCKS)), strict=True))
    times = {
        clock: {name: [row[column] for row in subject.times[warmup:]] for name, subject in made.items()}
        for clock, column in columns.items()
    }
    for name, subject in made.items():
        first, _, third = statistics.quantiles(times["wall"][name], n=4, method="inclusive")
        middle = statistics.median(times["wall"][name])
        found |= {f"{name}_step_ms_p50": middle, f"{name}_step_ms_p25": first, f"{name}_step_ms_p75": third}
        found[f"{name}_tokens_per_s"] = tokens / middle * 1e3
        found[f"{name}_cpu_ms_p50"] = statistics.median(times["cpu"][name])
        found[f"{name}_optimizer_ms_p50"] = statistics.median(subject.optimizer_ms[warmup:])
    for pair in pairs:
        ours, _, peer = pair.partition(":")
        for clock in side_by_side.CLOCKS:
            ratios = [b / a for a, b in zip(times[clock][ours], times[clock][peer], strict=True)]
            low, middle, high = side_by_side.median_interval(ratios)
            found |= {
                f"{pair}_{clock}_ratio": middle,
                f"{pair}_{clock}_low": low,
                f"{pair}_{clock}_high": high,
            }
    return {key: round(value, 4) for key, value in found.items()}


def main(words: Sequence[str]) -> job.Record:
    """Measures, writes the record, prints its table, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="moderate")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default=",".join(NAMES), help="subjects, by name")
    parser.add_argument("--out", type=Path, default=side_by_side.RECORDS)
    asked = parser.parse_args(words)
    names = asked.only.split(",")
    if asked.rounds < 2:
        raise ValueError(f"--rounds {asked.rounds}: must be at least 2")
    shape, layers, batch, length = SIZES[asked.size]
    wanted = [*LLAMA, *shape, f"model.num_layers={layers}", f"train.micro_batch={batch}", f"train.global_batch={batch}"]
    wanted += [f"train.length={length}", f"model.dtype={asked.dtype}", f"train.precision={asked.dtype}"]
    wanted += [f"hardware.device={asked.device}", f"train.threads={asked.threads}", "name=lorafa_speed"]
    heads = f"model.num_kv_heads={shape[2].partition('=')[2]}"
    run = job.make(compose.compose([*wanted, heads]))
    config = schema.build(run.config)
    torch.set_num_threads(config.train.threads)
    start, started = time.perf_counter(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    made = measure(config, names, subjects.Setting(r=asked.r), asked.rounds, asked.warmup)
    pairs = [pair for pair in PAIRS if set(pair.split(":")) <= set(names)]
    settings = {"subjects": names, "pairs": pairs, "r": asked.r, "batch": batch, "length": length}
    record = job.Record(
        name="lorafa_speed",
        run_id=f"{asked.size}-{asked.dtype}-r{asked.r}-{config.hardware.device}",
        task="benchmark",
        status="ok",
        config={**run.config, "benchmark": {**settings, "rounds": asked.rounds}},
        env=environment.describe(config.hardware.device, config.train.threads),
        code_hash=job.code_hash(),
        started=started,
        seconds=round(time.perf_counter() - start, 3),
        summary=summarise(made, pairs, batch * length, asked.warmup),
        samples={
            f"{name}_{clock}_ms": [round(row[column], 4) for row in subject.times[asked.warmup :]]
            for name, subject in made.items()
            for column, clock in enumerate(side_by_side.CLOCKS)
        },
    )
    record.leave(asked.out)
    print(side_by_side.show_speeds(record))
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
