"""What a sweep asks of a prediction: how much memory a run will need. It orders and seeds; it decides nothing."""

from __future__ import annotations

from collections.abc import Callable

from llmsys import schema
from llmsys.cost import hardware, memory
from llmsys.dispatch import memory_limit
from llmsys.sweep.settings import Config

BARE_GIB = 0.45
"""What a rank's process holds on the host before the first tensor: Python, torch, transformers and a process group
(VmData of torch 2.13 on Linux, which `dispatch.memory_gib` limits). A prediction leaves it out."""


def peak_bytes(config: Config) -> int | None:
    """Predicted bytes of a rank's training step at its fullest; None where the task is not training, or no cost is
    known for what it trains, or `train.recompute=auto` would choose it by the memory there is."""
    if config["task"]["kind"] != "train" or config["train"]["recompute"] == "auto":
        return None
    try:
        typed = schema.build(config)
        import torch

        from llmsys.train import checks

        parts = (typed.model, typed.train, typed.method, typed.engine)
        return memory.peak_bytes(*parts, **checks.facts(typed, torch.device(typed.hardware.device)))
    except ValueError:  # no cost is known; or this combination cannot be, which is said elsewhere
        return None


def room_bytes(config: Config, total_gib: float) -> float:
    """What a rank has for tensors: the limit that is set on it (on a GPU none is), else the machine's by name or
    number, else its share of `total_gib`, the device's; of a host, which all ranks share, less what their processes
    hold anyway. `config` is resolved."""
    own, given = memory_limit.gib(config), config["hardware"]["mem_gib"]
    machine = hardware.named(schema.build(config).hardware)
    gib = own or given or (machine.mem_gib if machine else total_gib)
    host = config["hardware"]["device"] == "cpu" and not machine
    shared = config["train"]["world"] if host and not own else 1
    return max(0.0, float(gib) / shared - (BARE_GIB if host else 0.0)) * 2**30


def largest(needs: Callable[[int], int | None], room: float, limit: int) -> int:
    """The largest value in [1, limit] that is predicted to fit into `room` bytes: where a search begins. 1 where
    nothing is predicted, or not even that fits. `needs(value)` must not fall."""
    low, high = 1, 1
    while high < limit and _fits(needs(min(2 * high, limit)), room):
        high = min(2 * high, limit)
    low, high = high, min(2 * high, limit)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(needs(middle), room) else (low, middle)
    return low


def _fits(need: int | None, room: float) -> bool:
    return need is not None and need <= room
