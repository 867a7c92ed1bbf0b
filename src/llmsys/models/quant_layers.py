"""bitsandbytes' two frozen linear layers, with four of their habits taken out. Imported by `quant` alone.

Both are subclasses, so that whoever looks for bitsandbytes' classes (peft does) finds them. What differs is `forward`:

- The input is not kept. bitsandbytes' int8 product holds it in its autograd node although only the gradient of a
  trained weight would need it; no saved-tensor hook sees it there. LoRA-FA exists to be rid of that very tensor.
- Autocast is respected, as by `nn.Linear`. bitsandbytes fixes the dtype at the first input it meets, and casts the bias
  to it in place.
- Evaluation computes what training does. On a CPU bitsandbytes repacks 4-bit weights for a bf16 kernel in `eval`, and
  quantises the input of 8-bit ones; the validation loss would be that of another model.
- Any width. bitsandbytes 0.50 quantises the flat weight in runs of 64, but its CPU kernel reads it back as if each row
  began a run: where 64 does not divide the row, weights come back with another run's scale (26 % off, not 9 %).

The tensors that bitsandbytes keeps outside parameters (scales and tables) are buffers too, so that bytes are counted
where bytes are looked for. They are no part of a state: a frozen base is made again from its own weights.
Shapes: M outputs, N inputs, x [..., N].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes import functional as F
from torch import Tensor, nn

OUTLIER = 6.0
"""LLM.int8(), section 3.2: columns of x with a larger magnitude are multiplied in 16 bits. CUDA only."""


class Linear4bit(bnb.nn.Linear4bit):
    """A frozen NF4 weight [M, N], dequantised for each product, in the forward pass and again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, x)

    def product(self, x: Tensor) -> Tensor:
        """x W^T. CUDA has a kernel that dequantises on the way, for few rows."""
        if not x.is_cuda:
            return nn.functional.linear(x, self.dequantised(x.dtype))
        y: Tensor = bnb.matmul_4bit(x, self.weight, quant_state=self.quant_state)
        return y

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """W [M, N]."""
        state = self.quant_state  # the layer's: an engine that cuts weights puts another parameter in its place
        scales = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
        n = state.shape.numel()
        rows = (n // state.blocksize, state.blocksize) if n % state.blocksize == 0 else (1, n)
        flat: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            self.weight.data, scales, state.blocksize, state.quant_type, rows, dtype
        )
        return flat.view(state.shape)


class Linear8bitLt(bnb.nn.Linear8bitLt):
    """A frozen int8 weight [M, N] with a scale for each row."""

    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, x)

    def product(self, x: Tensor) -> Tensor:
        """x W^T. On CUDA that is LLM.int8(): x is quantised too, and the integers are multiplied."""
        if not x.is_cuda:
            return nn.functional.linear(x, self.dequantised(x.dtype))
        # The kernels take fp16 only; given another dtype they would cast as well, with a line in the log for each call.
        y: Tensor = bnb.matmul(x.half(), self.weight, state=self.state)
        return y.to(x.dtype)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """W [M, N]."""
        return self.state.CB.to(dtype).mul_((self.state.SCB / 127).unsqueeze(1))


class _Product(torch.autograd.Function):
    """y = x W^T with a frozen W: dx = dy W, which needs the weight again and nothing of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        y: Tensor = layer.product(x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.layer.dequantised(dy.dtype), None


def _forward(layer: Any, x: Tensor) -> Tensor:
    dtype = _compute_dtype(x)
    y: Tensor = _Product.apply(x.to(dtype), layer)
    return y if layer.bias is None else y + layer.bias.to(dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def nf4() -> Callable[[nn.Module], nn.Module]:
    """A function that makes a `Linear4bit` of an `nn.Linear` and shares one pair of tables among all that it makes.

    The packed weight is stored under the dtype of the original: T5 casts an input to the dtype it finds in the layer,
    and peft gives it to the adapters (bytes where they do not fill a whole number of it).
    """
    tables: dict[str, Tensor] = {}

    def make(linear: Any) -> nn.Module:
        layer: Any = Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4", device="meta")
        weight = linear.weight.data
        storage = weight.dtype if weight.numel() % 8 == 0 else torch.uint8
        packed, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, quant_storage=storage)
        state.code = tables.setdefault("values", state.code)
        state.state2.code = tables.setdefault("scales", state.state2.code)
        layer.weight = bnb.nn.Params4bit(
            packed,
            requires_grad=False,
            quant_state=state,
            quant_type="nf4",
            quant_storage=storage,
            module=layer,
            bnb_quantized=True,
        )
        layer.quant_state = state
        layer.bias = linear.bias
        _count(layer, scales=state.absmax, scales_of_scales=state.state2.absmax, offset=state.offset)
        _count(layer, values=state.code, scale_values=state.state2.code)
        return layer

    return make


def int8(linear: Any) -> nn.Module:
    """A `Linear8bitLt` of an `nn.Linear`, whose weight passes through fp16, as bitsandbytes' kernels want it."""
    layer: Any = Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=OUTLIER, device="meta"
    )
    values, scales, _ = F.int8_vectorwise_quant(linear.weight.data.half())
    layer.weight = bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False)
    layer.state.CB, layer.state.SCB = values, scales
    layer.bias = linear.bias
    _count(layer, scales=scales)
    return layer


def _count(layer: nn.Module, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        layer.register_buffer(name, tensor, persistent=False)
