"""`model.config`: a Hugging Face `config.json` as the model's shape.

    llama                     llama
    mistral, ministral        the same, with a head's width of its own
    qwen2                     and a bias of queries, keys and values
    qwen3                     and a norm of each head of queries and keys
    gpt2, bert, t5            gpt2, bert, t5
    roberta, xlm-roberta      roberta

are the kinds (`model_type`) that a family built here expresses exactly: each parameter, and what a forward pass keeps.
Another kind is refused, also where its parameters could be counted: Phi-3 keeps queries and keys as long as values,
for they are parts of one tensor, Gemma's norms are fp32 throughout, of a mixture of experts a token meets only some.
What a family as built here has fixed (its activation, say) must be so in the file. Where a model is to be built, its
rotary embedding must be the plain one; a prediction does not depend on that. A window of attention is not looked at:
attention is predicted over the whole length.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmsys.models.fields import FIELDS, FIXED
from llmsys.words import key_of

FAMILY = {
    **dict.fromkeys(("llama", "mistral", "ministral", "qwen2", "qwen3"), "llama"),
    **dict.fromkeys(("roberta", "xlm-roberta"), "roberta"),
    **{family: family for family in ("gpt2", "bert", "t5")},
}
"""model_type -> the family that expresses it."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Keys of a mixture of experts."""
REASONS = {
    "phi3": "keeps queries, keys and values as one tensor, and so more than any family here",
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "has norms that are fp32 throughout, as no family here"),
}
"""Of kinds that look like one that is known, why they are not."""
LAYERS = {"gpt2": "n_layer", "t5": "num_layers"}
DROPOUT = {"bert": "hidden_dropout_prob", "roberta": "hidden_dropout_prob", "gpt2": "resid_pdrop", "t5": "dropout_rate"}
DROPOUT["llama"] = "attention_dropout"
LENGTH = {"gpt2": "n_positions"}
_LLAMA = {"tie_embeddings": False, "max_length": 2048, "norm_eps": 1e-6, "dropout": 0.0}
_MISTRAL = {**_LLAMA, "max_length": 131072, "num_kv_heads": 8}
_QWEN = {**_LLAMA, "max_length": 32768, "num_kv_heads": 32}
_BERT = {"max_length": 512, "norm_eps": 1e-12, "dropout": 0.1}
ABSENT: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "ministral": _MISTRAL,
    "qwen2": {**_QWEN, "qkv_bias": True},
    "qwen3": {**_QWEN, "qk_norm": True, "head_dim": 128},
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "gpt2": {"tie_embeddings": True, "max_length": 1024, "norm_eps": 1e-5, "dropout": 0.1},
    "t5": {"max_length": 512, "norm_eps": 1e-6, "dropout": 0.1},
}
"""What transformers takes where a file leaves a key out, and what a kind has without a key for it."""
UNSAID = {"type_vocab_size": {"roberta": 2, "xlm-roberta": 2}}
"""The same of keys that are fixed here, where it is another value than ours."""
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
SIZES = (*NEEDED, "num_kv_heads", "max_length")
MOST = 2**31
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
    _check_types(name, theirs)
    kind = theirs.get("model_type")
    if kind not in FAMILY:
        raise ValueError(f"model.config={name}: model_type={kind}: {_reason(kind, theirs)}; there are {_known()}")
    family = FAMILY[kind]
    for key, want in FIXED[family].items():
        value = theirs.get(key)
        value = UNSAID.get(key, {}).get(kind) if value is None else value
        allowed = (True, False) if kind == "qwen2" and key == "attention_bias" else (want,)
        if value is not None and value not in allowed:
            raise ValueError(f"model.config={name}: {key}={value}, and {family} as known here has {want}")
    found: dict[str, Any] = {"family": family, "name": _title(theirs, path), **ABSENT[kind]}
    if "num_key_value_heads" in theirs:
        found.pop("num_kv_heads", None)  # null: as many as heads
    for key, field in FIELDS[family].items():
        if theirs.get(key) is not None:
            found[field] = theirs[key]
    for field, key in (("num_layers", LAYERS.get(family, "num_hidden_layers")), ("dropout", DROPOUT[family])):
        if theirs.get(key) is not None:
            found[field] = theirs[key]
    length = theirs.get(LENGTH.get(family, "max_position_embeddings")) or found["max_length"]
    found["max_length"] = length - 2 * (family == "roberta")
    _own(name, theirs, found, build=build)
    missing = [_theirs(family, key) for key in NEEDED if not found.get(key)]
    if missing:
        raise ValueError(f"model.config={name}: says nothing of {', '.join(missing)}; it is not a whole config.json")
    return found


