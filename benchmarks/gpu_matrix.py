"""Families, methods and engines on one GPU, in bf16: that each runs there, what it holds and how fast it is.

    python benchmarks/gpu_matrix.py --out results/gpu            on a machine with a CUDA device; about 8 minutes
    python benchmarks/gpu_matrix.py --device cpu --small         the same script, tried at a tiny size

Three groups of runs: every family by every method at its published size; llama_85m under every engine on one rank;
and a forward and backward pass of LLaMA-2 7B with LoRA-FA, LoRA, and over an NF4 base. Weights are random: time and
bytes do not depend on them. A run that fails leaves its record and the next begins. Each record is copied to `--out`.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llmsys import compose, dispatch, job, results
from llmsys.dispatch.show import Show

FAMILIES = {
    "llama_85m": ["data=synthetic", "data.num_examples=512"],
    "gpt2": ["data=synthetic", "data.num_examples=512"],
    "bert_base": ["data=code_packages", "data.max_train=256", "data.max_val=64"],
    "roberta_base": ["data=code_packages", "data.max_train=256", "data.max_val=64"],
    "t5_small": ["data=code_docstrings", "data.max_train=256", "data.max_val=16", "train.generate_max=4"],
    "resnet50": ["data=digits", "data.max_train=256", "data.max_val=64", "model.image_size=224"],
    "vgg16_cifar": ["data=digits", "data.max_train=256", "data.max_val=64"],
}
TINY = {
    "llama_85m": "llama_tiny",
    "gpt2": "gpt2_tiny",
    "bert_base": "bert_tiny",
    "roberta_base": "roberta_tiny",
    "t5_small": "t5_tiny",
    "resnet50": "resnet_tiny",
    "vgg16_cifar": "vgg_tiny",
    "llama2_7b": "llama_tiny",
}
METHODS = ("full", "lora_peft", "lorafa_peft")
ENGINES = ("ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "fsdp2", "tp")
BF16 = ["model.dtype=bf16", "train.precision=bf16"]
STEPS = ["train.steps=12", "train.global_batch=8", "train.micro_batch=8", "train.length=256", "train.save_final=false"]
STEPS += ["train.deterministic=false"]
SMALL = ["train.steps=3", "train.global_batch=2", "train.micro_batch=2", "train.length=32", "profile.warmup=1"]


def runs() -> Iterator[tuple[str, str, list[str]]]:
    """(name of the group, model, overrides) of every run."""
    for model, data in FAMILIES.items():
        images = "resnet" in model or "vgg" in model
        for method in METHODS[:1] if images else METHODS:
            yield "gpu_families", model, [*data, f"method={method}"]
    for engine in ENGINES:
        yield "gpu_engines", "llama_85m", [*FAMILIES["llama_85m"], f"engine={engine}"]
    long = [
        "data=synthetic",
        "data.num_examples=512",
        "train.micro_batch=1",
        "train.global_batch=1",
        "train.length=1024",
    ]
    long += ["train.eval_batch=1", "data.max_val=4"]
    for method in METHODS[1:]:
        yield "gpu_7b", "llama2_7b", [*long, f"method={method}"]
    yield "gpu_7b", "llama2_7b", [*long, "method=lorafa_peft", "model.quant=nf4"]
    yield "gpu_7b", "llama2_7b", [*long, "method=lorafa_peft", "train.recompute=block"]


def main() -> None:
    """Makes all runs, one process each, copies their records and prints a table for each group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where records go, as <group>/<run id>/record.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models and three steps")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        jobs = []
        for name, model, overrides in runs():
            small = [f"model={TINY[model]}", *STEPS, *BF16, *overrides, *SMALL] if arguments.small else []
            chosen = small or [f"model={model}", *STEPS, *BF16, *overrides]
            where = [f"name={name}", f"results={scratch}", f"hardware.device={arguments.device}"]
            rates = ["train.lr_by_method.lora_peft=1e-3", "train.lr_by_method.lorafa_peft=1e-3"]
            made = job.make(compose.compose([*chosen, *rates, *where]))
            jobs.append(made)
        records = list(dispatch.submit(list({made.out: made for made in jobs}.values()), Show()))
        for record in records:
            if arguments.out:
                target = arguments.out / record.name / record.run_id
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(Path(scratch) / record.name / record.run_id / "record.json", target / "record.json")
        for name in dict.fromkeys(record.name for record in records):
            results.show([record for record in records if record.name == name])


if __name__ == "__main__":
    main()
