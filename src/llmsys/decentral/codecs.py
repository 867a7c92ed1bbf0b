"""Tensors as they go compressed: in numpy, as a provider may have no torch, and from nothing but the tensor, so that
what is computed again is sent again with the same bits.

    fp16, bf16  to the nearest even; what is finite stays so: beyond the largest number is the largest number
    int8        x = scale q with q = -127 ... 127 to the nearest even, and scale = max |x| / 127 of each group, as
                elements lie in memory: |error| <= scale / 2. A group with a NaN or an infinity is NaN throughout, so
                that who looks for one finds it. q = -128 stands for what masks are made of, the least number of
                fp32, beside which nothing else of a group would be left

Only fp32 is compressed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsys.decentral.compression import GROUP
from llmsys.decentral.wire import Array

SCALES = "/scales"
"""Behind a tensor's name, the name of its scales."""
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "int8": "int8"}
LOSSY = "float32"
LEAST, MASKED = -3.4028234663852886e38, -1e30
"""Of fp32; what is less than the latter is taken for the former."""
_LARGEST = {"fp16": 65504.0, "bf16": 3.3895313892515355e38}
Floats = NDArray[np.float32]


def encoded(codec: str, name: str, array: Array) -> dict[str, Array]:
    """What is sent of a tensor of fp32, by name."""
    flat = np.frombuffer(array.data, np.float32)
    if codec == "int8":
        data, scales = _quantized(flat)
        return {name: _as(array, "int8", data), name + SCALES: _row(scales)}
    finite = np.where(np.isinf(flat), flat, np.clip(flat, -_LARGEST[codec], _LARGEST[codec]))
    return {name: _as(array, DTYPES[codec], finite.astype(np.float16) if codec == "fp16" else _to_bfloat16(finite))}


def decoded(codec: str, name: str, arrays: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    """The tensor of fp32 that was sent as these. ValueError for what is not of this codec and shape."""
    array, scales = arrays[name], arrays.get(name + SCALES)
    if (array.dtype, array.shape) != (DTYPES[codec], shape):
        raise ValueError(f"{name}: {array.dtype} {list(array.shape)}: {codec} {list(shape)} was agreed")
    if codec == "fp16":
        return _as(array, LOSSY, np.frombuffer(array.data, np.float16).astype(np.float32))
    if codec == "bf16":
        return _as(array, LOSSY, (np.frombuffer(array.data, np.uint16).astype(np.uint32) << 16).view(np.float32))
    groups = -(-len(array.data) // GROUP)
    if scales is None or (scales.dtype, scales.sent_shape) != (LOSSY, (groups,)):
        raise ValueError(f"{name}: {groups} scales are missing: {codec} was agreed")
    flat = np.frombuffer(array.data, np.int8)
    with np.errstate(over="ignore"):
        found = _groups(flat.astype(np.float32)) * np.frombuffer(scales.data, np.float32)[:, None]
    found = np.where((_groups(flat) == -128) & ~np.isnan(found), np.float32(LEAST), found)
    return _as(array, LOSSY, found.reshape(-1)[: len(flat)])


def _quantized(flat: Floats) -> tuple[NDArray[np.int8], Floats]:
    """(elements, scales)."""
    groups = _groups(flat)
    masked = np.isfinite(groups) & (groups <= MASKED)
    groups = np.where(masked, np.float32(0), groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        scales = np.max(np.abs(groups), axis=1, initial=0.0) / np.float32(127)
        scales = np.where(np.isfinite(scales), scales, np.float32(np.nan))
        near = np.clip(np.rint(groups / scales[:, None]), -127, 127)
    near = np.where(masked, -128, np.nan_to_num(near, nan=0.0))  # 0 / 0, and what has a scale that is NaN
    return near.astype(np.int8).reshape(-1)[: len(flat)], scales


def _groups(flat: NDArray[Any]) -> NDArray[Any]:
    """[ceil(N / GROUP), GROUP], with zeros at the end."""
    return np.concatenate([flat, np.zeros(-len(flat) % GROUP, flat.dtype)]).reshape(-1, GROUP)


def _to_bfloat16(values: Floats) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _as(array: Array, dtype: str, values: NDArray[Any]) -> Array:
    """As `array` lies."""
    return dataclasses.replace(array, dtype=dtype, data=values.tobytes())


def _row(values: Floats) -> Array:
    return Array(dtype=LOSSY, shape=values.shape, order=(0,), expanded=(False,), data=values.tobytes())
