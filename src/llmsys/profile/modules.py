"""How long each module of a model takes in a training step, forward and backward, as boundaries between modules say it.

    spans = ModuleSpans(model, device)
    with spans.attached(), spans.step():
        with spans("forward"): ...          as with `Spans`
        with spans("backward"): ...
    spans.rows()                            row -> forward, backward, recompute -> ms of each step

The step is one line of time, cut wherever it passes from one part to another; each piece belongs to the part that began
it. So nothing counts twice, and all pieces together are the step. What belongs to no module and to no phase (`data`,
`agreement`, `communication`, `optimizer`) is `unattributed`. A cut is an event in the stream on CUDA, `perf_counter` on
a CPU; no kernel's name is looked at.

Forward: a module's hooks, around its call. A module inside another has its time alone; the other has what it does
itself. What lies between the projections of attention is no module: transformers looks its function up by name
(`ALL_ATTENTION_FUNCTIONS`), and is given that function with a span around it. Eager attention is told apart in three by
the calls of softmax and of the product behind it, which a function mode sees (`parts.Steps`). The function itself is
the family's own: nothing is computed in another way.

Backward: nothing is added to the graph, or gradients that meet would be summed in another order, with other bits.
Autograd runs the node that was made last first, of those that are ready. A hook before the last node of a module (that
of its output) is where its backward pass begins. It ends where a hook stands before a node that lies around it: the one
that made its input, whether that is the last one of the module before, or of the module around it. That node is made
before all of the module's own, so these are done by then, the accumulation of its weights' gradients among them (such
nodes come first of all). The errors:

- What is made between two modules and has no hook is the later module's, in the order of the backward pass: of
  attention, the copies of the gradients of query and key that their projections need are `qkv`'s.
- A gradient that several consumers contribute to is added up when each arrives, which is the consumer's time.
- A module whose input needs no gradient (the first of a model; the first block's, where the embedding is frozen) has
  nothing before it: its backward pass ends where the next begins, or the graph ends (a callback of the engine).
- A gradient that DDP copies into its bucket and sends counts where it is ready, in its module; waiting for the last
  bucket is behind the graph's end, and is `tail`'s.
- Each cut costs one to three microseconds on the host, half of them within the part that ends there.

Recomputation (`train.recompute=block`): a checkpointed block runs forward again in the middle of its backward pass, up
to the last tensor that this reads. A forward pass that begins while autograd runs is `recompute`, of the module
whose it is; then the part that was interrupted goes on.

What calls no modules has no spans within: `method=lora` and `lorafa` run the blocks of known families as chains of
fused functions, and their blocks are a row of their own, `block`, beside attention's function and the rotation before
it. What they compute again is part of their backward pass.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.profile.parts import Owner, Part, Steps, find
from llmsys.profile.spans import Mark, Spans, milliseconds
from llmsys.profile.taxonomy import BACKWARD, FORWARD, PHASES, REST

_MARK = "_llmsys_boundary"
"""On a tensor whose node has its hook."""


class ModuleSpans(Spans):
    """`Spans` with a span for each module of `model` while `attached`. `tail` is the row of what the backward pass does
    behind its graph: under DDP waiting for gradients, `communication`; else nothing, `unattributed`."""

    def __init__(self, model: nn.Module, device: torch.device, warmup: int = 0, tail: str = REST) -> None:
        super().__init__(device, warmup)
        self.model = model
        self._found = find(model)
        rest = Part(REST)
        self._rest: Owner = (rest, "")
        parts = {name: Part(name) for name in PHASES}
        self._phases: dict[str, Owner] = {name: (part, "") for name, part in parts.items()}
        self._phases |= {FORWARD: rest.forward, BACKWARD: rest.backward}
        self._tail: Owner = rest.backward if tail == REST else (parts[tail], BACKWARD)
        self._loss, self._fused = Part("loss"), [Part("attention")]
        self._steps = [Part(name) for name in ("scores", "softmax", "context")]
        self._owner, self._headed, self._ends = self._rest, False, False
        self._stack: list[Owner] = []
        self._line: list[tuple[Mark, Owner]] = []
        self._unread_line: list[tuple[Mark, Owner]] = []
        self._cuda, self._spare = device.type == "cuda", list[Any]()
        self._read_steps: list[dict[tuple[str, str], float]] = []
        self.cuts = 0
        """Of the last step."""

    # -- the line of time -------------------------------------------------------------------------------------------

    @property
    def open(self) -> tuple[str, str]:
        """(row, kind) to which time goes now."""
        part, kind = self._owner
        return part.row, kind

    def _mark(self) -> Mark:
        if self._spare:
            event = self._spare.pop()
            event.record()
            return event
        return super()._mark()

    def _cut(self, owner: Owner) -> None:
        """From here on time is `owner`'s."""
        self._owner = owner
        self._line.append((self._mark() if self._cuda else time.perf_counter(), owner))

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """As `Spans`; beside it the phase's row, or in the two passes the rows of modules, get the time."""
        if name not in self._phases:
            with super().__call__(name):
                yield
            return
        before = self._owner
        self._ends = name == BACKWARD
        self._cut(self._phases[name])
        with super().__call__(name):
            yield
        self._cut(before)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        self._line, self._stack, self._headed = [], [], False
        with super().step():
            self._cut(self._rest)
            yield
            self._cut(self._rest)
        self.cuts = len(self._line)
        if self.steps > self.warmup:
            self._unread_line = self._line

    def _read(self) -> None:
        super()._read()
        if not self._unread_line:
            return
        sums: dict[tuple[str, str], float] = {}
        for (start, (part, kind)), (end, _) in pairwise(self._unread_line):
            key = part.row, kind
            sums[key] = sums.get(key, 0.0) + milliseconds(start, end)
        self._read_steps.append(sums)
        if self._cuda:
            self._spare = [mark for mark, _ in self._unread_line]
        self._unread_line = []

    def rows(self) -> dict[str, dict[str, list[float]]]:
        """Row -> kind -> ms of every step that was counted; what lies outside both passes has no kind (empty).
        `unattributed` is what is left of the step's own time, so all values of a step together are that."""
        self._read()
        steps = self._samples.get("step", [])
        assert len(steps) == len(self._read_steps)
        rest = REST, ""
        found: dict[str, dict[str, list[float]]] = {}
        for row, kind in dict.fromkeys(key for sums in self._read_steps for key in sums if key != rest):
            found.setdefault(row, {})[kind] = [sums.get((row, kind), 0.0) for sums in self._read_steps]
        known = [sum(ms for key, ms in sums.items() if key != rest) for sums in self._read_steps]
        found.setdefault(REST, {})[""] = [ms - named for ms, named in zip(steps, known, strict=True)]
        return found

    # -- boundaries -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block the model's modules have their spans. Leaves the model, and transformers, as they were."""
        handles: list[Any] = []
        with contextlib.ExitStack() as undo:
            for module, part in self._found:
                handles.append(module.register_forward_pre_hook(self._entering(part), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leaving(part)))
                if getattr(module, "gradient_checkpointing", False) and "_gradient_checkpointing_func" in vars(module):
                    undo.enter_context(self._checkpoints(module, part))
            if "transformers" in sys.modules:
                undo.enter_context(self._attention())
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _entering(self, part: Part) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._owner[0] is not part:  # which a checkpointed block is: transformers 5.17 runs its hooks again
                self._owner[0].calls_modules = True
            before = self._enter(part)
            self._boundary(args[0] if args else next(iter(kwargs.values()), None), before)

        return hook

    def _leaving(self, part: Part) -> Callable[..., None]:
        root, head = not part.name, part.row.startswith("logits")

        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._leave(self._loss if root and self._headed else part, output)
            if head:  # what the model does from here on is the loss
                self._cut((self._loss, self._owner[1]))
            self._headed = head

        return hook

    def _enter(self, part: Part) -> Part:
        """Passes to `part`; returns the part around it."""
        self._stack.append(self._owner)
        self._cut(part.forward if torch._C._current_graph_task_id() == -1 else part.recompute)
        return self._stack[-1][0]

    def _leave(self, part: Part, output: Any) -> None:
        """Passes back to what `part` was entered from."""
        self._boundary(_first(output), part)
        self._cut(self._stack.pop())

    def _boundary(self, x: Any, part: Part) -> None:
        """The backward pass comes to `part` where it comes to the node that made x; unless that is known to be of
        another: of an inner module, whose output is the outer one's too, or of the module before."""
        node = x.grad_fn if isinstance(x, Tensor) else None
        if node is None or hasattr(x, _MARK):
            return
        node.register_prehook(self._into(part.backward))
        setattr(x, _MARK, True)

    def _into(self, owner: Owner) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self._ends:
                self._ends = False
                torch.autograd.Variable._execution_engine.queue_callback(self._end)
            self._cut(owner)

        return hook

    def _end(self) -> None:
        """The graph is done."""
        self._cut(self._tail)

    @contextlib.contextmanager
    def _checkpoints(self, module: Any, part: Part) -> Iterator[None]:
        """Within the block, what `module` computes again is its own, also where it stops half-way, by an exception."""
        original = module._gradient_checkpointing_func

        def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def again(*inputs: Any, **named: Any) -> Any:
                if torch._C._current_graph_task_id() == -1:
                    return function(*inputs, **named)
                before, depth = self._owner, len(self._stack)
                self._cut(part.recompute)
                try:
                    return function(*inputs, **named)
                finally:
                    del self._stack[depth:]
                    self._cut(before)

            return original(again, *args, **kwargs)

        module._gradient_checkpointing_func = checkpoint
        try:
            yield
        finally:
            module._gradient_checkpointing_func = original

    @contextlib.contextmanager
    def _attention(self) -> Iterator[None]:
        """Within the block, attention functions that transformers looks up have spans."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        original = ALL_ATTENTION_FUNCTIONS.get_interface

        def get_interface(name: str, default: Callable[..., Any]) -> Callable[..., Any]:
            parts = self._steps if name == "eager" else self._fused
            return functools.partial(self._attend, original(name, default), parts)

        ALL_ATTENTION_FUNCTIONS.get_interface = get_interface
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS.get_interface

    def _attend(
        self, function: Callable[..., Any], parts: Sequence[Part], module: Any, *args: Any, **named: Any
    ) -> Any:
        before = self._enter(parts[0])
        for x in args:  # query, key and value, each made by what lies before
            self._boundary(x, before)

        def passed(step: int, x: Any) -> None:
            self._cut((parts[step + 1], self._owner[1]))
            self._boundary(x, parts[step])

        with Steps(passed) if len(parts) > 1 else contextlib.nullcontext():
            output = function(module, *args, **named)
        self._leave(self._owner[0], output)
        return output


def _first(output: Any) -> Tensor | None:
    """The first tensor with a node in the graph."""
    if isinstance(output, Tensor):
        return output if output.grad_fn is not None else None
    if getattr(output, "loss", None) is not None:  # of a whole model; what was put there later is no item
        return _first(output.loss)
    if isinstance(output, dict):
        return _first(tuple(output.values()))
    if isinstance(output, (tuple, list)):
        return next((x for x in map(_first, output) if x is not None), None)
    return None
