"""`task.pace`: at whose speed a replayed model's passes go. Known before ranks start, so a wrong one costs nothing."""

from __future__ import annotations

from llmsys import schema
from llmsys.cost import hardware


def flops_per_s(task: schema.Replay, device: str) -> float | None:
    """Of `task.pace`; None for `none`. ValueError for a device or a precision that there is not, and where the ranks
    are not on a CPU: a GPU runs behind its hooks."""
    if task.pace == "none":
        return None
    if task.pace not in hardware.DEVICES:
        raise ValueError(f"task.pace={task.pace}: must be none or one of {', '.join(hardware.DEVICES)}")
    if device == "cuda":
        raise ValueError(f"task.pace={task.pace}: is for ranks on a CPU: hardware.device=cpu, or task.pace=none")
    paced = hardware.DEVICES[task.pace]
    if task.precision not in paced.tflops:
        raise ValueError(f"task.precision={task.precision}: {paced.title} has only {', '.join(paced.tflops)}")
    return paced.peak(task.precision) * task.efficiency
