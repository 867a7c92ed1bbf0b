"""What a model consists of: a row for each module that has parameters of its own, so that the columns add up."""

from __future__ import annotations

from torch import nn

COLUMNS = ("module", "type", "parameters", "trainable_parameters")


def rows(model: nn.Module) -> list[tuple[str, str, int, int]]:
    """In the order of `named_modules`. A parameter that several modules share counts for the first of them; a packed
    one (`model.quant`) for the weights that it stands for. The sums are those of the model."""
    found = []
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter not in seen]
        seen.update(own)
        if own:
            counts = [(count(parameter), parameter.requires_grad) for parameter in own]
            trained = sum(number for number, trainable in counts if trainable)
            found.append((name, type(module).__name__, sum(number for number, _ in counts), trained))
    return found


def count(parameter: nn.Parameter) -> int:
    """Weights that a parameter stands for: of a packed one more than its elements."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state else parameter.numel()
