"""Source and target of an encoder-decoder (T5). Shapes: B batch, L source length, T target length.

Both sides end with </s> and are padded on the right; the model shifts the labels by one to make the decoder's input, so
there is none in a batch. A source that is too long is cut and still closed; a target that is too long is cut and has no
</s>, because it has not ended there.
"""

from __future__ import annotations

import numpy as np
import torch

from llmsys.data.examples import Example
from llmsys.data.ragged import FULL, IGNORE, Ragged
from llmsys.data.tokenizer import Tokenizer


class Pairs:
    """One split. `references` are the targets as they were written, uncut: what generated text is compared with."""

    def __init__(
        self, sources: Ragged, targets: Ragged, references: list[str], *, length: int, target_length: int, pad_id: int
    ) -> None:
        self.sources, self.targets, self.references = sources, targets, references
        self.length, self.target_length, self.pad_id = length, target_length, pad_id
        self.lengths = sources.lengths

    def __len__(self) -> int:
        return len(self.references)

    def batch(
        self, indices: list[int], pad_to: int | None = FULL, seed: int | tuple[int, ...] | None = None
    ) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` [B, L], `labels` [B, T] with -100 after the end. L and T are the encoded
        lengths; `pad_to` another L; None: the longest source and the longest target of this batch. There is nothing to
        draw from `seed`."""
        ids, mask = self.sources.padded(indices, self.length if pad_to == FULL else pad_to, self.pad_id)
        labels, _ = self.targets.padded(indices, None if pad_to is None else self.target_length, IGNORE)
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "labels": torch.from_numpy(labels),
        }


def pairs(examples: list[Example], tokenizer: Tokenizer, length: int, target_length: int) -> Pairs:
    """Encodes `prompt` -> `text` of each example."""
    assert tokenizer.eos_id is not None
    eos = tokenizer.eos_id
    sources = tokenizer.encode([example.prompt for example in examples])
    targets = tokenizer.encode([example.text for example in examples])
    return Pairs(
        Ragged.of([*ids[: length - 1], eos] for ids in sources),
        Ragged.of([*ids, eos][:target_length] for ids in targets),
        [example.text for example in examples],
        length=length,
        target_length=target_length,
        pad_id=tokenizer.pad_id,
    )
