"""Adapters as peft keeps them: a folder with `adapter_model.safetensors` and `adapter_config.json`.

peft's LoRA is y = x W^T + b + s (x A^T B^T + c) with s = lora_alpha / r and, under `lora_bias`, a bias c of lora_B. So

    to_peft     A is written out, once for every layer that shares it; a trained bias b' becomes c = (b' - b) / s; of a
                refreshed adapter A and B of all draws are put one below, or beside, the other, which is the same sum
                at rank r x draws (beside the original base; lora_alpha grows along, so that s stays)
    from_peft   A is taken as it is given, frozen unless it shall be trained; b' = b + s c

What LoRA-FA's adapters cannot represent (DoRA, ranks by layer, embeddings, ...) is refused by its name. peft itself is
not needed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.lorafa import basis
from llmsys.lorafa.adapters import having, plain
from llmsys.lorafa.config import LoRAFAConfig
from llmsys.lorafa.header import Header, Layer, key
from llmsys.lorafa.layer import Adapted, Adapter
from llmsys.lorafa.merging import base_bias
from llmsys.lorafa.store import pack, unpack
from llmsys.lorafa.targets import is_transposed

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
ENTRY = re.compile(r"(?P<path>.*?)\.?(?P<what>lora_A|lora_B|base_layer|)\.?(?P<kind>weight|bias)")
NO_MATTER = {
    *(
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "lora_bias", "bias", "modules_to_save", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "runtime_config"),
}
"""Settings of peft's that are read here, or say nothing beyond what the tensors' names do."""
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is; PiSSA, OLoRA, LoftQ, ... change it too."""


def to_peft(model: nn.Module, folder: Path | str, name: str = "default", *, modules: Sequence[str] = ()) -> Path:
    """Writes the adapter `name` as peft's files, each whole or not at all; returns the folder.

    `peft.PeftModel.from_pretrained(base, folder)` then gives the same logits. `modules` as of `save_adapter`, by which
    ValueError and OSError are raised too.
    """
    from llmsys import files, tensors

    header, contents = pack(model, name, modules=modules)
    inner, folder, config = plain(model), Path(folder), header.config
    layers = having(inner, name)
    biased = any(layer.bias for layer in header.layers.values())
    found = {f"{PREFIX}{path}": tensor for path, tensor in contents.items() if path.rpartition(".")[0] not in layers}
    for path, layer in layers.items():
        adapter: Adapter = layer.adapters[name]
        a, b = _ranks(adapter)
        prefix = f"{PREFIX}{path}{'.' * bool(path)}"
        found[f"{prefix}lora_A.weight"], found[f"{prefix}lora_B.weight"] = a, b
        if biased:
            found[f"{prefix}lora_B.bias"] = _shift(layer, adapter)
    draws = 1 + header.refreshed
    alpha = config.alpha * draws
    folder.mkdir(parents=True, exist_ok=True)
    tensors.replace(found, folder / TENSORS)
    written = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(inner, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": config.r * draws,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.dropout,
        "lora_bias": biased,
        "bias": "none",
        "target_modules": list(layers),
        "modules_to_save": list(modules) or None,
        "fan_in_fan_out": any(map(is_transposed, layers.values())),
    }
    files.write_atomic(folder / CONFIG, json.dumps(written, indent=1) + "\n")
    return folder


def from_peft(model: nn.Module, folder: Path | str, name: str = "default", *, train_a: bool = False) -> nn.Module:
    """The LoRA adapter of peft's folder as `name`, in place, as `load_adapter` does; returns `model`.

    Its A is frozen, as it is there, or goes on being trained with `train_a`. ValueError names the file, and the setting
    or tensor, where there is something that cannot be represented; and as of `load_adapter`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(folder) / TENSORS
    config = _config(Path(folder) / CONFIG)
    if not file.is_file():
        raise ValueError(f"{file}: no such file; peft's save_pretrained writes it (a pickle is not read)")
    try:
        contents = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged: {error}") from error
    named = {path.removeprefix(PREFIX): tensor for path, tensor in contents.items()}
    return unpack(model, *_translated(plain(model), named, config, train_a, str(file)), name)


def _ranks(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """A [R x draws, N] and B [M, R x draws], on the host, in B's dtype."""
    a, b = adapter.a.detach().cpu(), adapter.B.detach().cpu()
    r, n = a.shape
    config, path = adapter.config, adapter.owner.path
    draws = [basis.draw(config.init, r, n, config.seed, path, epoch) for epoch in range(len(adapter.past))]
    return torch.cat([*draws, a.float()]).to(b.dtype), torch.cat([*adapter.past, b], dim=1)


