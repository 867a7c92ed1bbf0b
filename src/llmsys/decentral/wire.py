"""What providers and the broker say to each other: frames of a JSON header and safetensors.

    magic     4 bytes, with the version
    length    4 bytes, little-endian, of the header
    header    JSON: what it is, of which job, epoch, step and micro-batch, from whom to whom, how its tensors lie, and a
              BLAKE2b hash of it and of the payload
    payload   safetensors, where there are tensors, each as its bytes: bfloat16 is none of numpy's

Nothing in a frame is code, and nothing of it is believed: sizes are checked against what has come before anything is
made of them, shapes against bytes, and whoever handles a frame checks names and shapes against what the plan says. No
torch is needed to read one.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from llmsys.decentral.graph import WIDTHS

MAGIC = b"LSD1"
_LENGTH = struct.Struct("<I")
HEADER_BYTES = 4 << 20
"""A header has no more."""
FRAME_BYTES = 512 << 20
"""Nor has a frame: what is larger is sent in several."""
DIMENSIONS = 16
BROKER, BEAT, TASK_S = "broker", "beat", "task_s"
"""Who sends what no provider does, by the name that none of them has; the kind of a sign of life; and what that says of
how long its sender is at what it does."""


class Malformed(ValueError):
    """Bytes that are no frame."""


@dataclass(frozen=True, kw_only=True)
class Array:
    """A tensor as it travels. `data`: its elements, each once, as they lie with the dimensions in `order`, of which
    those that are `expanded` have one. ValueError where these do not agree."""

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    expanded: tuple[bool, ...]
    data: bytes

    def __post_init__(self) -> None:
        count = len(self.shape)
        if self.dtype not in WIDTHS or count > DIMENSIONS or any(type(n) is not int or n < 0 for n in self.shape):
            raise ValueError(f"a tensor of {self.dtype} {list(self.shape)[:DIMENSIONS]}")
        if sorted(self.order) != list(range(count)) or len(self.expanded) != count:
            raise ValueError("a tensor whose dimensions are not in an order")
        if len(self.data) != math.prod(self.sent_shape) * WIDTHS[self.dtype]:
            raise ValueError(f"{len(self.data)} bytes of a tensor of {self.dtype} {list(self.sent_shape)}")

    @classmethod
    def of_bytes(cls, data: bytes) -> Self:
        """What is no tensor, and goes as one."""
        return cls(dtype="uint8", shape=(len(data),), order=(0,), expanded=(False,), data=data)

    @property
    def sent_shape(self) -> tuple[int, ...]:
        """Of what travels, the outermost dimension in memory first."""
        return tuple(1 if self.expanded[dim] else self.shape[dim] for dim in self.order)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """`kind`: what is said. `sender`, `to`: names of providers, or `broker`. `body`: plain JSON."""

    kind: str
    job: str = ""
    epoch: int = 0
    step: int = 0
    micro_batch: int = 0
    sender: str = ""
    to: str = ""
    body: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Array] = field(default_factory=dict)


_TEXTS, _NUMBERS = ("kind", "job", "sender", "to"), ("epoch", "step", "micro_batch")


def encode(frame: Frame) -> bytes:
    """ValueError for what is too large for one frame."""
    payload = b""
    if frame.tensors:
        payload = save({name: np.frombuffer(each.data, np.uint8) for name, each in frame.tensors.items()})
    header: dict[str, Any] = {key: getattr(frame, key) for key in (*_TEXTS, *_NUMBERS)}
    header["body"] = frame.body
    header["tensors"] = {
        name: [each.dtype, list(each.shape), list(each.order), [int(one) for one in each.expanded]]
        for name, each in frame.tensors.items()
    }
    header["hash"] = _hash(header, payload)
    text = json.dumps(header, separators=(",", ":")).encode()
    size = len(MAGIC) + _LENGTH.size + len(text) + len(payload)
    if len(text) > HEADER_BYTES or size > FRAME_BYTES:
        raise ValueError(f"a frame {frame.kind} of {size} bytes: must be {FRAME_BYTES} or less")
    return b"".join((MAGIC, _LENGTH.pack(len(text)), text, payload))


def header(data: bytes) -> dict[str, Any]:
    """The header alone: what whoever passes a frame on has to know. Malformed for what is none."""
    begin = len(MAGIC) + _LENGTH.size
    if len(data) > FRAME_BYTES or len(data) < begin or data[: len(MAGIC)] != MAGIC:
        raise Malformed("no frame of this version")
    (length,) = _LENGTH.unpack(data[len(MAGIC) : begin])
    if length > HEADER_BYTES or begin + length > len(data):
        raise Malformed(f"a header of {length} bytes, of which {len(data) - begin} are there")
    try:
        found = json.loads(data[begin : begin + length], parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Malformed("a header that is no JSON") from None
    if not isinstance(found, dict) or set(found) != {*_TEXTS, *_NUMBERS, "body", "tensors", "hash"}:
        raise Malformed("a header with other keys")
    texts = all(isinstance(found[key], str) and len(found[key]) <= 256 for key in _TEXTS)
    numbers = all(type(found[key]) is int and 0 <= found[key] < 2**53 for key in _NUMBERS)
    if not (texts and numbers and isinstance(found["body"], dict) and isinstance(found["tensors"], dict)):
        raise Malformed("a header with values of other kinds")
    return found


def decode(data: bytes) -> Frame:
    """Malformed for anything that `encode` does not make, with what is wrong with it."""
    found = header(data)
    (length,) = _LENGTH.unpack(data[len(MAGIC) : len(MAGIC) + _LENGTH.size])
    payload = data[len(MAGIC) + _LENGTH.size + length :]
    if found.pop("hash") != _hash(found, payload):
        raise Malformed("a frame whose hash is not its own")
    layouts, tensors = found.pop("tensors"), {}
    if bool(payload) != bool(layouts):
        raise Malformed("a payload without tensors, or tensors without one")
    try:
        flat = load(payload) if payload else {}
        if set(flat) != set(layouts):
            raise ValueError("other tensors than its header says")
        for name, each in flat.items():
            dtype, shape, order, expanded = layouts[name]
            tensors[name] = Array(
                dtype=dtype,
                shape=tuple(shape),
                order=tuple(order),
                expanded=tuple(bool(one) for one in expanded),
                data=each.tobytes(),
            )
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise Malformed(f"tensors that are none: {error}") from None
    return Frame(**found, tensors=tensors)


def _no_number(name: str) -> float:
    """JSON has no NaN and no Infinity; Python's reader has."""
    raise ValueError(name)


def _hash(header: Mapping[str, Any], payload: bytes) -> str:
    made = hashlib.blake2b(json.dumps(header, separators=(",", ":"), sort_keys=True).encode(), digest_size=16)
    made.update(payload)
    return made.hexdigest()
