"""One file a family: its parameters, its linear layers, and its forward pass as autograd sees it."""

from llmsys.cost.families import bert, convnet, gpt2, llama, t5
from llmsys.cost.families.base import Family, Linear, Shape

FAMILIES: dict[str, Family] = {
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
    "roberta": bert,
    "t5": t5,
    "resnet": convnet,
    "vgg": convnet,
}

__all__ = ["FAMILIES", "Family", "Linear", "Shape"]
