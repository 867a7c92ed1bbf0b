"""How often ranks talk and how much they say, whoever makes them: our own calls, DDP, FSDP2, DTensor or DeepSpeed.

All of them end in operators of torch's dispatcher, where a mode sees each call with its tensors. The bytes of a call
are those of the whole tensor it is about, as NCCL's tests count them: the buffer that is reduced or broadcast, the
gathered result, the input that is scattered. What a rank sends over its link follows from the algorithm and the world
(`llmsys.cost.links`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmsys.comm import collectives

KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "send": "send",
    "recv_": "recv",
    "recv_any_source_": "recv",
}
"""Operator of c10d or _c10d_functional -> the collective's usual name; `barrier` and `wait_tensor` move no tensor."""


class Traffic(TorchDispatchMode):
    """Within the block, `calls` and `bytes` count collectives by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        result = func(*args, **(kwargs or {}))
        if namespace in ("c10d", "_c10d_functional") and name in KINDS:
            self.calls[KINDS[name]] += 1
            # The larger of what goes in and what comes out: the gathered result, the input that is scattered.
            self.bytes[KINDS[name]] += max(_bytes(args), _bytes(result))
        return result

    @property
    def summary(self) -> dict[str, float]:
        """`comm_<kind>_calls` and `comm_<kind>_bytes`, and `comm_bytes`, their sum. Nothing where there is one rank:
        what it tells itself (DDP does) is on no link."""
        if collectives.world() == 1:
            return {}
        calls = {f"comm_{kind}_calls": count for kind, count in self.calls.items()}
        sizes = {f"comm_{kind}_bytes": size for kind, size in self.bytes.items()}
        return {**calls, **sizes, "comm_bytes": sum(self.bytes.values())} if calls else {}


def _bytes(value: Any) -> int:
    """The largest argument's bytes; a list of tensors (coalesced, or one for each rank) counts as their sum."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        if all(isinstance(item, Tensor) for item in value):
            return sum(_bytes(item) for item in value)
        return max((_bytes(item) for item in value), default=0)
    return 0
