"""Convolutional networks that classify images: ResNet (arXiv 1512.03385) and VGG (arXiv 1409.1556).

ResNet is transformers' (torchvision's shapes, names as in the published files) under either of two stems: ImageNet's
7x7 convolution of stride 2 and pooling, or for 32x32 images one 3x3 convolution. The widths stay those of ImageNet, so
`resnet18_cifar` is the 11.17 M network of most work on compression, not the thin CIFAR ResNets of section 4.2. VGG for
CIFAR has batch norm and one linear layer in place of three.
Shapes: B batch, K image channels, H W image height and width, D last stage's width, C classes.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import ResNetModel
from transformers.models.resnet.modeling_resnet import ResNetConvLayer

from llmsys import schema
from llmsys.models import configs
from llmsys.models.classifier import Classified, classified


class CifarStem(nn.Module):
    """One 3x3 convolution at full resolution: [B, K, H, W] -> [B, N, H, W]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.embedder = ResNetConvLayer(channels, width, kernel_size=3)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.embedder(pixel_values)
        return found


class ResNet(nn.Module):
    """transformers' ResNetModel -> mean over the image -> dropout -> linear `classifier.1`."""

    def __init__(self, cfg: schema.ConvNet, num_labels: int) -> None:
        super().__init__()
        config = configs.resnet(cfg)
        self.resnet = ResNetModel(config)
        if cfg.stem == "cifar":
            self.resnet.embedder = CifarStem(cfg.channels, config.embedding_size)
        self.dropout = nn.Dropout(cfg.dropout)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(cfg.widths[-1], num_labels))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> Classified:
        """`pixel_values` [B, K, H, W] in any float dtype, `labels` [B] -> logits [B, C], mean loss."""
        dtype = self.resnet.embedder.embedder.convolution.weight.dtype
        features = self.resnet(pixel_values.to(dtype)).pooler_output.flatten(1)  # [B, D]
        return classified(self.classifier(self.dropout(features)), labels)


class Stage(nn.Module):
    """3x3 convolutions with bias, batch norm and ReLU, then a 2x2 pooling: [B, N, H, W] -> [B, width, H/2, W/2]."""

    def __init__(self, before: int, width: int, depth: int) -> None:
        super().__init__()
        inputs = [before] + [width] * (depth - 1)
        self.layers = nn.Sequential(*(ResNetConvLayer(n, width, kernel_size=3, bias=True) for n in inputs))
        self.pool = nn.MaxPool2d(2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.pool(self.layers(hidden))
        return found


class VGG(nn.Module):
    """Stages -> mean over what is left of the image (one position of 32x32 after five) -> dropout -> `classifier`."""

    def __init__(self, cfg: schema.ConvNet, num_labels: int) -> None:
        """ValueError where the stem is not `cifar`, or an image is too small for so many poolings."""
        super().__init__()
        if cfg.stem != "cifar":
            raise ValueError(f"model.stem={cfg.stem}: model.family=vgg is built with stem=cifar only")
        if cfg.image_size < 2 ** len(cfg.depths):
            raise ValueError(f"model.image_size={cfg.image_size}: too small for {len(cfg.depths)} stages that halve it")
        befores = [cfg.channels, *cfg.widths[:-1]]
        self.stages = nn.Sequential(*map(Stage, befores, cfg.widths, cfg.depths))
        self.dropout = nn.Dropout(cfg.dropout)
        self.classifier = nn.Linear(cfg.widths[-1], num_labels)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> Classified:
        """`pixel_values` [B, K, H, W] in any float dtype, `labels` [B] -> logits [B, C], mean loss."""
        features = self.stages(pixel_values.to(self.classifier.weight.dtype)).mean((2, 3))  # [B, D]
        return classified(self.classifier(self.dropout(features)), labels)


def build(cfg: schema.ConvNet, num_labels: int) -> nn.Module:
    """The network of `cfg`, on whatever device is torch's default."""
    return ResNet(cfg, num_labels) if cfg.family == "resnet" else VGG(cfg, num_labels)
