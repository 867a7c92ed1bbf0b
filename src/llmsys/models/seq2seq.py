"""T5 (arXiv 1910.10683) with its loss in fp32, and feed-forward layers that take a quantised weight.

transformers' own takes the cross entropy of the logits in their dtype: of a bf16 model the mean loss would have 8 bits,
steps of 0.016 at a loss of 3. Every other family here computes it in fp32. And it casts the input of `wo` to the dtype
of that weight, which is not a number's where the weight is packed in 4 bits, and a needless fp32 copy under autocast.
Shapes: B batch, L source length, T target length, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5DenseActDense


class FeedForward(nn.Module):
    """linear `wi`, ReLU, dropout, linear `wo`: the parts of transformers' own layer, under the same names."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.wi, self.wo, self.dropout, self.act = theirs.wi, theirs.wo, theirs.dropout, theirs.act

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]."""
        out: torch.Tensor = self.wo(self.dropout(self.act(self.wi(hidden))))
        return out


class T5(T5ForConditionalGeneration):
    """transformers' T5ForConditionalGeneration, names and `generate` included."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for name, module in list(self.named_modules()):
            if isinstance(module, T5DenseActDense):
                self.set_submodule(name, FeedForward(module))

    @functools.wraps(T5ForConditionalGeneration.forward)  # `generate` reads the signature
    def forward(self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """`input_ids`, `attention_mask` [B, L], `labels` [B, T] -> logits [B, T, V], mean loss over labels not -100.

        The decoder reads the labels shifted right, behind its start id (see `configs`).
        """
        if labels is None:
            return super().forward(*args, **kwargs)
        if kwargs.get("decoder_input_ids") is None and kwargs.get("decoder_inputs_embeds") is None:
            kwargs["decoder_input_ids"] = self.prepare_decoder_input_ids_from_labels(labels)
        out = super().forward(*args, **kwargs)
        out.loss = nn.functional.cross_entropy(out.logits.float().flatten(0, 1), labels.flatten())
        return out
