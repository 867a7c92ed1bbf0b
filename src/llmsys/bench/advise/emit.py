"""The choice as something to run: files by name, of which each can be read, changed and started.

    run.sh           our own command, of the trainer that was predicted or measured
    ds_config.json   DeepSpeed's settings, where the choice is one of ZeRO's: the same that our engine hands to it
    torchrun.sh      the line that starts a script of Hugging Face's Trainer with them, `bash torchrun.sh train.py ...`

Trainer's own arguments repeat the numbers of the JSON, and it refuses to start where they differ. What no argument of
it says (attention, a 4-bit base, an adapter) stands above the line as a comment: the script loads the model. LoRA-FA,
8-bit floats and our tensor parallelism it does not have; of those there is `run.sh` alone.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from llmsys import schema
from llmsys.bench.advise import space
from llmsys.bench.advise.cells import Cell
from llmsys.bench.techniques import FUSED, METHODS
from llmsys.cost import shapes
from llmsys.cost.case import Case, facts
from llmsys.files import write_atomic
from llmsys.train import zero_settings

ALPACA = "data=alpaca_lengths"
"""What `bench_finetune` trains on."""
GROUPS = ("model", "data", "method", "network")
"""Groups of which what was typed is told on; techniques choose the others."""
OURS = ("model.attention", "model.quant", "model.dtype")
TRAINER_LETTERS = {"F", "R", "Z1", "Z2", "Z3", "O", "Q", "L", "O8"}


def files(config: schema.Config, cell: Cell, *, cuda: bool) -> dict[str, str]:
    """Name -> text. `config`: what advice was asked about; `cuda`: its devices are GPUs."""
    made = space.configured(
        config,
        cell.techniques,
        world=cell.world,
        micro_batch=cell.micro_batch,
        global_batch=space.advise(config).global_batch,
    )
    found = {"run.sh": _script(_command(made, cell))}
    if set(cell.techniques.letters) <= TRAINER_LETTERS:
        if isinstance(made.engine, schema.DeepSpeed):
            found["ds_config.json"] = json.dumps(deepspeed(made, cuda=cuda), indent=2) + "\n"
        found["torchrun.sh"] = _script(_torchrun(made, cell), _to_load(made))
    return found


def write(found: dict[str, str], folder: Path) -> None:
    """Each file into `folder`, which is made; of earlier choices none stays. OSError where it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("run.sh", "ds_config.json", "torchrun.sh"):
        if name in found:
            write_atomic(folder / name, found[name])
        else:
            (folder / name).unlink(missing_ok=True)


def deepspeed(config: schema.Config, *, cuda: bool) -> dict[str, object]:
    """DeepSpeed's JSON of a config under ZeRO. An fp32 model under autocast stays one."""
    assert isinstance(config.engine, schema.DeepSpeed)
    case = Case(config.model, config.train, config.method, config.engine, **facts(config, "cuda" if cuda else "cpu"))
    trained = sum(p.numel for p in shapes.held(case) if p.trained)
    return zero_settings.settings(config.model, config.train, config.engine, trained=trained, cuda=cuda)


def _command(config: schema.Config, cell: Cell) -> list[str]:
    """Our own, with every number that the answer is about."""
    task, train, model = space.advise(config), config.train, config.model
    words = [word for word in config.command if _key(word).split(".")[0] in GROUPS and _key(word) not in OURS]
    if not any(_key(word) in ("model", "model.config") for word in words):
        words.insert(0, f"model={model.name}")
    words += [f"model.dtype={model.dtype}", f"techniques={cell.techniques}"]
    if isinstance(model, schema.Transformer) and model.attention not in ("eager", FUSED[0]):
        words.append(f"model.attention={model.attention}")
    for key in ("precision", "length", "world", "micro_batch", "global_batch", "loss"):
        words.append(f"train.{key}={getattr(train, key)}")
    if cell.world == 1 and not isinstance(config.engine, schema.DeepSpeed):
        words.append("engine=local")
    if isinstance(config.engine, schema.FSDP2):
        words.append("engine=fsdp2")
    if isinstance(config.method, schema.Adapter):
        words = [word for word in words if _key(word) not in ("method", "method.r", "method.alpha")]
        words += [f"method.r={config.method.r}", f"method.alpha={config.method.alpha}"]
        if config.method.kind != METHODS[cell.techniques.adapter]:
            words.append(f"method={config.method.kind}")
    else:
        words = [word for word in words if _key(word).split(".")[0] != "method"]
    experiment = "bench_pretrain"
    if task.stage == "finetune" and cell.techniques.adapter:
        experiment = "bench_finetune"
    elif task.stage == "finetune":  # whose settings are an adapter's
        words.insert(0, ALPACA)
    unique = {_key(word): word for word in words}  # the last one of a key
    return ["python", "-m", "llmsys", f"+exp={experiment}", *unique.values()]


def _torchrun(config: schema.Config, cell: Cell) -> list[str]:
    """Of a script that reads `TrainingArguments` from its command line."""
    train, letters = config.train, cell.techniques.letters
    accumulation = schema.accumulation(train, config.engine)
    # one machine: its ranks need not find it by its name, which may have no address
    words = ["torchrun", "--standalone", "--local-addr=127.0.0.1", f"--nproc_per_node={cell.world}", '"$@"']
    words += [f"--per_device_train_batch_size={train.micro_batch}", f"--gradient_accumulation_steps={accumulation}"]
    words.append(f"--max_grad_norm={train.clip}")
    if train.precision == "bf16" and (config.model.dtype == "bf16" or not isinstance(config.engine, schema.DeepSpeed)):
        words.append("--bf16")
    if "R" in letters:
        words.append("--gradient_checkpointing")
    words.append("--optim=adamw_bnb_8bit" if "O8" in letters else "--optim=adamw_torch_fused")
    if isinstance(config.engine, schema.DeepSpeed):
        words.append('--deepspeed="$here/ds_config.json"')
    return words


def _to_load(config: schema.Config) -> list[str]:
    """What the script itself has to do for the choice to be what was meant."""
    assert isinstance(config.model, schema.Transformer)
    told = [f"attn_implementation='{config.model.attention}'", f"dtype='{_long(config.model.dtype)}'"]
    if config.model.quant == "nf4":
        told.append("quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')")
    found = [f"bash torchrun.sh SCRIPT [ARGUMENTS]; the script loads the model with {', '.join(told)}"]
    if isinstance(config.method, schema.Adapter):
        method = config.method
        targets = method.targets or "all-linear"
        found.append(f"and adds peft's LoraConfig(r={method.r}, lora_alpha={method.alpha}, target_modules={targets!r})")
    return [*found, f"rows have {config.train.length} tokens"]


def _long(dtype: str) -> str:
    return {"bf16": "bfloat16", "fp32": "float32"}[dtype]


def _script(words: list[str], told: list[str] | None = None) -> str:
    """A shell script of one command; further words of whoever starts it come last."""
    plain = {'"$@"', '--deepspeed="$here/ds_config.json"'}
    line = " ".join(word if word in plain else shlex.quote(word) for word in words)
    line += "" if '"$@"' in words else ' "$@"'
    here = ['here=$(cd "$(dirname "$0")" && pwd)'] if "$here" in line else []
    return "\n".join(["#!/bin/bash", *(f"# {each}" for each in told or []), "set -e", *here, f"exec {line}"]) + "\n"


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")
