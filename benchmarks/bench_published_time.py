"""Predicted step times of listed machines against published ones: llm-foundry's tables of MPT training on 8 GPUs.

    python benchmarks/bench_published_time.py

Nothing is measured here, and nothing is fitted to these rows: a prediction goes by datasheets, by what others measured
of single operators and links, and by what is assumed (`llmsys.bench.predict`). The rows are a third party's (mosaicml,
github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md, Apache 2.0): bf16 by autocast, FSDP with whole
shards, one machine of 8 GPUs with NVSwitch.

MPT is GPT-2's architecture, so the same parameters: dimensions below, 50,368 tokens, learnt positions, fused attention,
no dropout. Their blocks have fused norms and compute them in bf16, and their FSDP is torch's first; ours are
transformers' modules under FSDP2. The error has all of that in it.

    error    the mean of |predicted / published - 1| of tokens a second
    bias     the mean of predicted / published - 1
    tau      Kendall's tau-b of the two orders
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from llmsys import compose, schema
from llmsys.bench.predict import machine as machines
from llmsys.bench.predict.prediction import predict
from llmsys.bench.report.quality import kendall

SHAPES = {
    # width, blocks, heads
    "125m": (768, 12, 12),
    "350m": (1024, 24, 16),
    "760m": (1536, 24, 12),
    "1b": (2048, 24, 16),
    "3b": (2560, 32, 20),
    "7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 48, 56),
}
CARDS = {
    "H100 80 GB": ["hardware=h100x8"],
    "A100 80 GB": ["hardware=a100x8"],
    "A100 40 GB": ["hardware=a100_sxm_40gb", "hardware.devices=8"],
}


class Row(NamedTuple):
    """A published one. `again`: blocks are computed again. `rate`: tokens a second of each GPU."""

    card: str
    model: str
    length: int
    micro: int
    accumulation: int
    again: bool
    rate: int
    params: int


ROWS = [
    Row("H100 80 GB", "30b", 2048, 3, 21, True, 2002, 29975214080),
    Row("H100 80 GB", "13b", 4096, 10, 3, True, 4717, 12864440320),
    Row("H100 80 GB", "13b", 2048, 2, 1, False, 4792, 12853954560),
    Row("H100 80 GB", "13b", 1024, 40, 3, True, 5502, 12848711680),
    Row("H100 80 GB", "7b", 8192, 8, 2, True, 6935, 6684024832),
    Row("H100 80 GB", "7b", 2048, 6, 1, False, 10643, 6658859008),
    Row("H100 80 GB", "7b", 1024, 64, 2, True, 10203, 6654664704),
    Row("H100 80 GB", "3b", 4096, 5, 6, False, 20964, 2657080320),
    Row("H100 80 GB", "3b", 512, 40, 6, False, 27965, 2647905280),
    Row("H100 80 GB", "1b", 2048, 14, 1, False, 45455, 1315950592),
    Row("H100 80 GB", "1b", 512, 56, 4, False, 52275, 1312804864),
    Row("H100 80 GB", "760m", 2048, 24, 2, False, 63147, 760470528),
    Row("A100 80 GB", "30b", 2048, 3, 21, True, 916, 29975214080),
    Row("A100 80 GB", "13b", 4096, 10, 3, True, 2060, 12864440320),
    Row("A100 80 GB", "13b", 2048, 2, 3, False, 2262, 12853954560),
    Row("A100 80 GB", "13b", 1024, 40, 3, True, 2330, 12848711680),
    Row("A100 80 GB", "7b", 8192, 8, 2, True, 3206, 6684024832),
    Row("A100 80 GB", "7b", 2048, 6, 2, False, 4641, 6658859008),
    Row("A100 80 GB", "7b", 1024, 64, 2, True, 4357, 6654664704),
    Row("A100 80 GB", "3b", 2048, 10, 2, False, 10811, 2651837440),
    Row("A100 80 GB", "3b", 512, 40, 6, False, 12127, 2647905280),
    Row("A100 80 GB", "1b", 2048, 14, 4, False, 20513, 1315950592),
    Row("A100 80 GB", "760m", 2048, 24, 2, False, 32434, 760470528),
    Row("A100 80 GB", "350m", 2048, 32, 2, False, 58782, 355985408),
    Row("A100 80 GB", "125m", 2048, 40, 2, False, 142830, 125311488),
    Row("A100 40 GB", "13b", 2048, 4, 16, True, 1668, 12853954560),
    Row("A100 40 GB", "7b", 2048, 12, 4, True, 3679, 6658859008),
    Row("A100 40 GB", "3b", 2048, 5, 8, False, 10065, 2651837440),
    Row("A100 40 GB", "1b", 2048, 8, 8, False, 19271, 1315950592),
    Row("A100 40 GB", "760m", 2048, 12, 4, False, 30173, 760470528),
    Row("A100 40 GB", "350m", 2048, 16, 4, False, 55995, 355985408),
    Row("A100 40 GB", "125m", 2048, 26, 3, False, 136334, 125311488),
]


def config(row: Row) -> schema.Config:
    """The row's run, on its machine, in our settings."""
    width, blocks, heads = SHAPES[row.model]
    sizes = {
        "vocab_size": 50368,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_layers": blocks,
        "num_heads": heads,
        "num_kv_heads": heads,
        "max_length": row.length,
    }
    letters = "F+R+Z3" if row.again else "F+Z3"
    given = _composed(row.card, letters)
    assert isinstance(given.model, schema.Transformer)
    train = dataclasses.replace(
        given.train,
        length=row.length,
        micro_batch=row.micro,
        global_batch=row.micro * row.accumulation * given.train.world,
    )
    return dataclasses.replace(given, model=dataclasses.replace(given.model, **sizes, dropout=0.0), train=train)


