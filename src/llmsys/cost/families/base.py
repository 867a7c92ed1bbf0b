"""What a family has to say of itself, and the words in which it says it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from llmsys.cost.walk import Walk

Shape = tuple[int, ...]


class Linear(NamedTuple):
    """A linear layer of a block: its full name, its input and output widths, and where tensor parallelism cuts it:
    `cut` 0 divides the outputs (and the bias), 1 the inputs."""

    name: str
    n_in: int
    n_out: int
    cut: int = 0


class Family(Protocol):
    """One module of this folder. `model` is the family's own class of settings."""

    def parameters(self, model: Any, num_labels: int) -> dict[str, Shape]:
        """Name -> shape of every parameter, as the built model names them; a tied tensor once."""
        ...

    def linears(self, model: Any) -> list[Linear]:
        """The linear layers of all blocks, in the order of `named_modules`."""
        ...

    def buffer_bytes(self, model: Any) -> int:
        """Bytes of what the built model registers beside its parameters."""
        ...

    def play(self, walk: Walk) -> None:
        """One forward pass with its loss, on `walk.tape`."""
        ...


def weights(linears: list[Linear], *, bias: bool) -> dict[str, Shape]:
    """The parameters of linear layers, each weight [n_out, n_in]."""
    table: dict[str, Shape] = {}
    for layer in linears:
        table[f"{layer.name}.weight"] = (layer.n_out, layer.n_in)
        if bias:
            table[f"{layer.name}.bias"] = (layer.n_out,)
    return table


def norms(names: Iterable[str], width: int) -> dict[str, Shape]:
    """The parameters of LayerNorms."""
    return {f"{name}.{leaf}": (width,) for name in names for leaf in ("weight", "bias")}
