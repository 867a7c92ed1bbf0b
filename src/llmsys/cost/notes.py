"""What a walk over a model notes of its operators: storages, moments, FLOPs and bytes, by part of the model.

A tensor is a size, a width in bytes, a flag `grad` and a storage number. What an operator's derivative reads, the rules
by which autograd keeps tensors, stands in `tape`.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llmsys.cost.work import BACKWARD, FORWARD, Both, Op


class Tensor(NamedTuple):
    """What the accounting needs of a tensor; `width` is bytes an element."""

    numel: int
    width: int
    grad: bool
    storage: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.width


class Product(NamedTuple):
    """FLOPs of a module: forward, of its derivatives, and computed again by itself."""

    module: str
    forward: float
    backward: float
    again: float


class Aside(NamedTuple):
    """What was played aside: its result, the storages that it saves, its FLOPs forward and backward, by module, and as
    operators."""

    out: Tensor
    saved: dict[int, str]
    passing: int
    forward: float
    backward: float
    products: list[Product]
    ops: list[Op]


class Notes:
    """Saved storages and FLOPs by part of the model.

    `part` is where the walk is, `origin` what it is there for, by which saved storages are told apart. `block` begins a
    part that can be recomputed, `elsewhere` one that cannot. `again` are the FLOPs of what pieces compute again by
    themselves. `products` are all FLOPs once more, in their order and by module (`within`); where no module is named,
    by part. `last_save` is how many of them come before the part's last save. `ops` and `last_op` are the same of all
    operators, which time is made of. `own` are the bytes that a part saves and
    no part before it, `passing` the most bytes at a moment of its backward pass: what of `own` was saved before that,
    gradients on their way, copies, what pieces compute again.
    `moments` are all of these, each with the bytes of trained weights that the part has read until there (`read`): the
    backward pass begins at the end, so at that moment it has made the gradients of all others.
    """

    def __init__(self, *, autocast: bool, cuda: bool, zero_3: bool = False) -> None:
        self.autocast = autocast
        self.cuda = cuda
        self.zero_3 = zero_3
        self.part = self.origin = ""
        self.blocks: list[str] = []
        self.inputs: dict[str, set[int]] = {}
        self.saved: dict[str, dict[int, str]] = defaultdict(dict)
        self.forward: dict[str, float] = defaultdict(float)
        self.backward: dict[str, float] = defaultdict(float)
        self.until_last_save: dict[str, float] = defaultdict(float)
        self.again: dict[str, float] = defaultdict(float)
        self.products: dict[str, list[Product]] = defaultdict(list)
        self.last_save: dict[str, int] = defaultdict(int)
        self.ops: dict[str, list[Op]] = defaultdict(list)
        self.last_op: dict[str, int] = defaultdict(int)
        self._uses: set[int] = set()  # storages that an operator has read whose gradient is wanted
        self._module = ""
        self.past: dict[str, int] = defaultdict(int)  # by block, of the gradient past a residual's branches
        self.waiting: dict[str, int] = defaultdict(int)  # by block, of the gradients that all blocks add to
        self.head = 0  # bytes of the logits as the head made them
        self.fleeting = 0  # bytes of what a chunked loss needs for a moment, beside what it keeps
        self.own: dict[str, int] = defaultdict(int)
        self.passing: dict[str, int] = defaultdict(int)
        self.moments: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.read: dict[str, int] = defaultdict(int)
        self._bytes: dict[int, int] = {}
        self._seen: set[int] = set()

    def elsewhere(self, part: str) -> None:
        """What follows belongs to `part`, which is not a repeated block."""
        self.part = part

    def block(self, part: str, *inputs: Tensor | None, residual: bool = True) -> None:
        """What follows belongs to the block `part`, which is called with `inputs` (None: an argument left out).
        `residual`: the first of them goes past its branches, and so does the gradient of what comes out."""
        self.part = part
        self.saved[part] = {}
        self.blocks.append(part)
        self.inputs[part] = {tensor.storage for tensor in inputs if tensor is not None}
        if residual and inputs[0] is not None:
            self.past[part] = inputs[0].nbytes * inputs[0].grad
        self.waiting[part] = sum(x.nbytes for x in inputs[1:] if x is not None and x.grad)

    def aside(self, play: Callable[[], Tensor]) -> Aside:
        """Plays something without noting any of it here: what it would have noted."""
        mine, seen = [notes.pop(self.part, None) for notes in self._notes], set(self._seen)
        out = play()
        saved, passing, forward, backward, *_, products, ops = (notes[self.part] for notes in self._notes)
        for notes, own in zip(self._notes, mine, strict=True):
            del notes[self.part]
            if own is not None:
                notes[self.part] = own
        self._seen = seen
        return Aside(out, saved, passing, forward, backward, products, ops)

    @property
    def _notes(self) -> tuple[Any, ...]:
        passes = self.saved, self.passing, self.forward, self.backward
        rest = self.until_last_save, self.own, self.last_save, self.last_op, self.moments, self.read
        return *passes, *rest, self.products, self.ops

    def bytes_of(self, storages: set[int]) -> int:
        return sum(self._bytes[storage] for storage in storages)

    def new(self, numel: int, width: int, grad: bool) -> Tensor:
        """A tensor in memory of its own."""
        storage = len(self._bytes)
        self._bytes[storage] = numel * width
        return Tensor(numel, width, grad, storage)

    def view(self, x: Tensor, numel: int) -> Tensor:
        """`numel` elements of `x`'s memory."""
        return Tensor(numel, x.width, x.grad, x.storage)

    def save(self, *tensors: Tensor, origin: str = "") -> None:
        """Keeps `tensors` for the backward pass; free where their storage is kept already."""
        self.touch()
        for storage in dict.fromkeys(tensor.storage for tensor in tensors):
            self.own[self.part] += 0 if storage in self._seen else self._bytes[storage]
            self._seen.add(storage)
            self.saved[self.part].setdefault(storage, origin or self.origin)
        self.passes()

    def passes(self, *sizes: int) -> None:
        """Notes a moment of the backward pass that makes tensors of these bytes."""
        there = self.own[self.part] + sum(sizes)
        self.passing[self.part] = max(self.passing[self.part], there)
        self.moments[self.part].append((there, self.read[self.part]))

    def touch(self) -> None:
        """Notes that something is saved here: a checkpointed block is computed again only up to its last save."""
        self.until_last_save[self.part] = self.forward[self.part]
        self.last_save[self.part] = len(self.products[self.part])
        self.last_op[self.part] = len(self.ops[self.part])

    def uses(self, *tensors: Tensor) -> None:
        """Notes that an operator reads `tensors`: a gradient that is not the first one of its tensor is added."""
        for x in tensors:
            if x.grad and x.storage in self._uses:
                self.ops[self.part].append(Op(BACKWARD, "stream", 0.0, 3.0 * x.nbytes, width=x.width))
            self._uses.add(x.storage)

    def streams(
        self, forward: float, backward: float, *, launches: tuple[int, int] = (1, 1), kind: str = "stream"
    ) -> None:
        """Notes bytes that the passes read and write."""
        for passed, nbytes, number in ((FORWARD, forward, launches[0]), (BACKWARD, backward, launches[1])):
            if number:
                self.ops[self.part].append(Op(passed, kind, 0.0, nbytes, number))

    def both(self, sizes: Both, grad: bool) -> None:
        """`streams` of something whose gradient may be wanted."""
        self.streams(sizes.forward, sizes.backward, launches=(sizes.forward_launches, sizes.backward_launches * grad))

    def multiplies(self, kind: str, flops: float, nbytes: float, width: int, *grads: bool, matrices: int = 1) -> None:
        """Notes a product and its derivatives."""
        own = self.ops[self.part]
        own.append(Op(FORWARD, kind, flops, nbytes, 1, matrices, width))
        if number := sum(grads):
            own.append(Op(BACKWARD, kind, flops * number, nbytes * number, number, matrices, width))

    @contextlib.contextmanager
    def within(self, module: str) -> Iterator[None]:
        """What counts in the block is of `module`; `@<what>` is what the part does outside of its modules."""
        before, self._module = self._module, f"{self.part}{module}" if module.startswith("@") else module
        yield
        self._module = before

    def count(self, flops: float, *grads: bool) -> None:
        """A product of `flops`, and its derivative by each operand that needs one."""
        self.work(flops, flops * sum(grads))

    def work(self, forward: float, backward: float = 0.0, again: float = 0.0, module: str = "") -> None:
        """FLOPs of `module`, or of the one that the walk is in."""
        self.forward[self.part] += forward
        self.backward[self.part] += backward
        self.again[self.part] += again
        self.products[self.part].append(Product(module or self._module or self.part, forward, backward, again))