def _shift(layer: Any, adapter: Adapter) -> Tensor:
    """c [M] of the trained bias; zeros where there is none."""
    own, b = base_bias(layer), adapter.B.detach()
    if adapter.bias is None:
        return torch.zeros(b.shape[0], dtype=b.dtype)
    before = torch.zeros_like(adapter.bias) if own is None else own.to(adapter.bias)
    return ((adapter.bias.detach() - before) / adapter.scale).to("cpu", b.dtype)


def _config(file: Path) -> dict[str, Any]:
    """peft's configuration; ValueError names what cannot be represented."""
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kind, r, alpha = config.get("peft_type"), int(config["r"]), float(config["lora_alpha"])
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; a folder that peft's save_pretrained wrote has it") from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: damaged, or not of LoRA: {type(error).__name__} {error}") from error
    if kind != "LORA":
        raise ValueError(f"{file}: peft_type={kind}: only LORA can become LoRA-FA")
    for setting, value in config.items():
        if value and setting not in NO_MATTER:
            raise ValueError(f"{file}: {setting}={value}: LoRA-FA's adapters have nothing like it")
    if config.get("init_lora_weights", True) not in STARTS:
        start = config["init_lora_weights"]
        raise ValueError(f"{file}: init_lora_weights={start}: changes the base too; save it converted to plain LoRA")
    if config.get("bias", "none") not in ("none", "lora_only"):
        raise ValueError(f"{file}: bias={config['bias']}: only biases of adapted layers can be trained (lora_only)")
    scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    return {**config, "lora_alpha": scale * r}


def _translated(
    model: nn.Module, named: Mapping[str, Tensor], config: Mapping[str, Any], train_a: bool, where: str
) -> tuple[Header, dict[str, Tensor]]:
    """Header and contents of the file of ours that says the same."""
    pairs: dict[str, dict[str, Tensor]] = {}
    heads: dict[str, Tensor] = {}
    for entry, tensor in named.items():
        match = ENTRY.fullmatch(entry)
        path = match["path"] if match else ""
        if match and match["what"].startswith("lora_"):
            if tensor.ndim != (1 if match["kind"] == "bias" else 2):
                raise ValueError(f"{where}: {entry} is of a convolution; only linear layers take adapters")
            pairs.setdefault(path, {})[f"{match['what']}.{match['kind']}"] = tensor
        elif "lora_embedding" in entry:
            raise ValueError(f"{where}: {entry} is of an embedding; only linear layers take adapters")
        elif match and match["kind"] == "bias" and config.get("bias") == "lora_only":
            pairs.setdefault(path, {})["bias"] = tensor
        elif set(entry.split(".")) & set(config.get("modules_to_save") or ()):
            heads[entry] = tensor
        else:
            raise ValueError(f"{where}: {entry}: LoRA-FA's adapters have nothing like it")
    layers: dict[str, Layer] = {}
    contents: dict[str, Tensor] = dict(heads)
    r, scale = config["r"], config["lora_alpha"] / config["r"]
    for path, pair in pairs.items():
        if not pair.keys() >= {"lora_A.weight", "lora_B.weight"}:
            raise ValueError(f"{where}: {path} has {', '.join(sorted(pair))}, not lora_A.weight and lora_B.weight")
        a, b = pair["lora_A.weight"], pair["lora_B.weight"]
        bias = _bias(model, path, pair, scale)
        contents |= {key(path, "A"): a, key(path, "B"): b} | ({} if bias is None else {key(path, "bias"): bias})
        digest = "" if train_a else basis.fingerprint(a)[:32]
        layers[path] = Layer((b.shape[0], a.shape[1]), path, digest, bias is not None)
    if not layers:
        raise ValueError(f"{where}: has no lora_A and lora_B")
    ours = LoRAFAConfig(
        r=r,
        alpha=config["lora_alpha"],
        targets=tuple(layers),
        dropout=config.get("lora_dropout", 0.0),
        init="given",
        bias="lora_only" if any(layer.bias for layer in layers.values()) else "none",
        train_a=train_a,
    )
    modules = tuple(dict.fromkeys(entry.rpartition(".")[0] for entry in heads))
    return Header(where=where, config=ours, layers=layers, modules=modules), contents


def _bias(model: nn.Module, path: str, pair: Mapping[str, Tensor], scale: float) -> Tensor | None:
    """The bias that the adapter has in place of the layer's own; None where it trains none."""
    if "bias" in pair or "lora_B.bias" not in pair:
        return pair.get("bias")
    shift = scale * pair["lora_B.bias"]
    layer: Any = dict(model.named_modules()).get(path)
    own = None if layer is None else base_bias(layer) if isinstance(layer, Adapted) else getattr(layer, "bias", None)
    return shift if own is None else own.detach().to(shift) + shift
