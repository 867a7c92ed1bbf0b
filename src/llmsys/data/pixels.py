"""Stored images as the model takes them. Shapes: B batch, C channels, H = W the model's image size.

A batch is made from bytes: a pixel between 0 and 1, the channels the model has (a grey image is repeated), resized
bilinearly (with a filter where it shrinks), cropped and mirrored where that is asked for, and normalised by the data
set's mean and standard deviation.

Augmentation is the usual one for CIFAR (He et al. 2016, arXiv 1512.03385, section 4.2): 4 black pixels around an image
of 32 (in proportion for other sizes), a random crop of the old size, mirrored half of the time. It is drawn from (seed,
the image's index) alone, so neither the micro-batch nor the number of ranks changes what a step sees.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from llmsys import schema
from llmsys.data.examples import Pixels, Source
from llmsys.data.ragged import FULL


class Images:
    """One split; `augment` says whether a batch with a seed is cropped and mirrored."""

    def __init__(self, pixels: Pixels, *, size: int, channels: int, augment: bool) -> None:
        self.pixels, self.size, self.channels, self.augment = pixels, size, channels, augment
        self.lengths = np.ones(len(pixels), dtype=np.int64)
        self._mean = torch.tensor(pixels.mean).view(1, -1, 1, 1)
        self._std = torch.tensor(pixels.std).view(1, -1, 1, 1)

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(
        self, indices: list[int], pad_to: int | None = FULL, seed: int | tuple[int, ...] | None = None
    ) -> dict[str, Tensor]:
        """`pixel_values` fp32 [B, C, H, W] and `labels` int64 [B]; images have no length, so `pad_to` is nothing to
        them. `seed` must change from step to step, or every epoch sees the same crops: (train.seed, step)."""
        assert indices
        x = torch.from_numpy(self.pixels.images[indices]).float() / 255
        if x.shape[-1] != self.size:
            x = functional.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        if self.augment and seed is not None:
            x = crop_and_mirror(x, [_draw(seed, i) for i in indices])
        x = ((x - self._mean) / self._std).expand(-1, self.channels, -1, -1)
        return {"pixel_values": x.contiguous(), "labels": torch.from_numpy(self.pixels.classes[indices])}


def _draw(seed: int | tuple[int, ...], index: int) -> tuple[int, int, int]:
    """Three numbers below 2**32 for one image."""
    seeds = (seed,) if isinstance(seed, int) else seed
    y, x, mirror = np.random.SeedSequence((*seeds, index)).generate_state(3).tolist()
    return y, x, mirror


def crop_and_mirror(x: Tensor, draws: list[tuple[int, int, int]]) -> Tensor:
    """`x` [B, C, S, S] framed by S // 8 black pixels and cropped back to S at one of the (2 (S // 8) + 1)**2 places,
    mirrored where the third number is odd. Returns a new tensor."""
    size = x.shape[-1]
    frame = size // 8
    framed = functional.pad(x, [frame] * 4)
    rows = []
    for image, (y, left, mirror) in zip(framed, draws, strict=True):
        top, left = y % (2 * frame + 1), left % (2 * frame + 1)
        cut = image[:, top : top + size, left : left + size]
        rows.append(cut.flip(-1) if mirror % 2 else cut)
    return torch.stack(rows)


def images(source: Source[Pixels], model: schema.ConvNet) -> tuple[Images, Images]:
    """(training split, validation split), the latter never augmented. ValueError, naming the key, where the images do
    not fit the model."""
    found = source.train.images.shape[1]
    if found not in (1, model.channels):
        raise ValueError(f"model.channels={model.channels}: the images have {found}")
    if model.num_classes < len(source.labels):
        raise ValueError(f"model.num_classes={model.num_classes}: the images have {len(source.labels)} classes")
    size, channels = model.image_size, model.channels
    train = Images(source.train, size=size, channels=channels, augment=source.augment)
    return train, Images(source.val, size=size, channels=channels, augment=False)
