"""What a saved tensor is there for: told by the module that was running when it was saved, or by the piece that asked.

Blocks of `llmsys.lorafa` do not call their modules. What they keep is found in autograd's graph, whose nodes know their
piece and so what each tensor is to it; between the pieces only attention's core keeps anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from llmsys.lorafa.pieces.activation import Activation
from llmsys.lorafa.pieces.attention import Core
from llmsys.lorafa.pieces.join import Beside, Branch, Residual
from llmsys.lorafa.pieces.linears import Linears
from llmsys.lorafa.pieces.norm import LayerNorm, RMSNorm
from llmsys.lorafa.pieces.piece import Chain, Extra, Piece
from llmsys.lorafa.pieces.relu import ReLU
from llmsys.lorafa.pieces.scores import Scores
from llmsys.models import blocks

ORIGINS = ("norm", "attention", "mlp", "adapter", "dropout", "input", "compiled")
"""`input`: of a block that is computed again whole. `compiled`: torch.compile's function is one, it does not say."""
OUTSIDE = ("embedding", "norm", "loss")
MLP = (".mlp", ".intermediate", ".output", "DenseReluDense")
KINDS: dict[type, str] = {
    RMSNorm: "norm",
    LayerNorm: "norm",
    Activation: "mlp",
    ReLU: "mlp",
    Core: "attention",
    Scores: "attention",
}


class Origins:
    """Watches a forward pass of `model`: `noted` is for `saved_tensors`, `graph` for the loss it comes to.

    `all_in` is the origin of whatever a block saves, where it cannot be told apart. Leave with `close`.
    """

    def __init__(self, model: nn.Module, all_in: str = "") -> None:
        self.all_in = all_in
        self.blocks = [name for name, _ in blocks(model)]
        self._running: list[tuple[str, nn.Module]] = []
        self._first: dict[int, tuple[str, str]] = {}  # address -> (block, origin)
        self._bytes: dict[int, int] = {}
        self._times: Counter[int] = Counter()
        watched = [pair for pair in model.named_modules() if not all_in or pair[0] in {"", *self.blocks}]
        self._hooks = []
        for name, module in watched:
            self._hooks.append(module.register_forward_pre_hook(self._enter(name, module), prepend=True))
            self._hooks.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))

    def _enter(self, name: str, module: nn.Module) -> Any:
        return lambda *_: self._running.append((name, module))

    def _leave(self) -> None:
        self._running.pop()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def noted(self, tensor: Tensor) -> None:
        address = tensor.untyped_storage().data_ptr()
        self._times[address] += 1
        # torch's checkpoint notes a block's input too, before (2.11) or after the block is entered
        if address not in self._first or (self.all_in and not self._first[address][0]):
            self._first[address] = self._place()
            self._bytes[address] = tensor.untyped_storage().nbytes()

    def _place(self) -> tuple[str, str]:
        path, module = self._running[-1] if self._running else ("", nn.Module())
        block = next((name for name in self.blocks if path == name or path.startswith(name + ".")), "")
        if block and self.all_in:
            return block, self.all_in
        inside = path[len(block) :]
        if "norm" in type(module).__name__.lower():
            return block, "norm"
        if isinstance(module, nn.Dropout):
            return block, "dropout"
        if not block:
            return "", "embedding" if "embed" in path.lower() or "shared" in path else "loss"
        if ".lora_" in inside:
            return block, "adapter"
        return block, "mlp" if inside.startswith(MLP) or any(word in inside for word in MLP[-1:]) else "attention"

    def graph(self, loss: Tensor) -> None:
        """Takes what pieces keep for their own account; what another operator saves too stays that one's."""
        if self.all_in:
            return
        mine: Counter[int] = Counter()
        asked: dict[int, str] = {}
        for tensor, origin in _kept(loss):
            address = tensor.untyped_storage().data_ptr()
            mine[address] += 1
            asked.setdefault(address, origin)
        for address, origin in asked.items():
            if address in self._first and mine[address] == self._times[address]:
                self._first[address] = self._first[address][0], origin

    def by_origin(self, block: str) -> dict[str, int]:
        """Bytes that `block` saves and nothing before it; '' is what lies outside of all blocks."""
        found: Counter[str] = Counter()
        for address, (place, origin) in self._first.items():
            if place == block:
                found[origin] += self._bytes[address]
        return dict(found)

    def total(self) -> int:
        return sum(self._bytes.values())


def _kept(loss: Tensor) -> Iterator[tuple[Tensor, str]]:
    """(tensor, origin) of all that the pieces in the graph of `loss` keep."""
    waiting: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        if hasattr(node, "piece") and hasattr(node, "keeps"):
            saved = list(node.saved_tensors)
            inputs = [saved.pop(0) for _ in range(node.count)] if node.keeps else []
            yield from _inputs(node.piece, inputs)
            extras: list[Extra] = [saved.pop(0) if number is None else number for number in node.numbers]
            yield from _extras(node.piece, extras)


def _inputs(piece: Piece, inputs: Sequence[Tensor]) -> Iterator[tuple[Tensor, str]]:
    """By the first piece that they come to. Linear layers read theirs where A is trained, or else for others' sake."""
    if isinstance(piece, Chain):
        yield from _inputs(piece.pieces[0], inputs)
    elif isinstance(piece, Residual | Branch):
        yield from _inputs(piece.piece, inputs)
    elif isinstance(piece, Beside):
        for part, x in zip(piece.pieces, inputs, strict=False):
            yield from _inputs(part, [x])
    elif isinstance(piece, Linears):
        yield from ((x, "adapter" if piece.reads_inputs(True) else "attention") for x in inputs)
    else:
        yield from ((x, _kind(piece)) for x in inputs)


def _extras(piece: Piece, extras: Sequence[Extra]) -> Iterator[tuple[Tensor, str]]:
    parts: Iterable[tuple[Piece, Sequence[Extra]]] = ()
    if isinstance(piece, Chain):
        parts = zip(piece.pieces, _shares(extras, piece._sizes), strict=True)
    elif isinstance(piece, Residual | Branch):
        parts = [(piece.piece, extras)]
    elif isinstance(piece, Beside):
        parts = zip(piece.pieces, _shares(extras, [count for _, count in piece._sizes]), strict=True)
    for part, own in parts:
        yield from _extras(part, own)
    if not parts:
        kind = "adapter" if isinstance(piece, Linears) else _kind(piece)
        yield from ((extra, kind) for extra in extras if isinstance(extra, Tensor))


def _shares(extras: Sequence[Extra], sizes: Sequence[int]) -> list[Sequence[Extra]]:
    left = list(extras)
    found: list[Sequence[Extra]] = []
    for size in sizes:
        found.append(left[:size])
        left = left[size:]
    return found


def _kind(piece: Piece) -> str:
    return next((origin for kind, origin in KINDS.items() if isinstance(piece, kind)), "dropout")
