"""What published files call things: `config.json` beside the schema's fields, and the names of tensors.

A folder fits when its `config.json` agrees with the schema in every field that changes the result, and each of its
tensors is one of the model's. The names here are those of transformers' models, which ours keep.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from llmsys import schema
from llmsys.models import configs
from llmsys.models.fields import FIELDS, FIXED
from llmsys.models.surgery import BLOCK

PREFIX = {"bert": "bert.", "roberta": "roberta.", "gpt2": "transformer.", "resnet": "resnet."}
"""What stands before the names of a bare encoder or decoder, as it is published, in the model that trains."""

LEFT_OUT = {
    "llama": r"rotary_emb\.inv_freq$",
    "bert": r"(^|\.)(position_ids$|token_type_ids$|cls\.)",
    "roberta": r"(^|\.)(pooler\.|position_ids$|token_type_ids$|lm_head\.)",
    "gpt2": r"(^|\.)attn\.(masked_)?bias$",
    "t5": r"EncDecAttention\.relative_attention_bias\.",
}
"""Tensors of published files that this package's models do not have: heads of pre-training, computed buffers, a bias
that T5's files carry and T5 does not read."""


def check_shape(cfg: schema.Model, folder: Path) -> None:
    """Compares `config.json` beside the weights with the schema; ValueError names the first field that differs.

    A folder without `config.json` (a run's) passes: there the tensors' own shapes are compared, in `stored`.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    theirs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for key, want in {"model_type": cfg.family, **FIXED[cfg.family]}.items():
        if theirs.get(key, want) != want:
            raise ValueError(f"{path}: {key}={theirs[key]}, but model.family={cfg.family} as built here has {want}")
    for key, field in FIELDS[cfg.family].items():
        if theirs.get(key) is not None and theirs[key] != getattr(cfg, field):
            raise ValueError(f"{path}: {key}={theirs[key]}, but model.{field}={getattr(cfg, field)}")
    if isinstance(cfg, schema.ConvNet):
        stem = configs.stem_width(cfg)
        if cfg.stem != "imagenet" or theirs.get("embedding_size", stem) != stem:
            raise ValueError(
                f"{path}: embedding_size={theirs.get('embedding_size')}, the channels of its 7x7 stem, "
                f"but model.stem={cfg.stem} has {stem}"
            )
        return
    assert isinstance(cfg, schema.Transformer)
    for key in ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"):
        if theirs.get(key) is not None and theirs[key] < cfg.num_layers:
            raise ValueError(f"{path}: {key}={theirs[key]}, but model.num_layers={cfg.num_layers}")
    if cfg.family == "llama":
        _check_llama(cfg, path, theirs)
    elif cfg.family == "roberta":
        length = theirs.get("max_position_embeddings", cfg.max_length + configs.ROBERTA_OFFSET)
        if length != cfg.max_length + configs.ROBERTA_OFFSET:
            raise ValueError(
                f"{path}: max_position_embeddings={length} (two of them are reserved), "
                f"but model.max_length={cfg.max_length}"
            )
    elif cfg.family == "gpt2" and theirs.get("n_inner") is None and cfg.intermediate_size != 4 * cfg.hidden_size:
        raise ValueError(f"{path}: n_inner is 4 n_embd, but model.intermediate_size={cfg.intermediate_size}")
    elif cfg.family == "t5":
        _check_t5(cfg, path, theirs)


def _check_llama(cfg: schema.Transformer, path: Path, theirs: dict[str, Any]) -> None:
    """Rotary settings stand in one of two places, by the age of the file: flat, or under `rope_parameters`."""
    length = theirs.get("max_position_embeddings", cfg.max_length)
    if length < cfg.max_length:
        raise ValueError(f"{path}: max_position_embeddings={length}, but model.max_length={cfg.max_length}")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{path}: rope_type={kind}, but only the default rotary embedding is built here")
    theta = rope.get("rope_theta", theirs.get("rope_theta", 10000.0))
    if float(theta) != cfg.rope_theta:
        raise ValueError(f"{path}: rope_theta={theta}, but model.rope_theta={cfg.rope_theta}")
    head = theirs.get("head_dim") or cfg.hidden_size // cfg.num_heads
    if head != cfg.hidden_size // cfg.num_heads:
        raise ValueError(f"{path}: head_dim={head}, but model.hidden_size / num_heads is otherwise")


def _check_t5(cfg: schema.Transformer, path: Path, theirs: dict[str, Any]) -> None:
    """Of T5 the heads' width is free in the file, and the ids that begin a target depend on the tokenizer."""
    head = theirs.get("d_kv", cfg.hidden_size // cfg.num_heads)
    if head != cfg.hidden_size // cfg.num_heads:
        raise ValueError(f"{path}: d_kv={head}, but model.hidden_size / num_heads is otherwise")
    start = theirs.get("decoder_start_token_id", theirs.get("pad_token_id"))
    if start is not None and start != configs.pad_id(cfg):
        raise ValueError(
            f"{path}: decoder_start_token_id={start}, but with model.tokenizer={cfg.tokenizer} it is "
            f"{configs.pad_id(cfg)}"
        )


def own_name(key: str, cfg: schema.Model) -> str | None:
    """Our name of a file's key, None for what is left out on purpose: see LEFT_OUT, and layers beyond `num_layers`."""
    if cfg.family in LEFT_OUT and re.search(LEFT_OUT[cfg.family], key):
        return None
    if isinstance(cfg, schema.Transformer):
        if cfg.family == "bert" and cfg.pooling == "mean" and re.search(r"(^|\.)pooler\.", key):
            return None
        block = BLOCK.search(key)
        if block and int(block[0].rsplit(".", 1)[1]) >= cfg.num_layers:
            return None
    prefix = PREFIX.get(cfg.family, "")
    if not key.startswith((prefix, "classifier.", "lm_head.")):
        key = prefix + key
    # The original TensorFlow names, still in some old files.
    return key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
