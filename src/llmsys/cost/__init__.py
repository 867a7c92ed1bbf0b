"""Predict, from a config alone, what a run will need: bytes (`memory`) and arithmetic (`flops`). Imports no torch."""

from llmsys.cost.case import Case
from llmsys.cost.flops import step_flops
from llmsys.cost.memory import estimate, peak_bytes
from llmsys.cost.shapes import num_params, trainable_params

__all__ = ["Case", "estimate", "num_params", "peak_bytes", "step_flops", "trainable_params"]
