"""Where memory goes: bytes that autograd saves, bytes that can be accounted for, and the peak that was seen.

Peak RSS of a CPU run is mostly libraries and the allocator's habits; what a method really changes is

    accounted = weights + gradients + optimizer state + tensors saved for the backward pass

so that sum is what tables compare, and the peak stands beside it. The saved tensors are counted in one probe forward,
outside the timed steps, by autograd's pack hooks: every storage once, parameters and buffers left out (they are held
anyway). Under recomputation the blocks' own tensors never reach the hooks, but the blocks' inputs are kept alive by a
closure: they are counted by a hook on those blocks.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GIB = 2**30


def saved_tensors(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that `forward` (a training forward of `model` that returns the loss) keeps for the backward pass.

    Leaves the model, its gradients and torch's random streams as they were; no backward pass is run.
    """
    device = next(model.parameters()).device
    seen: dict[tuple[str, int], int] = {}
    alive: list[Tensor] = []

    def note(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # Read anew each time: an engine that gathers parameters on demand (ZeRO-3) moves them during the forward.
        if storage.data_ptr() not in _held(model):
            seen[str(tensor.device), storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())  # an address must not be handed out again while we count

    def pack(tensor: Tensor) -> Tensor:
        note(tensor)
        return tensor.detach()

    def note_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in _tensors((args, kwargs)):
            note(value)

    hooks = [
        module.register_forward_pre_hook(note_inputs, with_kwargs=True)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False) and _recomputes(module)
    ]
    training = model.training
    model.train()
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            forward()
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return sum(seen.values())


def _recomputes(module: nn.Module) -> bool:
    """Whether `module` is a block that is recomputed, not the model whose flag switches its blocks."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def _held(model: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in _weights(model)}


def _weights(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def num_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def accounted(model: nn.Module, optimizer: torch.optim.Optimizer, saved_bytes: int) -> dict[str, int]:
    """`weights_bytes, gradients_bytes, optimizer_bytes, saved_bytes` and their sum, `accounted_bytes`.

    Weights are all parameters and buffers, frozen ones too; gradients are one per trained parameter, in its dtype.
    """
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
    parts = {
        "weights_bytes": sum(num_bytes(t) for t in _weights(model)),
        "gradients_bytes": sum(num_bytes(p) for p in model.parameters() if p.requires_grad),
        "optimizer_bytes": sum(num_bytes(t) for t in state),
        "saved_bytes": saved_bytes,
    }
    return {**parts, "accounted_bytes": sum(parts.values())}


class Peak:
    """The highest memory use of the training steps alone: `pause` around evaluation and checkpoints.

    CUDA: allocated and reserved by torch's allocator. Host: VmHWM, the kernel's high-water mark of the resident set,
    reset at each `resume`. Where the kernel does not allow the reset, it is the whole process's mark (`ru_maxrss`),
    model loading included, and `host_peak_reset` is 0.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._highest: dict[str, float] = {}
        self._reset = True

    def resume(self) -> None:
        """From here on memory counts."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._reset = reset_host_peak() and self._reset

    def pause(self) -> None:
        """What is used from here on, until `resume`, does not count."""
        now = {"host_peak_gib": (host_peak_bytes() if self._reset else maxrss_bytes()) / GIB}
        if self.device.type == "cuda":
            now["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
            now["reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / GIB
        for key, value in now.items():
            self._highest[key] = max(value, self._highest.get(key, 0.0))

    @property
    def summary(self) -> dict[str, float]:
        """`host_peak_gib`, on CUDA `peak_gib` and `reserved_gib`, and whether the host's mark could be reset."""
        return {**self._highest, "host_peak_reset": int(self._reset)}


def reset_host_peak() -> bool:
    """Sets VmHWM back to the present resident set; False where the system has no such thing or forbids it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def host_peak_bytes() -> int:
    """VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def maxrss_bytes() -> int:
    """The largest resident set of this process's life (macOS gives bytes, Linux KiB)."""
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
