"""A tiny model of each family as `conf/model` has it, a padded batch for it, and transformers' own class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmsys import schema
from llmsys.models import load

CPU = torch.device("cpu")
CONF = Path(__file__).parents[2] / "conf" / "model"
ENCODERS = ["bert_tiny", "bert_tiny:mean", "roberta_tiny", "roberta_tiny:mean"]
TRANSFORMERS = ["llama_tiny", "gpt2_tiny", *ENCODERS, "t5_tiny"]
CONVNETS = ["resnet_tiny", "vgg_tiny"]
EVERY = [*TRANSFORMERS, *CONVNETS]
CLASSES = 3


def read(name: str, **changes: Any) -> Any:
    """The model `conf/model/<name>.yaml`; `<name>:mean` with that pooling."""
    from omegaconf import OmegaConf

    name, _, pooling = name.partition(":")
    plain: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    plain.pop("defaults")
    cls = schema.ConvNet if plain["kind"] == "convnet" else schema.Transformer
    return cls(**{**plain, **({"pooling": pooling} if pooling else {}), **changes})


def make(cfg: schema.Model, seed: int = 0, folder: Path | None = None) -> Any:
    """The loaded model, on the CPU, in training mode."""
    return load(cfg, objective=cfg.objective, num_labels=CLASSES, device=CPU, seed=seed, folder=folder)


def batch(cfg: schema.Model, length: int = 12, padding: int = 4) -> dict[str, torch.Tensor]:
    """Two examples, the second with `padding` masked positions at its end; all bytes occur, 0 and 1 too."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(cfg, schema.ConvNet):
        images = torch.randn(4, cfg.channels, 16, 16, generator=generator)
        return {"pixel_values": images, "labels": torch.tensor([0, 2, 1, 1])}
    ids = torch.randint(2, 256, (2, length), generator=generator)
    ids[:, 3], ids[:, 4] = 0, 1
    mask = torch.ones_like(ids)
    if padding:
        ids[1, -padding:], mask[1, -padding:] = 256, 0
    labels = {
        "classification": torch.tensor([0, 2]),
        "causal_lm": ids.masked_fill(mask == 0, -100),
        "seq2seq": torch.randint(0, 256, (2, 7), generator=generator),
    }[cfg.objective]
    if cfg.objective == "seq2seq":
        labels[0, 5:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def theirs(cfg: Any, **changes: Any) -> Any:
    """transformers' own model of this shape, initialised by transformers under torch's seed 0; not of VGG."""
    import transformers

    from llmsys.models import configs

    if cfg.family == "resnet":
        config = configs.resnet(cfg)
        name = "ResNetForImageClassification"
    else:
        config = getattr(configs, cfg.family)(cfg, "sdpa")
        name = {
            "llama": "LlamaForCausalLM",
            "gpt2": "GPT2LMHeadModel",
            "bert": "BertForSequenceClassification",
            "roberta": "RobertaForSequenceClassification",
            "t5": "T5ForConditionalGeneration",
        }[cfg.family]
    config.num_labels = CLASSES
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return getattr(transformers, name)(config)
