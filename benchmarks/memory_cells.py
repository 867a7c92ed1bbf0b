"""The cells of `bench_memory`: small models under what changes memory, on one rank and on two; on a GPU larger ones.

Each is a name and the overrides that make it, over `BASE`. The grid of one rank is that of the paper's letters over
LLaMA's shape, and a few cells of each other family; that of two ranks is every engine.
"""

from __future__ import annotations

import itertools

Cell = tuple[str, list[str]]
BASE = ["data=synthetic", "data.num_examples=64", "train.threads=1", "train.steps=3", "train.length=128"]
FOUR = ["train.micro_batch=4", "train.global_batch=4"]
WIDE = ["model=llama_tiny", "model.hidden_size=256", "model.intermediate_size=688", "model.num_layers=4"]
"""LLaMA's ratios, where weights and activations weigh alike."""
LETTERS = {
    "Naive": ["model.attention=eager"],
    "R": ["model.attention=eager", "train.recompute=block"],
    "F": [],
    "F+R": ["train.recompute=block"],
}
METHODS = {
    "full": [],
    "L": ["method=lora_peft"],
    "LFA": ["method=lorafa"],
    "QL": ["method=lora_peft", "model.quant=nf4"],
}
FAMILIES = {
    "gpt2": ["model=gpt2_tiny"],
    "bert": ["model=bert_tiny", "data=code_packages", "data.max_train=16", "data.max_val=4"],
    "t5": ["model=t5_tiny", "data=code_docstrings", "data.max_train=16", "data.max_val=4"],
    "resnet": ["model=resnet_tiny", "data=digits", "data.max_train=16", "data.max_val=4"],
}
ENGINES = {
    "ddp": ["engine=ddp"],
    "zero0": ["engine=deepspeed", "engine.zero=0"],
    "Z1": ["engine=zero1"],
    "Z2": ["engine=zero2"],
    "Z2+O": ["engine=zero2_offload"],
    "Z3": ["engine=zero3"],
    "Z3+O": ["engine=zero3_offload"],
    "fsdp2": ["engine=fsdp2"],
    "fsdp2 whole": ["engine=fsdp2", "engine.reshard=false"],
    "TP2": ["engine=tp"],
}
BF16 = ["model.dtype=bf16", "train.precision=bf16"]
LOW = {"bf16": [], "bf16 R": ["train.recompute=block"], "bf16 L": METHODS["L"], "bf16 QL": METHODS["QL"]}
"""What of bf16 is tried under each engine."""


def one_rank() -> list[Cell]:
    """40 cells."""
    found: list[Cell] = []
    for (letters, how), (method, by) in itertools.product(LETTERS.items(), METHODS.items()):
        found.append((f"llama {letters} {method}", [*WIDE, *FOUR, *how, *by]))
    for name, more in (
        ("bf16", BF16),
        ("bf16 R", [*BF16, "train.recompute=block"]),
        ("autocast", ["train.precision=bf16"]),
        ("bf16 L", [*BF16, "method=lora_peft"]),
        ("8-bit AdamW", ["train.optimizer=adamw_8bit"]),
        ("chunked loss", ["train.loss=chunked", "model.vocab_size=4000"]),
        ("whole loss", ["model.vocab_size=4000"]),
        ("mlp again", ["method=lorafa", "train.recompute=mlp"]),
        ("dropout", ["model.dropout=0.1", "method=lora_peft", "method.dropout=0.1"]),
        ("length 512", ["train.length=512"]),
        ("micro-batch 16", ["train.micro_batch=16", "train.global_batch=16"]),
        ("accumulation 2", ["train.global_batch=8"]),
    ):
        found.append((f"llama {name}", [*WIDE, *FOUR, *more]))
    for family, model in FAMILIES.items():
        letters = {"F": [], "Naive": ["model.attention=eager"], "R": ["train.recompute=block"]}
        for name, how in letters.items() if family != "resnet" else [("full", [])]:
            found.append((f"{family} {name}", [*model, *FOUR, *how]))
    found.append(("bert L", [*FAMILIES["bert"], *FOUR, "method=lora_peft"]))
    return found


def two_ranks() -> list[Cell]:
    """Every engine, plain, with recomputation, with two micro-batches a step, and in bf16, as the paper trains."""
    found: list[Cell] = []
    ways = {"F": [], "F+R": ["train.recompute=block"], "accumulation 2": ["train.global_batch=16"]}
    ways |= {name: [*BF16, *how] for name, how in LOW.items()}
    for (name, engine), (letters, how) in itertools.product(ENGINES.items(), ways.items()):
        if name == "TP2" and letters.endswith("QL"):
            continue  # which is refused: a packed weight stays whole
        batch = ["train.micro_batch=4", "train.global_batch=8"]
        if name == "TP2":  # whose ranks see the same examples
            batch, how = ["train.micro_batch=4", "train.global_batch=4"], [w.replace("=16", "=8") for w in how]
        found.append((f"llama {letters} {name}", [*WIDE, "train.world=2", *batch, *engine, *how]))
    return found


ONE_B = ["model=llama2_7b", "model.hidden_size=2048", "model.intermediate_size=5632", "model.num_layers=22"]
ONE_B += ["model.num_heads=16", "model.num_kv_heads=16"]
LARGE = {"1B": ONE_B, "7B": ["model=llama2_7b"]}


def gpu() -> list[Cell]:
    """LLaMAs of 1.2 and 6.7 B parameters in bf16 on one GPU of 80 GB, at lengths up to 2048."""
    found: list[Cell] = []
    sizes = (("b1 L350", 1, 350), ("b4 L512", 4, 512), ("b4 L2048", 4, 2048))
    for (model, shape), (size, batch, length) in itertools.product(LARGE.items(), sizes):
        for letters, method in itertools.product(LETTERS, METHODS):
            if model == "7B" and method == "full" and size != "b1 L350":
                continue  # 54 GB of state
            if letters == "Naive" and size == "b4 L2048":
                continue  # its scores are 1 GB a layer and more
            words = [*shape, *BF16, f"train.micro_batch={batch}", f"train.global_batch={batch}"]
            words += [f"train.length={length}", "model.max_length=4096", *LETTERS[letters], *METHODS[method]]
            found.append((f"{model} {size} {letters} {method}", words))
    return found


def small() -> list[Cell]:
    """Two of them, to try the script."""
    return [cell for cell in one_rank() if cell[0] in ("llama F full", "llama F+R L")]
