"""Build a model from its published shape: on the meta device first, then filled where it will live.

A 7B model in fp32 is 27 GB: built the usual way it would exist on the host, in fp32, before it is moved and cast. On
the meta device only shapes exist; `filling` then allocates each tensor once, on the target device in the target dtype,
and writes it: parameters from the file or from the initialiser, and the buffers that no file holds (rotary frequencies,
kept in fp32 whatever the model's dtype, because a bf16 frequency has 8 bits and rotates distant tokens by a wrong
angle; position and type ids).

Batch norm stays in fp32 in a bf16 network: its running statistics move by a tenth of a difference, which 8 bits lose.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import nn

from llmsys import schema
from llmsys.models import configs, published, quant
from llmsys.models.filling import Filler

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS = ("task", "pretraining")


class How(TypedDict):
    """What a model is built for. `folder` is what `weights.find` returned: None fills every parameter at random from
    `seed`; otherwise the safetensors in it are read, and only a classifier that they lack is random. `num_labels`
    matters to classification and images only."""

    objective: str
    num_labels: int
    device: torch.device
    seed: int
    folder: Path | None


def load(cfg: schema.Model, **how: Unpack[How]) -> nn.Module:
    """The model of `cfg` on `device` in `cfg.dtype`, in training mode; `model(**batch)` has `.loss` and `.logits`.

    Raises ValueError when the objective does not fit the family, or the files do not fit the shape.
    """
    model, fill = unfilled(cfg, **how)
    fill(model)
    return model


def unfilled(cfg: schema.Model, **how: Unpack[How]) -> tuple[nn.Module, Filler]:
    """`load`, and what fills it: the model's parameters are on the meta device until `filler(module)` is called for a
    module, but for those of quantised layers, which are packed. So that weights can be cut over ranks piece by piece.
    """
    objective, device, folder = how["objective"], how["device"], how["folder"]
    if objective != cfg.objective:
        raise ValueError(f"model.family={cfg.family}: trains {cfg.objective}, not {objective}")
    attention = ""
    if isinstance(cfg, schema.Transformer):
        attention = resolve_attention(cfg.attention, device, cfg.dtype, cfg.family)
    if folder is not None:
        published.check_shape(cfg, folder)
    model = skeleton(cfg, num_labels=how["num_labels"], attention=attention)
    fill = Filler(model, cfg, seed=how["seed"], device=device, folder=folder)
    quant.quantise(model, cfg, fill)
    if isinstance(cfg, schema.Transformer):
        model.attention_asked = cfg.attention
    if hasattr(model, "generation_config"):
        model.generation_config.use_cache = True  # training keeps no cache; generation without one is quadratic
    return model.train(), fill


def skeleton(cfg: schema.Model, *, num_labels: int = 0, attention: str = "sdpa", head: str = "task") -> Any:
    """The model on the meta device: every name, shape and dtype, and not one byte of data.

    `num_labels` classes (0: one of a text classifier, `model.num_classes` of a network for images). With
    `head="pretraining"` BERT and RoBERTa have their papers' heads, as which they are counted: transformers'
    BertForPreTraining and RobertaForMaskedLM, whose decoder is the embedding's own table.
    """
    assert head in HEADS, head
    with torch.device("meta"):
        if isinstance(cfg, schema.ConvNet):
            from llmsys.models import convnet

            model: Any = convnet.build(cfg, num_labels or cfg.num_classes)
        else:
            assert isinstance(cfg, schema.Transformer)
            model = _transformer(cfg, max(num_labels, 1), attention, head)
    model = model.to(DTYPES[cfg.dtype])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return model


def _transformer(cfg: schema.Transformer, num_labels: int, attention: str, head: str) -> Any:
    import transformers

    if cfg.family == "llama":
        return transformers.LlamaForCausalLM(configs.llama(cfg, attention))
    if cfg.num_kv_heads != cfg.num_heads:
        raise ValueError(f"model.num_kv_heads={cfg.num_kv_heads}: {cfg.family} has num_heads={cfg.num_heads} of them")
    if cfg.family == "gpt2":
        model = transformers.GPT2LMHeadModel(configs.gpt2(cfg, attention))
        model.loss_type = "ForCausalLM"  # transformers tells it from a class's name, and warns about this one's
        return model
    if cfg.family == "t5":
        from llmsys.models.seq2seq import T5

        return T5(configs.t5(cfg, attention))
    from llmsys.models.classifier import TextClassifier

    config = (configs.bert if cfg.family == "bert" else configs.roberta)(cfg, attention)
    if head == "pretraining":
        cls = transformers.BertForPreTraining if cfg.family == "bert" else transformers.RobertaForMaskedLM
        return cls(config)
    return TextClassifier(config, num_labels, cfg.pooling, configs.pad_id(cfg))


def resolve_attention(asked: str, device: torch.device, dtype: str = "bf16", family: str = "llama") -> str:
    """What transformers is told for `model.attention`: `flash_attention_2` needs its package, CUDA and bf16.

    Where one of them lacks, torch's own SDPA serves (on a GPU it has a flash kernel too): one log line says so, and
    `kernel.observed` puts what really ran into the record.
    """
    if family == "t5" and asked != "eager":
        return _t5_attention(asked)
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


def _t5_attention(asked: str) -> str:
    """T5 adds a learnt bias to the scores, which flash-attn cannot; transformers before 5.2x has no SDPA for it."""
    from transformers import T5PreTrainedModel

    got = "sdpa" if T5PreTrainedModel._supports_sdpa else "eager"
    if asked != got:
        log.warning("model.attention=%s: T5's position bias has no such kernel here; %s serves instead", asked, got)
    return got
