"""A BERT encoder that classifies from the mean of its tokens.

Sentence encoders such as MiniLM were trained with mean pooling, not with BERT's [CLS] pooler, so the pooler (a layer
that such a file may carry) is left out: it would be random-like weight on a path that the pre-training never used.
Shapes: B batch, L length, D model width, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Classified:
    """What `model(**batch)` returns. `loss` is None without labels; `features` is the pooled input of the head."""

    loss: torch.Tensor | None
    logits: torch.Tensor
    features: torch.Tensor


class MeanPooledClassifier(nn.Module):
    """BertModel without its pooler -> mean over unmasked tokens -> dropout -> linear `classifier`."""

    def __init__(self, config: Any, num_labels: int, dropout: float) -> None:
        """`config` is a transformers BertConfig; `num_labels` is C."""
        super().__init__()
        from transformers import BertModel

        self.config = config
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, num_labels)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> Classified:
        """`input_ids`, `attention_mask` [B, L] (all ones when None), `labels` [B] -> logits [B, C], mean loss."""
        features = self.features(input_ids, attention_mask)
        logits = self.classifier(self.dropout(features))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return Classified(loss, logits, features)

    def features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The mean over unmasked tokens of the last hidden states, [B, D]; what a linear probe is fitted on."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # [B, L, D]
        if attention_mask is None:
            return hidden.mean(1)
        share = attention_mask.to(hidden.dtype).unsqueeze(1)  # [B, 1, L]
        share = share / share.sum(-1, keepdim=True).clamp(min=1)
        # A product with the mask's row, not a masked copy of `hidden`, whose B*L*D values autograd would keep.
        return torch.matmul(share, hidden).squeeze(1)
