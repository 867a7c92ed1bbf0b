"""Who is compared by `lorafa_quality`, and at what: families of tasks, and methods at ranks of equal size.

The sizes are the cost model's: trained parameters, and accounted memory (weights, gradients, optimizer, saved tensors).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import paired
from fresh_runs import Words
from llmsys import compose, schema
from llmsys.job import Record

R, WIDER = 8, 32
FEW = ("full", "lora", "lorafa_rank", "lorafa_memory")
CONTESTANTS = (*FEW, "lorafa_params", f"lorafa_r{WIDER}", "lora_peft", "lorafa_peft_memory")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A task to be learnt: its experiment with what this comparison changes, and what is measured.

    `margin`: how much worse than LoRA and full fine-tuning LoRA-FA may be, in units of `factor` times the metric.
    `base`: the experiment whose weights it starts from. `starts`: method -> the rate to begin the search at.
    `tuning`: the seeds that learning rates are compared on, the first for all of them, the others for the best.
    """

    name: str
    overrides: Words
    metric: str
    unit: str
    higher: bool
    margin: float
    starts: Mapping[str, float]
    factor: float = 1.0
    base: str | None = None
    tuning: tuple[int, ...] = (100, 101)

    def value(self, record: Record) -> float:
        return self.factor * record.summary[self.metric]


STARTS = {"full": 5e-4, "lora": 2e-3, "lora_peft": 2e-3, "lorafa": 5e-3}
LOSS = {"metric": "val_loss", "unit": "nats a token", "higher": False, "margin": 0.02}
WHOLE = ("train.checkpoint_every=0", "train.save_final=false")
CAUSAL_BATCH = ("train.global_batch=4", "train.micro_batch=4")
FAMILIES = {
    "encoder": Family(
        name="encoder",
        overrides=("+exp=lorafa_minilm", "train.steps=50", "train.length=64", "baselines=[]", *WHOLE),
        metric="accuracy",
        unit="%",
        higher=True,
        margin=1.0,
        factor=100.0,
        starts=STARTS,
    ),
    "seq2seq": Family(
        name="seq2seq",
        overrides=("+exp=lorafa_t5_docstrings", "train.steps=60", "data.max_val=128", *WHOLE),
        base="pretrain_t5_4m",
        tuning=(100,),  # one tells rates apart: seeds differ by 0.003 nats, of a margin of 0.02
        starts=STARTS,
        **LOSS,  # type: ignore[arg-type]
    ),
    "causal": Family(
        name="causal",
        overrides=("+exp=lorafa_llama_6m", "train.steps=60", *CAUSAL_BATCH, "data.max_val=128", *WHOLE),
        base="pretrain_llama_6m",
        starts=STARTS,
        **LOSS,  # type: ignore[arg-type]
    ),
}


@dataclass(frozen=True)
class Contestant:
    """A method at a rank, and what the cost model says of it."""

    name: str
    method: str
    r: int | None
    trainable_params: int
    accounted_bytes: int

    @property
    def overrides(self) -> Words:
        """alpha = 2 r throughout, so that s = 2."""
        return (f"method={self.method}", *_width(self.r))


def _width(r: int | None) -> Words:
    return () if r is None else (f"method.r={r}", f"method.alpha={2 * r}")


def contestants(family: Family, asked: argparse.Namespace) -> list[Contestant]:
    """Who is compared in this family; the ranks are what the cost model makes of `R`."""

    def sizes(method: str, r: int | None = None) -> tuple[int, int]:
        return _sizes(_config((*family.overrides, f"method={method}", *_width(r), *asked.overrides)))

    full, lora, lora_peft = sizes("full"), sizes("lora", R), sizes("lora_peft", R)
    by_r = _by_rank(_config((*family.overrides, "method=lorafa", *asked.overrides)))
    params, memory = ({r: each[i] for r, each in by_r.items()} for i in (0, 1))
    ranks = {
        "lorafa_rank": R,
        "lorafa_params": paired.nearest(params, lora[0]),
        "lorafa_memory": paired.largest_within(memory, lora[1]),
        "lorafa_peft_memory": paired.largest_within(memory, lora_peft[1]),
        f"lorafa_r{WIDER}": WIDER,
    }
    found = [
        Contestant("full", "full", None, *full),
        Contestant("lora", "lora", R, *lora),
        Contestant("lora_peft", "lora_peft", R, *lora_peft),
        *(Contestant(name, "lorafa", r, *by_r[r]) for name, r in ranks.items() if r in by_r),
    ]
    return [each for each in found if each.name in asked.contestants]


@functools.cache
def _config(words: Words) -> schema.Config:
    return schema.build(compose.compose(words))


def _sizes(config: schema.Config) -> tuple[int, int]:
    """(trained parameters, accounted bytes) by the cost model."""
    import torch

    from llmsys.cost import Case, estimate, trainable_params
    from llmsys.train.checks import facts

    known = facts(config, torch.device("cpu"))
    parts = (config.model, config.train, config.method, config.engine)
    return trainable_params(Case(*parts, **known)), sum(estimate(*parts, **known).values())


def _by_rank(config: schema.Config) -> dict[int, tuple[int, int]]:
    """`_sizes` of LoRA-FA for every r that its narrowest layer admits."""
    model, method = config.model, config.method
    assert isinstance(model, schema.Transformer)
    assert isinstance(method, schema.Adapter)
    width = min(model.hidden_size * model.num_kv_heads // model.num_heads, model.intermediate_size)
    made = {r: dataclasses.replace(method, r=r, alpha=2.0 * r) for r in range(1, width + 1)}
    return {r: _sizes(dataclasses.replace(config, method=each)) for r, each in made.items()}
