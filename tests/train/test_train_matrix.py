"""Every family, method and engine trains, and what the estimate says it holds is what it holds, within 10 %.

One fp32 step of a tiny model each, on two real gloo ranks. The bytes are the accounted ones: weights, gradients,
optimizer, master copies and saved tensors of one rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmsys import compose, cost, runner, schema
from llmsys import job as jobs
from llmsys.comm.place import Place
from rank_pool import ENGINES, Pool

HERE = "test_train_matrix"
FAMILIES = {
    "llama": ["model=llama_tiny", "data=synthetic", "data.num_examples=24"],
    "gpt2": ["model=gpt2_tiny", "data=synthetic", "data.num_examples=24"],
    "bert": ["model=bert_tiny", "data=code_packages", "data.max_train=32", "data.max_val=16"],
    "roberta": ["model=roberta_tiny", "data=code_packages", "data.max_train=32", "data.max_val=16"],
    "t5": ["model=t5_tiny", "data=code_docstrings", "data.max_train=32", "data.max_val=4", "train.target_length=16"],
    "resnet": ["model=resnet_tiny", "data=digits", "data.max_train=32", "data.max_val=16"],
    "vgg": ["model=vgg_tiny", "data=digits", "data.max_train=32", "data.max_val=16"],
}
METHODS = ["full", "lora_peft", "lorafa_peft"]
SMALL = ["train.steps=2", "train.global_batch=4", "train.micro_batch=2", "train.length=64", "train.threads=1"]
SMALL += ["train.generate_max=2", "profile.warmup=1", "train.save_final=false"]
QUICK = {
    ("llama", "lorafa_peft", "ddp"),
    ("bert", "lorafa_peft", "ddp"),
    ("gpt2", "lorafa_peft", "ddp"),
    ("roberta", "full", "ddp"),
    ("resnet", "full", "ddp"),
}
"""What the short suite tries; test_cost_engines has every engine, to 1 %."""


def combinations() -> Iterator[Any]:
    for family in FAMILIES:
        convnet = family in ("resnet", "vgg")
        for method in METHODS[:1] if convnet else METHODS:
            for engine in (name for name in ENGINES if name != "fsdp2-whole"):
                if engine == "tp" and family not in ("llama", "bert", "roberta"):
                    continue
                quick = (family, method, engine) in QUICK
                yield pytest.param(family, method, engine, marks=[] if quick else pytest.mark.slow)


class Pools:
    """Two ranks for ZeRO-3, which changes torch's linear layers as long as a process lives, and two for the rest."""

    def __init__(self) -> None:
        self._made: dict[bool, Pool] = {}

    def of(self, engine: str) -> Pool:
        kind = engine.startswith("zero3")
        if kind not in self._made:
            self._made[kind] = Pool()
        return self._made[kind]

    def close(self) -> None:
        for pool in self._made.values():
            pool.close()


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    made = Pools()
    yield made
    made.close()


def run(place: Place, results: str, overrides: list[str]) -> dict[str, Any]:
    """One rank of a run; rank 0's summary and the estimate for it."""
    config = compose.compose([*SMALL, f"results={results}", f"train.world={place.world}", *overrides])
    made = jobs.make(config)
    Path(made.out).mkdir(parents=True, exist_ok=True)
    record = runner.run(made, place=place)
    typed = schema.build(made.config)
    parts = cost.estimate(
        typed.model,
        typed.train,
        typed.method,
        typed.engine,
        num_labels=typed.model.num_classes if isinstance(typed.model, schema.ConvNet) else len(typed.data.labels),
        padded=typed.model.objective in ("classification", "seq2seq"),
    )
    return {"status": record.status, "error": record.error, "summary": record.summary, "estimate": parts}


@pytest.mark.parametrize(("family", "method", "engine"), list(combinations()))
def test_the_estimate_is_what_a_rank_holds(pools: Pools, family: str, method: str, engine: str, tmp_path: Path) -> None:
    """Also: the run ends well, with a finite score, whatever is combined."""
    overrides = [*FAMILIES[family], *ENGINES[engine], f"method={method}"]
    found = pools.of(engine).call(f"{HERE}:run", str(tmp_path), overrides)[0]
    assert found["status"] == "ok", found["error"]
    summary, parts = found["summary"], found["estimate"]
    kinds = {key.removesuffix("_bytes"): value for key, value in summary.items() if key.removesuffix("_bytes") in parts}
    saved = {"saved": [summary["saved_bytes"], parts["activations"] + parts["logits"]]}
    shown = {**{kind: [value, parts[kind]] for kind, value in kinds.items()}, **saved}
    assert sum(parts.values()) == pytest.approx(summary["accounted_bytes"], rel=0.1), f"measured, estimated: {shown}"