def _theirs(family: str, field: str) -> str:
    """The key of a file that gives a field of ours."""
    if field == "num_layers":
        return LAYERS.get(family, "num_hidden_layers")
    return next((key for key, own in FIELDS[family].items() if own == field), field)


def _check_types(name: str, theirs: dict[str, Any]) -> None:
    """ValueError, which names the key, for a size that is no size, and for what should be true or false and is not."""
    sizes = {key for fields in FIELDS.values() for key, own in fields.items() if own in SIZES}
    sizes |= {*LAYERS.values(), *LENGTH.values(), "num_hidden_layers", "max_position_embeddings", "num_decoder_layers"}
    for key in sorted((sizes | {"head_dim", "d_kv"}) & set(theirs)):
        value = theirs[key]
        if value is not None and (type(value) is not int or not 0 < value < MOST):
            raise ValueError(
                f"model.config={name}: {key}={json.dumps(value)}: must be a whole number, 1 to {MOST - 1:,}"
            )
    for key in ("tie_word_embeddings", "attention_bias"):
        if not isinstance(theirs.get(key, False), bool | None):
            raise ValueError(f"model.config={name}: {key}={json.dumps(theirs[key])}: must be true or false")
    if theirs.get("quantization_config"):
        raise ValueError(
            f"model.config={name}: quantization_config: weights that are packed already are not known here; take the "
            "config.json of the model that they were made of, and model.quant=nf4 for a 4-bit base"
        )


def _known() -> str:
    return ", ".join(FAMILY)


def _reason(kind: Any, theirs: dict[str, Any]) -> str:
    """Why a kind is refused."""
    if any((theirs.get(key) or 0) > 1 for key in EXPERTS):
        return "is a mixture of experts, and only models whose every weight meets every token are known here"
    return REASONS.get(kind, "is not known here")


def _own(name: str, theirs: dict[str, Any], found: dict[str, Any], *, build: bool) -> None:
    """What the families have each of their own."""
    heads = found.setdefault("num_heads", 0)
    found.setdefault("num_kv_heads", heads)
    if found["family"] == "llama":
        rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        turns = rope.get("rope_type", rope.get("type", "default"))
        if build and turns != "default":
            raise ValueError(f"model.config={name}: rope_type={turns}, but only the default one is built here")
        found["rope_theta"] = float(rope.get("rope_theta", theirs.get("rope_theta", 10000.0)))
        found["head_dim"] = theirs.get("head_dim") or found.get("head_dim", 0)
        if heads and found["head_dim"] * heads == found.get("hidden_size"):
            found["head_dim"] = 0
        found.setdefault("qkv_bias", False)
        found.setdefault("qk_norm", False)
    elif found["family"] == "gpt2":
        found.setdefault("intermediate_size", 4 * found.get("hidden_size", 0))
    elif found["family"] == "t5":
        found["tie_embeddings"] = True  # whatever a file says: transformers ties them always
        if theirs.get("d_kv", 64) * heads not in (0, found.get("hidden_size")):
            raise ValueError(f"model.config={name}: d_kv={theirs.get('d_kv', 64)}, and t5 here has d_model / num_heads")
        decoder = theirs.get("num_decoder_layers")
        if decoder is not None and decoder != found.get("num_layers"):
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
