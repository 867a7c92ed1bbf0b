"""One tensor from one peer to another, as activations travel between the stages of a pipeline.

    payload = encode(x, config)            # a header that is JSON, and bytes
    y = decode(payload, shape=(8, 4096))   # of x's shape and type

The same compressors as for gradients, without memory: nothing that is left out is sent later. Low rank is one power
iteration from random rows, of x seen as [numel / D, D] with D its last dimension; factors that were no smaller than x
are not sent, but x is (`none`). Sign is `efsign`, with its scale.
A payload may come from anywhere, and eight bytes of Top-k can ask for any number of elements. `decode` believes nothing
in it: how large a tensor may be its caller says, and what does not fit together raises ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

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
MOST = 2**24
"""Elements that `decode` makes for a caller who does not say how many are expected: 64 MiB in fp32."""
DIMENSIONS = 64
"""Of a tensor: what torch's own kernels take."""


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
    if tensor.numel() >= LARGEST or tensor.ndim > DIMENSIONS:
        size = f"{tensor.numel()} elements in {tensor.ndim} dimensions"
        raise ValueError(f"encode: {size}; less than 2**31 in at most {DIMENSIONS} fit into one payload")
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
        matrix = flat.view(-1, tensor.shape[-1] if tensor.ndim else 1)
        r = min(config.r, *matrix.shape)
        if 4 * r * sum(matrix.shape) >= flat.nbytes:
            header["method"], pieces = "none", [flat]
        else:
            header["r"], pieces = r, _factors(matrix.float(), r, generator(key, config.seed, step))
    return Payload(header, torch.cat([piece.contiguous().view(-1).view(torch.uint8).cpu() for piece in pieces]))


def _factors(matrix: Tensor, r: int, source: torch.Generator) -> list[Tensor]:
    """p [R, N], orthonormal, and q [R, M] of a matrix [N, M]."""
    start = torch.randn(r, matrix.shape[1], generator=source).to(matrix)
    p = torch.mm(start, matrix.t())
    orthonormal_(p)
    return [p, torch.mm(p, matrix)]


@torch.no_grad()
def decode(
    payload: Payload,
    device: torch.device | str = "cpu",
    *,
    shape: Sequence[int] | None = None,
    max_elements: int | None = None,
) -> Tensor:
    """The tensor, on `device`. `shape`: the one that is expected. `max_elements`: the most elements that it may have;
    without either `MOST`. ValueError, in one line, for a payload that is not one of `encode` or not as expected."""
    header = payload.header
    if not isinstance(header, dict) or not isinstance(payload.data, Tensor):
        raise ValueError("decode: a payload is a header, which is a mapping, and a tensor of bytes")
    method, dtype = header.get("method"), header.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"decode: dtype={_said(dtype)}: must be one of {', '.join(DTYPES)}")
    sizes = _sizes(header, shape, MOST if max_elements is None and shape is None else max_elements)
    numel = math.prod(sizes)
    if not numel:
        _sized(payload, 0)
        return torch.empty(sizes, dtype=DTYPES[dtype], device=device)
    if method in ("none", "fp16", "bf16"):
        (flat,) = _pieces(payload, [(numel, DTYPES[dtype if method == "none" else method])])
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
        k, key = _count(header, "k", numel), header.get("key")
        if not isinstance(key, str):
            raise ValueError(f"decode: key={_said(key)}: must be text")
        (values,) = _pieces(payload, [(k, torch.float32)])
        places = strata(numel, k, key, _number(header, "seed"), _number(header, "step"))
        flat = torch.zeros(numel).index_copy_(0, places, values)
    elif method in LOW_RANK:
        columns = sizes[-1] if sizes else 1
        rows = numel // columns
        r = _count(header, "r", min(rows, columns))
        p, q = _pieces(payload, [(r * rows, torch.float32), (r * columns, torch.float32)])
        flat = torch.mm(p.view(r, rows).t(), q.view(r, columns))
    else:
        known = "none, fp16, bf16, efsign, topk, randomk, powersgd, acpsgd"
        raise ValueError(f"decode: method={_said(method)}: must be one of {known}")
    return flat.to(device, DTYPES[dtype]).view(sizes)


def _sizes(header: dict[str, Any], expected: Sequence[int] | None, most: int | None) -> list[int]:
    """The tensor's shape. Of one without elements the other sizes are bounded too: strides are products of them."""
    sizes = header.get("shape")
    if not isinstance(sizes, list) or not all(_whole(size) and 0 <= size < LARGEST for size in sizes):
        raise ValueError("decode: shape: must be a list of sizes, each from 0 and below 2**31")
    if len(sizes) > DIMENSIONS:
        raise ValueError(f"decode: shape: has {len(sizes)} dimensions, at most {DIMENSIONS} can be")
    if expected is not None and sizes != list(expected):
        raise ValueError(f"decode: shape={sizes}: {list(expected)} is expected")
    most = LARGEST - 1 if most is None else min(most, LARGEST - 1)
    if math.prod(size or 1 for size in sizes) > most:
        raise ValueError(f"decode: shape: has more than {most} elements; where so many are expected, say max_elements")
    return sizes


def _pieces(payload: Payload, wanted: list[tuple[int, torch.dtype]]) -> list[Tensor]:
    """The data as so many elements of each type, one after another; copies, since a piece may start anywhere."""
    sizes = [count * dtype.itemsize for count, dtype in wanted]
    _sized(payload, sum(sizes))
    pieces = payload.data.split(sizes)
    return [piece.clone().view(dtype) for piece, (_, dtype) in zip(pieces, wanted, strict=True)]


def _sized(payload: Payload, wanted: int) -> None:
    data = payload.data
    if data.device.type != "cpu" or data.dtype != torch.uint8 or data.ndim != 1:
        raise ValueError(f"decode: data: must be bytes in one row on the host, not {data.dtype} on {data.device}")
    if len(data) != wanted:
        raise ValueError(f"decode: {len(data)} bytes where {_said(payload.header.get('method'))} has {wanted}")


def _count(header: dict[str, Any], key: str, most: int) -> int:
    value = _number(header, key)
    if not 1 <= value <= most:
        raise ValueError(f"decode: {key}={_said(value)}: must be from 1 to {most}")
    return value


def _number(header: dict[str, Any], key: str) -> int:
    value = header.get(key)
    if not _whole(value) or abs(value) >= 2**63:
        raise ValueError(f"decode: {key}={_said(value)}: must be a whole number below 2**63")
    return value


def _whole(value: object) -> TypeGuard[int]:
    """JSON's `true` is no number, though it is an int."""
    return isinstance(value, int) and not isinstance(value, bool)


def _said(value: Any) -> str:
    """What a stranger's header says, short and in one line."""
    if isinstance(value, str) or (_whole(value) and abs(value) < 2**63):
        return repr(value)[:40]
    return f"a {type(value).__name__}"
