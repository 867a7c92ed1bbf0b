"""What a way to exchange gradients keeps on one rank: memories by parameter name, and the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from llmsys.compress import methods
from llmsys.compress.config import CompressConfig
from llmsys.compress.memory import Memory
from llmsys.compress.methods.method import Entry, Part, Sent
from llmsys.compress.transfer import Group, Transfer, plain


class CompressionState:
    """The state of one rank. `step` counts synchronised backward passes.

    `loss_scale`: what gives the factor by which losses are multiplied at present (`GradScaler.get_scale`): what is kept
    of gradients is rescaled when it changes. None where losses are as they are.
    """

    def __init__(
        self,
        config: CompressConfig,
        *,
        group: Group = None,
        loss_scale: Callable[[], float] | None = None,
    ) -> None:
        self.config, self.group, self.loss_scale = config, group, loss_scale
        there = dist.is_initialized()
        self.rank, self.world = (dist.get_rank(group), dist.get_world_size(group)) if there else (0, 1)
        self.method = methods.method(config)
        self.step = 0
        self.memories: dict[str, Memory] = {}
        self._scale: float | None = None
        self._sent: list[tuple[Sent, _Flag]] = []

    def memory(self, name: str) -> Memory:
        if name not in self.memories:
            self.memories[name] = Memory(name)
        return self.memories[name]

    def begin(self) -> None:
        """Before a step's first bucket. A step of which one part was not finite has been left out by whoever applies
        gradients (GradScaler, our trainer): what it sent goes back into the memory, on every rank alike."""
        with plain():
            if any(not flag.finite() for _, flag in self._sent):
                for sent, _ in self._sent:
                    sent.restore()
            self._sent.clear()
            if self.loss_scale is not None:
                self._rescale(self.loss_scale())

    def start(self, names: Sequence[str], grads: Sequence[Tensor], flat: Tensor) -> Transfer:
        """Starts to exchange `grads`, which are views into `flat` and change in place when it ends (`end`)."""
        entries = [Entry(name, grad, self.memory(name)) for name, grad in zip(names, grads, strict=True)]
        part = Part(entries, flat, self.rank, self.world, self.step)
        return Transfer(self.method.exchange(part), self.group, self.world)

    def end(self, transfer: Transfer) -> None:
        """Notes how a transfer that is over has ended."""
        assert transfer.sent is not None, "it is not over"
        self._sent.append((transfer.sent, _Flag(transfer.sent.finite)))

    def advance(self) -> None:
        """After a step's last bucket was started."""
        self.step += 1

    def _rescale(self, scale: float) -> None:
        if self._scale is not None and self._scale != scale:
            for error in self.errors():
                error.mul_(scale / self._scale)
        self._scale = scale

    def errors(self) -> Iterable[Tensor]:
        return [memory.error for memory in self.memories.values() if memory.error is not None]


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