@functools.cache
def _composed(card: str, letters: str) -> schema.Config:
    own = ["model=gpt2", "model.dtype=fp32", "train.precision=bf16", "engine=fsdp2", f"techniques={letters}"]
    return schema.build(compose.compose(["+exp=bench_predict", *own, *CARDS[card]]))


def predicted(row: Row) -> float:
    """Tokens a second of each GPU."""
    given = config(row)
    return predict(given, machines.of(given)).tokens_per_s / given.train.world


def scores(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """`error_percent`, `worst_percent`, `bias_percent` and `tau` of (predicted, published)."""
    errors = [100 * (wanted / known - 1) for wanted, known in pairs]
    return {
        "error_percent": statistics.mean(map(abs, errors)),
        "worst_percent": max(map(abs, errors)),
        "bias_percent": statistics.mean(errors),
        "tau": kendall(pairs) or 0.0,
    }


def main(rows: Sequence[Row] = ROWS) -> dict[str, dict[str, float]]:
    """Prints the tables; scores by card, and of `all`."""
    pairs = [(predicted(row), float(row.rate)) for row in rows]
    print("| card | model | length | micro-batch | R | published tokens/s | predicted | error |")
    print("|---|---|---:|---:|---|---:|---:|---:|")
    for row, (wanted, known) in zip(rows, pairs, strict=True):
        cells = (row.card, row.model, row.length, f"{row.accumulation} x {row.micro}", "R" * row.again)
        print("| " + " | ".join(map(str, cells)), end=" | ")
        print(f"{known:,.0f} | {wanted:,.0f} | {100 * (wanted / known - 1):+.1f} % |")
    names = [*dict.fromkeys(row.card for row in rows), "all"]
    own = {n: [pair for row, pair in zip(rows, pairs, strict=True) if n in (row.card, "all")] for n in names}
    found = {name: scores(group) for name, group in own.items()}
    print("\n| | rows | mean error | worst | bias | Kendall's tau |\n|---|---:|---:|---:|---:|---:|")
    for name, each in found.items():
        print(
            f"| {name} | {len(own[name])} | {each['error_percent']:.1f} % | {each['worst_percent']:.1f} % | "
            f"{each['bias_percent']:+.1f} % | {each['tau']:.2f} |"
        )
    return found


if __name__ == "__main__":
    main()
