"""A BERT or RoBERTa encoder that classifies a text.

Sentence encoders such as MiniLM were trained with mean pooling, not with a pooler on the first token, so with
`model.pooling=mean` that layer (which such a file may carry) is left out: it would be random-like weight on a path that
the pre-training never used. With `cls` the head is the family's own: BERT's tanh pooler and a linear layer, RoBERTa's
linear, tanh, linear. Names are those of transformers' sequence classifiers, so that their files fit.
Shapes: B batch, L length, D model width, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BertModel, RobertaModel
from transformers.models.roberta.modeling_roberta import RobertaClassificationHead

from llmsys.models.configs import ROBERTA_OFFSET


@dataclass
class Classified:
    """What `model(**batch)` returns. `loss` is None without labels."""

    loss: torch.Tensor | None
    logits: torch.Tensor


def classified(logits: torch.Tensor, labels: torch.Tensor | None) -> Classified:
    """`logits` [B, C], `labels` [B] -> the mean cross entropy, in fp32 whatever the model's dtype."""
    loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
    return Classified(loss, logits)


class TextClassifier(nn.Module):
    """Encoder -> pooled features -> dropout -> `classifier`."""

    def __init__(self, config: Any, num_labels: int, pooling: str, pad_id: int) -> None:
        """`config` is a transformers BertConfig or RobertaConfig; `num_labels` is C, `pooling` is `mean` or `cls`.

        `pad_id` is what the tokenizer pads with: RoBERTa's configuration has another, from which positions count.
        """
        super().__init__()
        config.num_labels = num_labels
        self.config, self.pooling = config, pooling
        self.family: str = config.model_type
        self.own_head = self.family == "roberta" and pooling == "cls"
        if self.family == "roberta":
            self.roberta = RobertaModel(config, add_pooling_layer=False)
            self.roberta.embeddings.word_embeddings.padding_idx = pad_id
        else:
            self.bert = BertModel(config, add_pooling_layer=pooling == "cls")
        self.dropout = nn.Dropout(0.0 if self.own_head else config.hidden_dropout_prob)
        linear = nn.Linear(config.hidden_size, num_labels)
        self.classifier: nn.Module = RobertaClassificationHead(config) if self.own_head else linear

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> Classified:
        """`input_ids`, `attention_mask` [B, L] (all ones when None), `labels` [B] -> logits [B, C], mean loss."""
        features = self.dropout(self.features(input_ids, attention_mask))
        # RoBERTa's own head takes hidden states [B, L, D], reads the first and has its own dropout.
        logits = self.classifier(features.unsqueeze(1) if self.own_head else features)
        return classified(logits, labels)

    def features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """What the head reads, and a linear probe is fitted on, [B, D].

        The mean over unmasked tokens of the last hidden states, or with `cls` the first token's (BERT: pooled).
        """
        encoder = self.roberta if self.family == "roberta" else self.bert
        positions = {"position_ids": roberta_positions(input_ids, attention_mask)} if self.family == "roberta" else {}
        out = encoder(input_ids=input_ids, attention_mask=attention_mask, **positions)
        hidden = out.last_hidden_state  # [B, L, D]
        if self.pooling == "cls":
            return hidden[:, 0] if self.family == "roberta" else out.pooler_output
        if attention_mask is None:
            return hidden.mean(1)
        share = attention_mask.to(hidden.dtype).unsqueeze(1)  # [B, 1, L]
        share = share / share.sum(-1, keepdim=True).clamp(min=1)
        # A product with the mask's row, not a masked copy of `hidden`, whose B*L*D values autograd would keep.
        return torch.matmul(share, hidden).squeeze(1)


def roberta_positions(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """[B, L] positions: unmasked tokens count from 2, masked ones have 1.

    As RoBERTa's own, which finds padding by its id; the mask says it for any tokenizer.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    return mask.cumsum(1) * mask + (ROBERTA_OFFSET - 1)
