"""Predict, from a config alone, what a run will need: bytes (`memory`) and arithmetic (`flops`). Imports no torch."""

from llmsys.cost.flops import step_flops
from llmsys.cost.memory import estimate, num_params, peak_bytes

__all__ = ["estimate", "num_params", "peak_bytes", "step_flops"]
