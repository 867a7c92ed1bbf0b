"""Gradient compression under DistributedDataParallel: a communication hook.

    model = DistributedDataParallel(model)
    state = register(model, CompressConfig(method="acpsgd", r=4))

DDP hands over a bucket of gradients as soon as the backward pass has made them (wait-free back-propagation), and cuts
buckets by the size of what is compressed, so there are as many messages as without compression (the paper's scaled
tensor fusion). A bucket is one buffer and one collective.

Methods of one round decompress in the callback of their collective, which neither waits nor starts anything. Those of
two (Power-SGD, Sign-SGD) start the second rounds of all buckets in order, when the last bucket has come.

With `find_unused_parameters` or `static_graph` DDP leaves `.grad` of a parameter that no rank has used as it is,
whatever the hook returns for it. Which these are only DDP knows, and only at the end of the pass: so it is seen then,
when DDP is through, and what was sent for them goes back.
"""
# No `from __future__ import annotations`: DDP compares the hook's annotations with the classes themselves.

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from llmsys.compress.agreement import check_equal
from llmsys.compress.config import CompressConfig
from llmsys.compress.scale import ReadAhead
from llmsys.compress.state import CompressionState, uncompiled
from llmsys.compress.transfer import Transfer


class HookState(CompressionState):
    """What `compress_hook` needs beside: the parameters' names, and what the step's earlier buckets wait for.

    `group`: DDP's own, None for the default one; `register` sees to it, where a strategy makes DDP it has to be given.
    """

    def __init__(
        self,
        config: CompressConfig,
        model: nn.Module,
        *,
        group: Any = None,
        loss_scale: Callable[[], float] | None = None,
    ) -> None:
        named = {uncompiled(name): p for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(config, named.items(), group=group, loss_scale=loss_scale)
        self.names: dict[Tensor, str] = {p: name for name, p in named.items()}
        self.checked = False
        self.waiting: list[tuple[Transfer, Tensor, Future[Tensor]]] = []
        self.before: list[tuple[Tensor, Tensor | None, int]] = []

    def note_grads(self, parameters: Sequence[Tensor], flat: Tensor) -> None:
        """How gradients are before DDP is told of their means. Those that are a bucket's own memory are there alike on
        all ranks, and become the means with it."""
        own = flat.untyped_storage().data_ptr()
        for p in parameters:
            if p.grad is None:
                self.before.append((p, None, 0))
            elif p.grad.untyped_storage().data_ptr() != own:
                self.before.append((p, p.grad, p.grad._version))

    def compare_grads(self) -> None:
        """After DDP has put the means where they belong."""
        for p, grad, version in self.before:
            if p.grad is grad and (grad is None or grad._version == version):
                self.untouched(self.names[p])
        self.before.clear()

    def check(self, device: torch.device, wrong: str = "") -> None:
        """See `agreement`; collective, once."""
        if not self.checked:
            check_equal(self.described(), self.group, device, wrong)
            self.checked = True


def register(
    model: DistributedDataParallel, config: CompressConfig, *, loss_scale: Callable[[], float] | None = None
) -> CompressionState:
    """Has `model` exchange its gradients by `config` from now on. Collective.

    `loss_scale`: see `CompressionState`. ValueError on every rank where configs or models differ, where gradients are
    sparse, and for a model that is not wrapped.
    """
    if not isinstance(model, DistributedDataParallel):
        raise ValueError(f"register: {type(model).__name__} is not wrapped in DistributedDataParallel; run it on ranks")
    module = model.module
    sparse = [
        name
        for name, part in module.named_modules()
        if getattr(part, "sparse", False) and isinstance(part, nn.Embedding | nn.EmbeddingBag)
    ]
    wrong = f"{sparse[0]}: sparse gradients cannot be compressed; make it with sparse=False" if sparse else ""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    state = HookState(config, module, group=model.process_group, loss_scale=loss_scale)
    state.check(trained[0][1].device, wrong)
    model.register_comm_hook(state, compress_hook)
    if loss_scale is not None:
        state.loss_scale = ReadAhead(loss_scale, model)
    return state


def compress_hook(state: HookState, bucket: dist.GradBucket) -> Future[Tensor]:
    """The hook itself, for what takes a `HookState` and a hook: DDP's `register_comm_hook`, Lightning's strategy."""
    flat = bucket.buffer()
    state.check(flat.device)
    if bucket.index() == 0:
        state.waiting.clear()  # of a backward pass that was broken off
        state.before.clear()
        state.begin()
    state.note_grads(bucket.parameters(), flat)
    names = [state.names[parameter] for parameter in bucket.parameters()]
    transfer = state.start(names, bucket.gradients(), flat)
    if bucket.is_last():
        state.advance()
        # DDP has its own callback called next, and this one's after that
        _at_the_end(lambda: _at_the_end(state.compare_grads))
    if state.method.rounds == 1:
        return transfer.future.then(lambda arrived: _decompress(state, transfer, flat, arrived))
    mine: Future[Tensor] = Future(devices=[flat.device] if flat.is_cuda else [])
    state.waiting.append((transfer, flat, mine))
    if bucket.is_last():
        _second_rounds(state)
    return mine


_at_the_end: Callable[[Callable[[], None]], None] = torch.autograd.Variable._execution_engine.queue_callback
"""Has something called when the backward pass that is going on has ended."""


def _decompress(state: HookState, transfer: Transfer, flat: Tensor, arrived: Future[Any]) -> Tensor:
    arrived.value()  # raises what went wrong on the way
    more = transfer.advance()
    assert not more, "a callback starts nothing"
    state.end(transfer)
    return flat


def _second_rounds(state: HookState) -> None:
    """Waits for the first rounds in the order of the buckets, starting each one's second; all ranks in that order."""
    waiting = list(state.waiting)
    state.waiting.clear()
    for transfer, flat, mine in waiting:
        transfer.future.wait()
        if transfer.advance():
            transfer.future.add_done_callback(functools.partial(_complete, state, transfer, flat, mine))
        else:  # nothing in it that needs a second
            state.end(transfer)
            mine.set_result(flat)


def _complete(state: HookState, transfer: Transfer, flat: Tensor, mine: Future[Tensor], arrived: Future[Any]) -> None:
    try:
        mine.set_result(_decompress(state, transfer, flat, arrived))
    except Exception as error:  # noqa: BLE001 - a callback's exception goes nowhere: the one who waits has to have it
        mine.set_exception(error)  # type: ignore[arg-type]
