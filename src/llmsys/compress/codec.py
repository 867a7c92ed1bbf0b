"""One tensor from one peer to another, as activations travel between the stages of a pipeline.

    payload = encode(x, config)            # a header that is JSON, and bytes
    y = decode(payload)                    # of x's shape and type

The same compressors as for gradients, without memory: nothing that is left out is sent later. Low rank is one power
iteration from random rows, of x seen as [numel / D, D] with D its last dimension; sign is `efsign`, with its scale.
A payload may come from anywhere: `decode` believes nothing in it and raises ValueError for what does not fit together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmsys.compress import bits
from llmsys.compress.config import CompressConfig
from llmsys.compress.memory import generator
from llmsys.compress.methods.sparse import strata
from llmsys.compress.orthogonal import orthonormal_
from llmsys.cost import compressed
from llmsys.schema.compress import LOW_RANK

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST = 2**31
"""Elements of a tensor: places are int32."""


@dataclass(frozen=True)
class Payload:
    """`header`: method, shape, type and what else `decode` needs, JSON. `data` (uint8 [bytes], on the host)."""

    header: dict[str, Any]
    data: Tensor


@torch.no_grad()
def encode(tensor: Tensor, config: CompressConfig, key: str = "", step: int = 0) -> Payload:
    """`key` and `step`: what random draws depend on, beside `config.seed`. ValueError for a type that is no floating
    point number, and for `sign`, which has no scale."""
    if tensor.dtype not in NAMES:
        raise ValueError(f"encode: {tensor.dtype}; compressors are for {', '.join(DTYPES)}")
    if config.method == "sign":
        raise ValueError("encode: method=sign has no scale; method=efsign has the same bits and one")
    if tensor.numel() >= LARGEST:
        raise ValueError(f"encode: {tensor.numel()} elements; less than 2**31 fit into one payload")
    header: dict[str, Any] = {"method": config.method, "shape": list(tensor.shape), "dtype": NAMES[tensor.dtype]}
    flat = tensor.detach().reshape(-1)
    if not flat.numel():
        return Payload(header, torch.empty(0, dtype=torch.uint8))
    method, k = config.method, compressed.kept(flat.numel(), config.density)
    if method == "none":
        pieces = [flat]
    elif method in ("fp16", "bf16"):
        pieces = [flat.to(DTYPES[method])]
    elif method == "efsign":
        pieces = [flat.abs().mean(dtype=torch.float32).reshape(1), bits.pack(flat)]
    elif method == "topk":
        places = torch.topk(flat.abs(), k, sorted=False).indices
        header["k"], pieces = k, [flat[places].float(), places.int()]
    elif method == "randomk":
        header |= {"k": k, "key": key, "seed": config.seed, "step": step}
        pieces = [flat[strata(flat.numel(), k, key, config.seed, step).to(flat.device)].float()]
    else:
        matrix = flat.view(-1, tensor.shape[-1] if tensor.ndim else 1).float()
        r = min(config.r, *matrix.shape)
        header["r"] = r
        start = torch.randn(r, matrix.shape[1], generator=generator(key, config.seed, step)).to(matrix)
        p = torch.mm(start, matrix.t())
        orthonormal_(p)
        pieces = [p, torch.mm(p, matrix)]
    return Payload(header, torch.cat([piece.contiguous().view(-1).view(torch.uint8).cpu() for piece in pieces]))


@torch.no_grad()
def decode(payload: Payload, device: torch.device | str = "cpu") -> Tensor:
    """The tensor, on `device`. ValueError, in one line, for a payload that is not one of `encode`."""
    header = payload.header
    method, dtype = header.get("method"), DTYPES.get(str(header.get("dtype")))
    shape = header.get("shape")
    if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"decode: shape={shape}: must be a list of sizes")
    numel = math.prod(shape)
    if dtype is None or numel >= LARGEST:
        raise ValueError(f"decode: dtype={header.get('dtype')}, {numel} elements: not what encode makes")
    if not numel:
        _sized(payload, 0)
        return torch.empty(shape, dtype=dtype, device=device)
    if method in ("none", "fp16", "bf16"):
        (flat,) = _pieces(payload, [(numel, dtype if method == "none" else DTYPES[method])])
    elif method == "efsign":
        scale, packed = _pieces(payload, [(1, torch.float32), (math.ceil(numel / 8), torch.uint8)])
        flat = torch.zeros(numel)
        bits.add_signs(flat, packed, scale)
    elif method == "topk":
        k = _count(header, "k", numel)
        values, places = _pieces(payload, [(k, torch.float32), (k, torch.int32)])
        if int(places.min()) < 0 or int(places.max()) >= numel:
            raise ValueError(f"decode: places beyond the {numel} elements of the tensor")
        flat = torch.zeros(numel).index_copy_(0, places.long(), values)
    elif method == "randomk":
        k = _count(header, "k", numel)
        (values,) = _pieces(payload, [(k, torch.float32)])
        places = strata(numel, k, str(header.get("key")), _number(header, "seed"), _number(header, "step"))
        flat = torch.zeros(numel).index_copy_(0, places, values)
    elif method in LOW_RANK:
        columns = shape[-1] if shape else 1
        rows = numel // columns
        r = _count(header, "r", min(rows, columns))
        p, q = _pieces(payload, [(r * rows, torch.float32), (r * columns, torch.float32)])
        flat = torch.mm(p.view(r, rows).t(), q.view(r, columns))
    else:
        raise ValueError(f"decode: method={method}: must be one of none, fp16, bf16, efsign, topk, randomk, powersgd")
    return flat.to(device, dtype).view(shape)


def _pieces(payload: Payload, wanted: list[tuple[int, torch.dtype]]) -> list[Tensor]:
    """The data as so many elements of each type, one after another; copies, since a piece may start anywhere."""
    sizes = [count * dtype.itemsize for count, dtype in wanted]
    _sized(payload, sum(sizes))
    pieces = payload.data.split(sizes)
    return [piece.clone().view(dtype) for piece, (_, dtype) in zip(pieces, wanted, strict=True)]


def _sized(payload: Payload, wanted: int) -> None:
    data = payload.data
    if data.dtype != torch.uint8 or data.ndim != 1 or len(data) != wanted:
        raise ValueError(f"decode: {data.nbytes} bytes where {payload.header.get('method')} has {wanted}")


def _count(header: dict[str, Any], key: str, most: int) -> int:
    value = _number(header, key)
    if not 1 <= value <= most:
        raise ValueError(f"decode: {key}={value}: must be from 1 to {most}")
    return value


def _number(header: dict[str, Any], key: str) -> int:
    value = header.get(key)
    if not isinstance(value, int):
        raise ValueError(f"decode: {key}={value}: must be a whole number")
    return value
