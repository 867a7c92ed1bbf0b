"""Where memory goes: bytes that autograd saves, bytes that can be accounted for, and the peak that was seen.

Peak RSS of a CPU run is mostly libraries and the allocator's habits; what a method and an engine really change is

    accounted = weights + gradients + optimizer state (+ fp32 master weights) + tensors saved for the backward pass

of one rank, so that sum is what tables compare, and the peak stands beside it. The saved tensors are counted in one
probe forward, outside the timed steps, by autograd's pack hooks: every storage once, parameters and buffers left out
(they are held anyway). Under recomputation the blocks' own tensors never reach the hooks, but the blocks' inputs are
kept alive by a closure: they are counted by a hook on those blocks. What a rank holds otherwise is for its engine to
say, as lists of real tensors; `held_locally` says it for a model that no engine has cut.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

GIB = 2**30


def saved_tensors(
    model: nn.Module, forward: Callable[[], Tensor], noted: Callable[[Tensor], None] = lambda _: None
) -> int:
    """Bytes that `forward` (a training forward of `model` that returns the loss) keeps for the backward pass.

    `noted` is told each tensor that counts, while the forward pass is where it is saved, and again where another
    operator saves it too. Leaves the model, its gradients and torch's random streams as they were; no backward pass is
    run.
    """
    device = next(model.parameters()).device
    modules = list(model.modules())
    seen: dict[tuple[str, int], int] = {}
    alive: list[Tensor] = []

    def own() -> set[int]:
        # Read anew each time: engines that gather parameters on demand (ZeRO-3, FSDP2) move them during the forward.
        weights = (each for module in modules for each in _weights(module))
        return {plain.untyped_storage().data_ptr() for weight in weights for plain in unwrapped(weight)}

    def note(tensor: Tensor) -> None:
        for plain in unwrapped(tensor.detach()):
            storage = plain.untyped_storage()
            place = str(plain.device), storage.data_ptr()
            if place not in seen:
                if storage.data_ptr() in own():
                    continue
                seen[place] = storage.nbytes()
                alive.append(plain)  # an address must not be handed out again while we count
            noted(plain)

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


def _weights(module: nn.Module) -> Iterator[Tensor]:
    """A module's own: of all of them at once torch makes names too, which takes ten times as long."""
    for each in (*module._parameters.values(), *module._buffers.values()):
        if each is not None:
            yield each


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


def unwrapped(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with memory of their own on this rank: a DTensor's local shard, a collective's result, or itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for part in (getattr(tensor, name) for name in names):
        if isinstance(part, Tensor):  # a DTensor also names its mesh
            yield from unwrapped(part)


def held_locally(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """What this rank holds of a model and its optimizer where the engine adds nothing of its own, by kind.

    Weights are all parameters and buffers, frozen ones too. Gradients are one for each trained parameter, in its dtype,
    as meta tensors: between steps there are none, and a step has them all. Of a DTensor the local shard counts.
    """
    own = (*model.parameters(), *model.buffers())
    trained = [plain for p in model.parameters() if p.requires_grad for plain in unwrapped(p.detach())]
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return {
        "weights": [plain for weight in own for plain in unwrapped(weight.detach())],
        "gradients": [torch.empty_like(plain, device="meta") for plain in trained],
        "optimizer": [plain for value in state for plain in unwrapped(value.detach())],
    }


def accounted(held: dict[str, list[Tensor]], saved_bytes: int) -> dict[str, int]:
    """`<kind>_bytes` of each kind in `held`, `saved_bytes`, and their sum, `accounted_bytes`.

    Each storage counts once and whole, for the first kind that has it; a meta tensor for its elements.
    """
    parts, seen = {}, set[tuple[str, int]]()
    for kind, tensors in held.items():
        parts[f"{kind}_bytes"] = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = (str(tensor.device), storage.data_ptr())
            if tensor.is_meta:
                parts[f"{kind}_bytes"] += num_bytes(tensor)
            elif key not in seen:
                seen.add(key)
                parts[f"{kind}_bytes"] += storage.nbytes()
    parts["saved_bytes"] = saved_bytes
    return {**parts, "accounted_bytes": sum(parts.values())}


class Peak:
    """The highest memory use of the training steps alone: `pause` around evaluation and checkpoints.

    CUDA: allocated and reserved by torch's allocator, and what the driver says is in use on the device, with the CUDA
    context, libraries' own memory and other processes. It is asked at `pause`, and what the allocator had reserved at
    its peak and has given back since is added. What loading left in the allocator's cache is given back at the first
    `resume`, or it would stand in both. `alloc_retries`: how often, since then, the allocator had to empty its cache
    and ask again; where that is not 0, times are of a run short of memory. Host: VmHWM, the kernel's high-water mark of
    the resident set, reset at each `resume`. Where the kernel does not allow the reset, it is the whole process's mark
    (`ru_maxrss`), model loading included, and `host_peak_reset` is 0.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._highest: dict[str, float] = {}
        self._reset = True
        self._retries: int | None = None

    def resume(self) -> None:
        """From here on memory counts."""
        if self.device.type == "cuda":
            if self._retries is None:
                torch.cuda.empty_cache()
                self._retries = self._all_retries()
            torch.cuda.reset_peak_memory_stats(self.device)
        self._reset = reset_host_peak() and self._reset

    def pause(self) -> None:
        """What is used from here on, until `resume`, does not count."""
        now = {"host_peak_gib": (host_peak_bytes() if self._reset else maxrss_bytes()) / GIB}
        if self.device.type == "cuda":
            now["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
            reserved = torch.cuda.max_memory_reserved(self.device)
            free, total = torch.cuda.mem_get_info(self.device)
            now["reserved_gib"] = reserved / GIB
            now["device_gib"] = (total - free + reserved - torch.cuda.memory_reserved(self.device)) / GIB
            now["alloc_retries"] = self._all_retries() - (self._retries or 0)
        for key, value in now.items():
            self._highest[key] = max(value, self._highest.get(key, 0.0))

    def _all_retries(self) -> int:
        """Of this process's life; no reset takes them back."""
        return int(torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0))

    @property
    def summary(self) -> dict[str, float]:
        """`host_peak_gib`, whether the host's mark could be reset, and on CUDA `peak_gib`, `reserved_gib`, `device_gib`
        and `alloc_retries`."""
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
