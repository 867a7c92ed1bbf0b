"""Build a model from its published shape: on the meta device first, then filled where it will live.

A 7B model in fp32 is 27 GB: built the usual way it would exist on the host, in fp32, before it is moved and cast. On
the meta device only shapes exist; `to_empty` then allocates each tensor once, on the target device in the target dtype.
What `to_empty` leaves undefined is written here: parameters from the file or from the initialiser, and the buffers that
no file holds (rotary frequencies, kept in fp32 whatever the model's dtype, because a bf16 frequency has 8 bits and
rotates distant tokens by a wrong angle; position and type ids).

The initialiser is transformers' own: normal(0, 0.02) for linear and embedding weights, zero biases and padding rows,
ones in norms. Each parameter draws from a generator seeded by (seed, its name): the first layers of a truncated model
equal those of the full one, and the numbers do not depend on the order of construction.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmsys import schema
from llmsys.models import weights

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INIT_STD = 0.02
OBJECTIVE = {"llama": "causal_lm", "bert": "classification"}


def load(
    cfg: schema.Model,
    *,
    objective: str,
    num_labels: int,
    device: torch.device,
    seed: int,
    folder: Path | None,
) -> nn.Module:
    """The model of `cfg` on `device` in `cfg.dtype`, in training mode; `model(**batch)` has `.loss` and `.logits`.

    `folder` is what `weights.find` returned: None fills every parameter at random from `seed`; otherwise the
    safetensors in it are read, and only a classifier that they lack is random. `num_labels` matters to classification
    only. Raises ValueError when the objective does not fit the family, or the files do not fit the shape.
    """
    if objective != OBJECTIVE[cfg.family]:
        raise ValueError(f"model.family={cfg.family}: trains {OBJECTIVE[cfg.family]}, not {objective}")
    attention = resolve_attention(cfg.attention, device, cfg.dtype)
    if folder is not None:
        weights.check_shape(cfg, folder)
    model = skeleton(cfg, num_labels=num_labels, attention=attention)
    model.to_empty(device=device)
    if cfg.tie_embeddings and cfg.family == "llama":  # to_empty gave the two names a tensor each
        model.lm_head.weight = model.model.embed_tokens.weight
    _fill_buffers(model, device)
    if folder is None:
        missing = {name for name, _ in model.named_parameters()}
    else:
        missing = weights.read_into(model, folder, cfg)
    initialise(model, seed, missing)
    model.attention_asked = cfg.attention
    return model.train()


def skeleton(cfg: schema.Model, *, num_labels: int = 0, attention: str = "sdpa") -> Any:
    """The model on the meta device: every name, shape and dtype, and not one byte of data."""
    with torch.device("meta"):
        if cfg.family == "llama":
            from transformers import LlamaForCausalLM

            model: Any = LlamaForCausalLM(llama_config(cfg, attention))
        else:
            from llmsys.models.bert import MeanPooledClassifier

            model = MeanPooledClassifier(bert_config(cfg, attention), max(num_labels, 1), cfg.dropout)
    return model.to(DTYPES[cfg.dtype])


def llama_config(cfg: schema.Model, attention: str) -> Any:
    """transformers' configuration of a llama shape. No pad id: padding is what the attention mask says."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        max_position_embeddings=cfg.max_length,
        rms_norm_eps=cfg.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        tie_word_embeddings=cfg.tie_embeddings,
        attention_dropout=cfg.dropout,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        attn_implementation=attention,
    )


def bert_config(cfg: schema.Model, attention: str) -> Any:
    """transformers' configuration of a bert shape; `dropout` is that of embeddings, sub-layers and attention alike."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        max_position_embeddings=cfg.max_length,
        layer_norm_eps=cfg.norm_eps,
        hidden_dropout_prob=cfg.dropout,
        attention_probs_dropout_prob=cfg.dropout,
        use_cache=False,
        attn_implementation=attention,
    )


def resolve_attention(asked: str, device: torch.device, dtype: str = "bf16") -> str:
    """What transformers is told for `model.attention`: `flash_attention_2` needs its package, CUDA and bf16.

    Where one of them lacks, torch's own SDPA serves (on a GPU it has a flash kernel too): one log line says so, and
    `kernel.observed` puts what really ran into the record.
    """
    if asked != "flash_attention_2":
        return asked
    if device.type != "cuda":
        reason = "there is no CUDA device"
    elif importlib.util.find_spec("flash_attn") is None:
        reason = "the package flash-attn is not installed (pip install 'llmsys[flash]')"
    elif dtype != "bf16":
        reason = f"it has no kernel for model.dtype={dtype}"
    else:
        return asked
    log.warning("model.attention=flash_attention_2: %s; torch's SDPA serves instead", reason)
    return "sdpa"


@torch.no_grad()
def initialise(model: nn.Module, seed: int, names: set[str]) -> None:
    """Fills the parameters in `names` in place, as transformers would."""
    owners = {
        f"{prefix}.{leaf}" if prefix else leaf: (module, leaf)
        for prefix, module in model.named_modules()
        for leaf, _ in module.named_parameters(recurse=False)
    }
    for name, parameter in model.named_parameters():
        if name not in names:
            continue
        module, leaf = owners[name]
        if leaf == "bias":
            parameter.zero_()
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator(device=parameter.device)
            generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            parameter.normal_(0.0, INIT_STD, generator=generator)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                parameter[module.padding_idx].zero_()
        else:
            assert "norm" in type(module).__name__.lower(), f"no initialiser for {name} of {type(module).__name__}"
            parameter.fill_(1.0)


def _fill_buffers(model: nn.Module, device: torch.device) -> None:
    """Computes again what `to_empty` left undefined. Rotary modules are built anew on the device, in fp32."""
    for prefix, module in list(model.named_modules()):
        if type(module).__name__.endswith("RotaryEmbedding"):
            with torch.device(device):
                model.set_submodule(prefix, type(module)(module.config))
            continue
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf == "position_ids":
                buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand_as(buffer))
            elif leaf == "token_type_ids":
                buffer.zero_()
            else:
                raise AssertionError(f"no value for the buffer {prefix}.{leaf}")
