"""A choice as a line that starts a script of Hugging Face's Trainer, with the settings that its arguments name.

Trainer's own arguments repeat the numbers of DeepSpeed's JSON, and it refuses to start where they differ. `--bf16`
stands there only where autocast is meant: beside a bf16 model, which needs none, it keeps fp32 copies of weights
(FSDP2) or of logits (DDP), and was not predicted. DeepSpeed's JSON says bf16 itself, and Trainer wants to be told so.

FSDP2 is accelerate's (transformers 5.17 to 5.23: `--fsdp`, and a JSON for the rest). It shards on GPUs alone; on a CPU
it would silently be DDP. What no argument says (attention, a 4-bit base, an adapter) stands above the line as a
comment: the script loads the model.
"""

from __future__ import annotations

from typing import Any

from llmsys import schema
from llmsys.bench.techniques import Techniques

LETTERS = {"F", "R", "Z1", "Z2", "Z3", "O", "Q", "L", "O8"}
HERE = {key: f'--{key}="$here/{name}"' for key, name in (("deepspeed", "ds_config.json"), ("fsdp_config", "fsdp.json"))}
"""Arguments that name a file beside the script."""
LONG = {"bf16": "bfloat16", "fp32": "float32"}


def why_not(config: schema.Config, *, cuda: bool) -> str:
    """Why no script of Trainer's does what was predicted; "" where one does. `cuda`: its devices are GPUs."""
    own = sorted(set(Techniques.of(config).letters) - LETTERS)
    autocast = config.train.precision == "bf16" and config.model.dtype == "fp32"
    for wrong, reason in (
        (own, f"Trainer has no {', '.join(own)}"),
        (isinstance(config.method, schema.LoRA), f"method={config.method.kind} is by our own functions, not by peft"),
        (config.train.loss != "whole", f"Trainer has no train.loss={config.train.loss}"),
        (config.compress.kind != "none", f"Trainer has no compress={config.compress.kind}"),
        (_cpu_adam(config.engine), "Trainer has no engine.optimizer=cpu_adam"),
        (_fsdp(config) and not cuda, "accelerate's FSDP2 shards on GPUs alone"),
        (_fsdp(config) and autocast, "accelerate's FSDP2 gathers weights in bf16 under autocast, and ours in fp32"),
    ):
        if wrong:
            return reason
    return ""


def _fsdp(config: schema.Config) -> bool:
    return isinstance(config.engine, schema.FSDP2)


def _cpu_adam(engine: schema.Engine) -> bool:
    return isinstance(engine, schema.DeepSpeed) and engine.optimizer == "cpu_adam"


def more_bytes(config: schema.Config, gradients: int) -> int:
    """What Trainer's DDP takes beside what was predicted, of so many bytes of gradients: ours are views into the
    buckets, and no argument of Trainer's makes its own so. torchrun's ranks are DDP's, a single one too."""
    return gradients if isinstance(config.engine, schema.DDP) or config.engine.kind == "local" else 0


def words(config: schema.Config) -> list[str]:
    """The line; its script and the script's own arguments stand where `"$@"` does."""
    train, engine, letters = config.train, config.engine, Techniques.of(config).letters
    accumulation = schema.accumulation(train, engine)
    # one machine: its ranks need not find it by its name, which may have no address
    found = ["torchrun", "--standalone", "--local-addr=127.0.0.1", f"--nproc_per_node={train.world}", '"$@"']
    found += [f"--per_device_train_batch_size={train.micro_batch}", f"--gradient_accumulation_steps={accumulation}"]
    found.append(f"--max_grad_norm={train.clip}")
    deepspeed = isinstance(engine, schema.DeepSpeed)
    if train.precision == "bf16" and deepspeed == (config.model.dtype == "bf16"):
        found.append("--bf16")
    if "R" in letters and not _fsdp(config):  # FSDP2's own does not gather a block twice
        found.append("--gradient_checkpointing")
    found.append("--optim=adamw_bnb_8bit" if "O8" in letters else "--optim=adamw_torch_fused")
    if isinstance(engine, schema.DDP):
        found += ["--ddp_find_unused_parameters=False", f"--ddp_bucket_cap_mb={round(engine.bucket_mib)}"]
    if deepspeed:
        found.append(HERE["deepspeed"])
    return [*found, "--fsdp", HERE["fsdp_config"]] if _fsdp(config) else found


def fsdp(config: schema.Config) -> dict[str, Any]:
    """What `--fsdp_config` names: a block is a unit, as with our engine."""
    assert isinstance(config.engine, schema.FSDP2)
    return {
        "version": 2,
        "reshard_after_forward": config.engine.reshard,
        "activation_checkpointing": "R" in Techniques.of(config).letters,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    }


def to_load(config: schema.Config) -> list[str]:
    """What the script itself has to do for the choice to be what was meant, a line each."""
    assert isinstance(config.model, schema.Transformer)
    found = ["bash torchrun.sh SCRIPT [ARGUMENTS]; the script loads the model with", f"  {loading(config)}"]
    if isinstance(config.method, schema.Adapter):
        wide = config.method.dtype == "fp32"
        found.append(f"and adds adapters by peft's get_peft_model, autocast_adapter_dtype={wide}, with")
        found.append(f"  {adapter(config.method)}")
        if config.model.quant == "nf4":
            found.append("without prepare_model_for_kbit_training, which makes the rest of the model fp32")
    return [*found, f"rows have {config.train.length} tokens"]


def loading(config: schema.Config) -> str:
    """Arguments of `from_pretrained`. The base in 4 bits is as `models.quant` makes it: scales are quantised in turn,
    products are in the precision of the step, and it rests under the model's dtype, as which engines may cut it."""
    assert isinstance(config.model, schema.Transformer)
    dtype = LONG[config.model.dtype]
    told = [f"attn_implementation='{config.model.attention}'", f"dtype='{dtype}'"]
    if config.model.quant == "nf4":
        bits = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": LONG[config.train.precision],
            "bnb_4bit_quant_storage": dtype,
        }
        told.append(f"quantization_config=BitsAndBytesConfig({_arguments(bits)})")
    return ", ".join(told)


def adapter(method: schema.Adapter) -> str:
    """peft's config of it."""
    given = {
        "r": method.r,
        "lora_alpha": method.alpha,
        "lora_dropout": method.dropout,
        "target_modules": method.targets or "all-linear",
    }
    return f"LoraConfig({_arguments(given)})"


def _arguments(given: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in given.items())
