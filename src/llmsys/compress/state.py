"""What a way to exchange gradients keeps on one rank: memories by parameter name, and the step."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmsys.compress import drift, methods
from llmsys.compress.config import CompressConfig
from llmsys.compress.memory import Memory
from llmsys.compress.methods.method import Entry, Exchange, Part, Sent, Taken
from llmsys.compress.transfer import Group, Transfer, without_graph
from llmsys.cost.compressed import matrix


def uncompiled(name: str) -> str:
    """A parameter's name in the model that `torch.compile` was given."""
    return name.replace("_orig_mod.", "")


class CompressionState:
    """The state of one rank. `step` counts the steps that were not left out. `named`: the parameters by name.

    `loss_scale`: what gives the factor by which losses are multiplied at present (`GradScaler.get_scale`): what is kept
    of gradients is rescaled when it changes, also over a resume. None where losses are as they are, which is 1.
    """

    def __init__(
        self,
        config: CompressConfig,
        named: Iterable[tuple[str, Tensor]],
        *,
        group: Group = None,
        loss_scale: Callable[[], float] | None = None,
    ) -> None:
        self.config, self.group, self.loss_scale = config, group, loss_scale
        tensors = {uncompiled(name): tensor for name, tensor in named}
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        config.check_skips(self.shapes)
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        self.devices = {name: tensor.device for name, tensor in tensors.items()}
        self.method = methods.method(config)
        self.step = 0
        self.memories: dict[str, Memory] = {}
        self._scale = 1.0
        self._weights = tensors if config.check_every else {}
        self._sent: list[tuple[Sent, _Flag]] = []
        self._untouched: set[str] = set()
        self._began = 0

    def described(self) -> dict[str, str]:
        """What all ranks must have alike (`agreement`)."""
        model = "\n".join(f"{name} {tuple(shape)} {self.dtypes[name]}" for name, shape in self.shapes.items())
        return {
            "config": json.dumps(dataclasses.asdict(self.config), sort_keys=True, default=list),
            "model (names, shapes or types of parameters)": model,
            "loss_scale (given or not)": str(self.loss_scale is not None),
        }

    @functools.cached_property
    def rank(self) -> int:
        """Of this process in the group, which need not be there when the state is made."""
        return dist.get_rank(self.group) if dist.is_initialized() else 0

    @functools.cached_property
    def world(self) -> int:
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    def memory(self, name: str) -> Memory:
        if name not in self.memories:
            self.memories[name] = Memory(name)
        return self.memories[name]

    def begin(self) -> None:
        """Before a step's first bucket.

        A step of which one part was not finite has been left out by whoever applies gradients (GradScaler, our
        trainer). Then it has never been, on every rank alike: `step` does not count it, and memories are what they
        were, but for rounding. Only in the buckets of a hook that have arrived finite, whose gradients nobody has any
        more, it is applied late: what was sent of them goes back, and they are part of what is sent next. What was
        sent for parameters whose gradients nobody has touched (`untouched`) goes back too.
        """
        self._settle()
        if self.config.checks(self.step) and self.drifted():
            raise ValueError(f"compress: the ranks do not have the same weights before step {self.step}; {drift.WHY}")
        self._began = self.step
        self._rescale(1.0 if self.loss_scale is None else self.loss_scale())

    def _settle(self, grads: Mapping[str, Tensor] | None = None) -> None:
        """See `begin`. `grads`: the step's own gradients, where they are still there."""
        if not self._sent:
            return
        with without_graph():
            left_out = self.left_out()
            if left_out:
                self.step = self._began
            for sent, _ in self._sent:
                undone = left_out and not bool(sent.arrived)
                for taken in sent.taken:
                    if left_out or taken.entry.name in self._untouched:
                        if not undone:
                            _return(taken, grads)
                        taken.entry.memory.mend()
                    else:
                        taken.commit()
        self._sent.clear()
        self._untouched.clear()

    def left_out(self) -> bool:
        """Whether a part of the step that has just been exchanged was not finite; alike on all ranks."""
        return any(not flag.finite() for _, flag in self._sent)

    def start(self, names: Sequence[str], grads: Sequence[Tensor], flat: Tensor) -> Transfer:
        """Starts to exchange `grads`, which are views into `flat` and change in place when it ends (`end`). One without
        elements, FSDP2's shard of a parameter of few rows, has nothing to exchange; nor has a bucket of such alone."""
        pairs = zip(names, grads, strict=True)
        entries = [Entry(name, grad, self.memory(name)) for name, grad in pairs if grad.numel()]
        part = Part(entries, flat, self.rank, self.world, self.step)
        return Transfer(self.method.exchange(part) if entries else _no_exchange(), self.group, self.world)

    def end(self, transfer: Transfer) -> None:
        """A transfer is over."""
        assert transfer.sent is not None, "it is not over"
        self.note(transfer.sent)
        for taken in transfer.sent.taken:  # DDP makes new buckets after the first step: the old ones are not kept
            taken.entry.grad = taken.entry.grad.new_empty(0)

    def note(self, sent: Sent) -> None:
        """Keeps how an exchange of this step has ended until it is known whether the step was left out."""
        self._sent.append((sent, _Flag(sent.finite)))

    def untouched(self, name: str) -> None:
        """The mean for this parameter was thrown away, on all ranks."""
        self._untouched.add(name)

    def advance(self) -> None:
        """After a step's last bucket was started."""
        self.step += 1

    def drifted(self) -> bool:
        """Whether weights, or what is kept that all ranks have alike, are not the same on all. Collective."""
        kept = {f"{name}/{kind}": t for name, memory in self.memories.items() for kind, t in memory.tensors().items()}
        factors = {key: tensor for key, tensor in kept.items() if not key.endswith("/error")}
        return drift.apart({**self._weights, **factors}, self.group)

    def tensors(self) -> dict[str, Tensor]:
        """What this rank keeps, as `<parameter>/error`, `/p` and `/q`: references."""
        self._settle()
        return {f"{name}/{kind}": t for name, memory in self.memories.items() for kind, t in memory.tensors().items()}

    def plain(self) -> dict[str, Any]:
        """What it keeps beside tensors."""
        self._settle()
        return {"step": self.step, "loss_scale": self._scale}

    def load(self, states: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> None:
        """Goes on from what `tensors` and `plain` gave on each of the ranks that were there, in order.

        On as many ranks each takes its own, to the bit. On another number each takes the mean of all errors: for linear
        methods what all send together depends on that mean alone, so the averaged trajectory is kept exactly; for the
        others (Top-k, scaled sign) nearly. Another method, or another r, may go on with the errors of the one before;
        where it keeps none, they are added to the next gradient.
        ValueError for parameters that this model has not, or in other shapes.
        """
        alike = len(states) == self.world
        values = states[self.rank if alike else 0][1]
        memories: dict[str, Memory] = {}
        for key, tensor in states[self.rank][0].items() if alike else _merged(states):
            name, _, kind = uncompiled(key).rpartition("/")
            self._check(name, kind, tensor)
            setattr(memories.setdefault(name, Memory(name)), kind, tensor.to(self.devices[name], copy=True))
        self.memories, self._sent, self._untouched = memories, [], set()
        self.step, self._scale = int(values["step"]), float(values["loss_scale"] or 1.0)  # None in older states

    def _check(self, name: str, kind: str, tensor: Tensor) -> None:
        if name not in self.shapes:
            raise ValueError(f"compress: the saved state is of another model; this one has no parameter {name}")
        shape, found = tuple(self.shapes[name]), tuple(tensor.shape)
        if kind == "error" and found != shape:
            raise ValueError(f"compress: {name} has the shape {shape}, in the saved state {found}")
        sides = dict(zip(("p", "q"), matrix(shape), strict=True))
        if kind in sides and found[1:] != (sides[kind],):
            raise ValueError(f"compress: {name} has the shape {shape}, its factor {kind} in the saved state {found}")

    def _rescale(self, scale: float) -> None:
        if self._scale != scale:
            for memory in self.memories.values():
                if memory.error is not None:
                    memory.error.mul_(scale / self._scale)
                    memory.mend()  # half precision may overflow
        self._scale = scale


def _merged(states: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> Iterator[tuple[str, Tensor]]:
    """The mean of the ranks' errors, where one has none 0, and the factors, which all ranks have alike; one by one, as
    all ranks' errors are as many copies of the gradients."""
    for key in dict.fromkeys(key for tensors, _ in states for key in tensors):
        there = (tensors[key] for tensors, _ in states if key in tensors)
        yield key, _mean(there, len(states)) if key.endswith("/error") else next(there)


def _mean(tensors: Iterator[Tensor], count: int) -> Tensor:
    """Their sum over `count`, in fp64, rounded to their own type."""
    first = next(tensors)
    dtype, total = first.dtype, first.to(torch.float64, copy=True)
    del first
    for tensor in tensors:
        total += tensor
    return (total / count).to(dtype)


def _return(taken: Taken, grads: Mapping[str, Tensor] | None) -> None:
    if grads is None:
        taken.give_back(1.0)
    else:
        grad = grads[taken.entry.name]
        taken.undo(grad.new_ones(()), grad)


def _no_exchange() -> Exchange:
    yes = torch.ones((), dtype=torch.bool)
    return Sent(yes, yes)
    yield  # which makes it a generator


class _Flag:
    """A flag of the device that is read later: copied to the host at once, so that reading waits for no other work."""

    def __init__(self, flag: Tensor) -> None:
        self._event = None
        if flag.is_cuda:
            self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._host.copy_(flag, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = flag

    def finite(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._host)
