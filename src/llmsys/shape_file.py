"""`model.config`: a Hugging Face `config.json` as the model's shape.

The families are those that are built here, and of LLaMA's kind Mistral, Qwen2 and Qwen3 (dense), which differ from it
in a bias, a norm of each head, or a head's width. What a family as built here has fixed (its activation, say) must be
so in the file. Where a model is to be built, its rotary embedding must be the plain one; a prediction does not depend
on that. A window of attention is not looked at: attention is predicted over the whole length.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmsys.models.fields import FIELDS, FIXED
from llmsys.words import key_of

FAMILY = {"mistral": "llama", "qwen2": "llama", "qwen3": "llama"}
"""model_type -> the family that it is a kind of; other families have their own names there."""
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "bert", "roberta", "t5")
LAYERS = {"gpt2": "n_layer", "t5": "num_layers"}
DROPOUT = {"bert": "hidden_dropout_prob", "roberta": "hidden_dropout_prob", "gpt2": "resid_pdrop", "t5": "dropout_rate"}
DROPOUT["llama"] = "attention_dropout"
LENGTH = {"gpt2": "n_positions"}
ABSENT: dict[str, dict[str, Any]] = {
    "llama": {"tie_embeddings": False, "max_length": 2048, "norm_eps": 1e-6},
    "bert": {"norm_eps": 1e-12},
    "roberta": {"norm_eps": 1e-12},
    "gpt2": {"tie_embeddings": True, "norm_eps": 1e-5},
    "t5": {"tie_embeddings": True, "max_length": 512, "norm_eps": 1e-6},
}
"""What transformers takes where a file leaves a key out."""
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
FREE = ("name", "dropout")
"""Of what a file gives, that is not its shape: a value given beside it wins."""


def apply(values: dict[str, Any], words: Sequence[str], *, build: bool) -> None:
    """Fills `values["model"]`, in place, from the file that its `config` names, if it names one.

    `words`: what was typed. `build`: the model is to be built too. ValueError, in one line, for a file that is none or
    is of a family that is not known, and for a shape that was typed beside it and differs.
    """
    name = values["model"].get("config")
    if name is None:
        return
    typed = set(map(key_of, words))
    if "model" in typed:
        raise ValueError(f"model.config={name}: gives the whole shape, and model= another one; leave one of them out")
    found, model = shape(name, build=build), values["model"]
    for key, value in found.items():
        if f"model.{key}" not in typed or (key in FREE and model.get(key) is None):
            model[key] = value
        elif key not in FREE and model[key] != value:
            raise ValueError(f"model.{key}={model[key]}: model.config={name} has {value}; leave model.{key} out")
    model["kind"] = "transformer"


def shape(name: str, *, build: bool = False) -> dict[str, Any]:
    """The schema's fields of a `config.json`, or of a folder that has one. ValueError as of `apply`."""
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    theirs = _read(name, path)
    kind = theirs.get("model_type")
    if kind not in KNOWN:
        raise ValueError(f"model.config={name}: model_type={kind}: is not known here; there are {', '.join(KNOWN)}")
    family = FAMILY.get(kind, kind)
    for key, want in FIXED[family].items():
        allowed = (True, False) if kind == "qwen2" and key == "attention_bias" else (want,)
        if theirs.get(key) is not None and theirs[key] not in allowed:
            raise ValueError(f"model.config={name}: {key}={theirs[key]}, and {family} as known here has {want}")
    found: dict[str, Any] = {"family": family, "name": _title(theirs, path), **ABSENT[family]}
    for key, field in FIELDS[family].items():
        if theirs.get(key) is not None:
            found[field] = theirs[key]
    for field, key in (("num_layers", LAYERS.get(family, "num_hidden_layers")), ("dropout", DROPOUT[family])):
        if theirs.get(key) is not None:
            found[field] = theirs[key]
    length = theirs.get(LENGTH.get(family, "max_position_embeddings"), found.get("max_length"))
    if length is not None:
        found["max_length"] = length - 2 * (family == "roberta")
    _own(name, kind, theirs, found, build=build)
    missing = [key for key in NEEDED if not found.get(key)]
    if missing:
        raise ValueError(f"model.config={name}: says nothing of {', '.join(missing)}; it is not a whole config.json")
    return found


def _own(name: str, kind: str, theirs: dict[str, Any], found: dict[str, Any], *, build: bool) -> None:
    """What the kinds have each of their own."""
    heads = found.setdefault("num_heads", 0)
    found.setdefault("num_kv_heads", heads)
    if found["family"] == "llama":
        rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        turns = rope.get("rope_type", rope.get("type", "default"))
        if build and turns != "default":
            raise ValueError(f"model.config={name}: rope_type={turns}, but only the default one is built here")
        found["rope_theta"] = float(rope.get("rope_theta", theirs.get("rope_theta", 10000.0)))
        found["qkv_bias"], found["qk_norm"] = kind == "qwen2", kind == "qwen3"
        found["head_dim"] = theirs.get("head_dim") or (128 if kind == "qwen3" else 0)
        if heads and found["head_dim"] * heads == found.get("hidden_size"):
            found["head_dim"] = 0
    elif kind == "gpt2":
        found.setdefault("intermediate_size", 4 * found.get("hidden_size", 0))
    elif kind == "t5":
        if theirs.get("d_kv", 0) * heads not in (0, found.get("hidden_size")):
            raise ValueError(f"model.config={name}: d_kv={theirs['d_kv']}, and t5 here has d_model / num_heads")
        if theirs.get("num_decoder_layers", found.get("num_layers")) != found.get("num_layers"):
            raise ValueError(f"model.config={name}: num_decoder_layers differs from num_layers, and here they are one")
    else:
        found["pooling"] = "cls"


def _title(theirs: dict[str, Any], path: Path) -> str:
    own = str(theirs.get("_name_or_path") or "").rstrip("/").rpartition("/")[2]
    return own or (path.resolve().parent.name if path.name == "config.json" else path.stem)


def _read(name: str, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"model.config={name}: no such file; it is a config.json, or a folder that has one")
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model.config={name}: not JSON: {error}") from None
    if not isinstance(theirs, dict):
        raise ValueError(f"model.config={name}: not a config.json, which is an object")
    return theirs
