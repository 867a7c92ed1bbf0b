"""A language model of transformers that returns its loss and no logits: `train.loss=chunked`.

The head itself makes the loss, inside its own forward pass, where the model calls it: there an engine that cuts weights
over ranks (ZeRO-3, FSDP2) has gathered its weight, and a model that scales its last hidden states (a tied T5) has done
so. Model and head stay the objects that they are; their classes become subclasses, so no parameter changes its name.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from llmsys.models.classes import become, derived
from llmsys.models.linear_cross_entropy import linear_cross_entropy

FAMILIES = {"llama": True, "gpt2": True, "t5": False}
"""transformers' model type -> whether a position's label is the next one's. Their logits are the head's, unchanged."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the head's next call shall return the loss of."""

    labels: Tensor
    shift: bool
    count: Tensor | int | None


class LossHead:
    """Mixed into the class of a head: its output, or the loss where one is asked for."""

    weight: Tensor
    bias: Tensor | None
    asked: Asked | None = None

    def forward(self, h: Tensor) -> Tensor:
        if self.asked is None:
            logits: Tensor = super().forward(h)  # type: ignore[misc]
            return logits
        asked = self.asked
        return linear_cross_entropy(h, self.weight, asked.labels, self.bias, shift=asked.shift, count=asked.count)


def chunk_loss(model: Any) -> Any:
    """`model`, changed in place: with `labels` its forward returns `loss` alone, in training and evaluation.

    Without labels (`generate`) it is as it was. As transformers' own, it takes `num_items_in_batch`, by which the
    summed loss is divided instead of by the labels there are, and `shift_labels`. ValueError for a family whose logits
    are not known to be its head's output, and (then, or when the loss is asked for) for a head that is more than one
    matrix: with an adapter, or quantised.
    """
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family not in FAMILIES:
        raise ValueError(f"train.loss=chunked: is for {', '.join(FAMILIES)}, not for {family}")
    head = model.get_output_embeddings()
    _check_plain(head)
    if not head.weight.is_floating_point():
        raise ValueError("train.loss=chunked: the head is quantised; leave it out, or use train.loss=whole")
    head_class: Any = type(head)
    model_class: Any = type(model)
    become(head, _head_class(head_class))
    become(model, _model_class(model_class, FAMILIES[family]))
    return model


def _check_plain(head: Any) -> None:
    """ValueError where a head's logits are not h W^T + b of its own weight, which is all that is read of it."""
    for mark, what in (("adapters", "has an adapter"), ("lora_A", "has an adapter"), ("dequantised", "is quantised")):
        if hasattr(head, mark):
            raise ValueError(f"train.loss=chunked: the head {what}; leave it out, or use train.loss=whole")
    if not isinstance(head, nn.Linear):  # its weight is not asked for: ZeRO-3 gathers what a forward pass looks at
        raise ValueError(f"train.loss=chunked: the head is a {type(head).__name__}, and must be a plain nn.Linear")


@functools.cache
def _head_class(plain: Any) -> Any:
    return plain if issubclass(plain, LossHead) else derived(_head_class, plain, bases=(LossHead, plain))


@functools.cache
def _model_class(plain: Any, shift: bool) -> Any:
    @functools.wraps(plain.forward)  # `generate` reads the signature
    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return plain.forward(self, *args, **kwargs)
        shifted = kwargs.pop("shift_labels", None)
        if not shift and kwargs.get("decoder_input_ids") is None and kwargs.get("decoder_inputs_embeds") is None:
            kwargs["decoder_input_ids"] = self.prepare_decoder_input_ids_from_labels(labels)
        head = self.get_output_embeddings()
        _check_plain(head)  # what was put there since
        if not isinstance(head, LossHead):
            raise ValueError("train.loss=chunked: the model has got another head; call chunk_loss again")
        own = labels if shifted is None else shifted
        count = kwargs.get("num_items_in_batch")
        head.asked = Asked(labels=own, shift=shift and shifted is None, count=count)
        try:
            out = plain.forward(self, *args, **kwargs)
        finally:
            head.asked = None
        if isinstance(out, tuple):
            return out
        return type(out)(**{**out, "loss": out.logits, "logits": None})

    if getattr(plain, "chunked_loss", False):
        return plain
    return derived(_model_class, plain, shift, bases=(plain,), forward=forward, chunked_loss=True)
