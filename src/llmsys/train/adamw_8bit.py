"""AdamW whose two moments are kept in 8 bits, by bitsandbytes' kernels (Dettmers et al., arXiv 2110.02861).

Each run of 256 elements of a moment is scaled by its largest magnitude and rounded to one of 256 values, dense around
zero. An update reads a run back in fp32, changes it as AdamW does, and rounds it again: 2 bytes and 1/32 for an element
where fp32 moments are 8. Tensors of fewer than 4096 elements keep fp32 moments, as the paper has it.

What this adds to bitsandbytes' own class is what the engines need:

- It updates what a rank has of a DTensor, with runs of that part.
- It does not wait for the device after each tensor.
- Its state is read and set as AdamW's, `exp_avg` and `exp_avg_sq` in fp32 (`unpacked`, `pack`). So checkpoints are
  those of any engine and optimizer; and where the runs are the same ones again, reading back gives the same bits.

Those bits need a word, as scales are not in a checkpoint. A value is code x scale, rounded to fp32; in every run that
this optimizer has rounded, the largest magnitude has one of the extreme codes, c: either +1, and the scale is the
value, or the most negative one, -0.993, and the scale is among the neighbours of value / c. Any scale by which all
values of the run come out again will do, since nothing else of a scale is ever read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes import functional as F
from torch import Tensor, nn

from llmsys.train.engines.local import local

RUN = 256
MOMENTS = {"exp_avg": "1", "exp_avg_sq": "2"}
"""AdamW's name of a moment -> the suffix of what bitsandbytes has of it: `state1`, `absmax1`, `qmap1`."""


class AdamW8bit(bnb.optim.AdamW8bit):
    """See the head of this file. The state of a parameter: `step` (int), and of each moment `state` (uint8, or fp32),
    `absmax` (the scales) and `qmap` (the 256 values, one tensor for all)."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient, in place."""
        assert closure is None, "no engine hands one over"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(group, parameter)
        return None

    def _update(self, group: dict[str, Any], parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        weight, gradient = local(parameter), local(parameter.grad).contiguous()
        if not self.state[parameter]:
            self.state[parameter] = self._zero(weight)
        state = self.state[parameter]
        state["step"] += 1
        if not weight.numel():  # nothing of a cut tensor lies on this rank
            return
        (beta1, beta2), eps, decay = group["betas"], group["eps"], group["weight_decay"]
        one, two, step, lr = state["state1"], state["state2"], state["step"], group["lr"]
        if one.dtype == torch.float32:
            F.optimizer_update_32bit(
                "adam", gradient, weight, one, beta1, eps, step, lr, two, beta2, weight_decay=decay
            )  # fmt: skip
            return
        maps, scales = (state["qmap1"], state["qmap2"]), (state["absmax1"], state["absmax2"])
        F.optimizer_update_8bit_blockwise(
            "adam", gradient, weight, one, two, beta1, beta2, 0.0, 0.0, eps, step, lr, *maps, *scales,
            weight_decay=decay
        )  # fmt: skip

    def _zero(self, weight: Tensor) -> dict[str, Any]:
        """The state before the first step."""
        if weight.numel() < self.args.min_8bit_size:
            return {"step": 0, **{f"state{end}": torch.zeros_like(weight, dtype=torch.float32) for end in "12"}}
        state: dict[str, Any] = {"step": 0}
        for end, name in (("1", "dynamic"), ("2", "udynamic")):
            self.name2qmap[name] = self.name2qmap[name].to(weight.device)
            zero = int((self.name2qmap[name] == 0).nonzero()[0])
            state[f"state{end}"] = torch.full_like(weight, zero, dtype=torch.uint8)
            state[f"absmax{end}"] = torch.zeros(-(-weight.numel() // RUN), device=weight.device)
            state[f"qmap{end}"] = self.name2qmap[name]
        return state

    def piece(self, parameter: nn.Parameter, key: str, start: int, numel: int) -> Tensor:
        """`numel` elements of a moment (`exp_avg`, `exp_avg_sq`) from `start` on, flat, in fp32; of what lies here."""
        state, end = self.state[parameter], MOMENTS[key]
        first, last = start // RUN * RUN, start + numel
        codes = state[f"state{end}"].flatten()[first:last]
        if codes.dtype == torch.float32:
            return codes[start - first :]
        scales = state[f"absmax{end}"][first // RUN : -(-last // RUN)].repeat_interleave(RUN)[: len(codes)]
        return (state[f"qmap{end}"][codes.int()] * scales)[start - first :]

    def unpacked(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The state of a parameter as AdamW's, its moments in fp32 and cut as the parameter is; {} before a step."""
        if not self.state.get(parameter):
            return {}
        here = local(parameter)
        whole = {key: self.piece(parameter, key, 0, here.numel()).view(here.shape) for key in MOMENTS}
        step = torch.tensor(float(self.state[parameter]["step"]))
        return {**{key: _cut_as(parameter, value) for key, value in whole.items()}, "step": step}

    @torch.no_grad()
    def pack(self, parameter: nn.Parameter) -> None:
        """Puts, in place of a state as AdamW's in `self.state[parameter]`, the same in 8 bits."""
        plain = self.state[parameter]
        state = self._zero(local(parameter))
        state["step"] = int(plain["step"])
        for key, end in MOMENTS.items():
            values = local(plain[key]).float()
            if state[f"state{end}"].dtype == torch.float32:
                state[f"state{end}"].copy_(values)
            elif values.numel():
                codes, scales = rounded(values.flatten(), state[f"qmap{end}"])
                state[f"state{end}"].copy_(codes.view(values.shape))
                state[f"absmax{end}"].copy_(scales)
        self.state[parameter] = state


def rounded(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(codes uint8 [N], scales fp32 [ceil(N / 256)]) of `values` (fp32 [N]) by a `table` of 256 rising numbers.

    Of the scales that may have made a run, the one by which its values come out best: exactly, if they came so.
    """
    runs = nn.functional.pad(values, (0, -len(values) % RUN)).view(-1, RUN)
    middles = (table[1:] + table[:-1]) / 2
    scales = largest = runs.abs().amax(1, keepdim=True)  # [runs, 1]
    codes, best = _coded(runs, scales, table, middles)
    if table[0] == 0:  # of second moments, of which none is negative
        return codes.to(torch.uint8).flatten()[: len(values)], scales.flatten()
    up, down = (torch.full_like(scales, end) for end in (torch.inf, 0.0))
    guess = largest / table[0].abs()
    for scale in (guess, guess.nextafter(up), guess.nextafter(up).nextafter(up), guess.nextafter(down)):
        tried, error = _coded(runs, scale, table, middles)
        better = error < best
        codes, scales = torch.where(better, tried, codes), torch.where(better, scale, scales)
        best = torch.minimum(best, error)
    return codes.to(torch.uint8).flatten()[: len(values)], scales.flatten()


def _coded(runs: Tensor, scales: Tensor, table: Tensor, middles: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [runs, 256] of the nearest values of the table, the largest error of each run [runs, 1])."""
    codes = torch.bucketize(runs / scales.clamp_min(torch.finfo(torch.float32).tiny), middles)
    return codes, (table[codes] * scales - runs).abs().amax(1, keepdim=True)


def _cut_as(parameter: Any, here: Tensor) -> Tensor:
    """`here`, this rank's part, as a DTensor where `parameter` is one."""
    if not hasattr(parameter, "placements"):
        return here
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    whole: Tensor = DTensor.from_local(
        here, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return whole
