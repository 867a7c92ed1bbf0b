"""Frames arrive as they were sent, bit for bit, or not at all."""

from __future__ import annotations

import json
import random
import struct

import pytest
import torch
from decentral_running import losses, together, undisturbed

from llmsys.decentral.planes.layout import packed, unpacked
from llmsys.decentral.wire import MAGIC, Array, Frame, Malformed, decode, encode, header


def a_frame(**more: object) -> Frame:
    tensors = {"x": packed(torch.randn(3, 4)), "y": packed(torch.arange(6).reshape(2, 3).t())}
    given = {"kind": "ahead", "epoch": 3, "step": 7, "micro_batch": 1, "sender": "a", "to": "b", "tensors": tensors}
    return Frame(**{**given, "body": {"stage": 1}, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3, 4),
        torch.randn(2, 3, 4).transpose(0, 2),
        torch.randn(4, 1).expand(4, 5),
        torch.randn(3, 3)[:, 1],
        torch.randn(5).bfloat16(),
        torch.tensor(2.5),
        torch.zeros(0, 3),
        torch.arange(4),
        torch.tensor([True, False]),
    ],
)
def test_a_tensor_arrives_with_its_bits_and_the_order_of_its_strides(tensor: torch.Tensor) -> None:
    (found,) = decode(encode(Frame(kind="x", tensors={"t": packed(tensor)}))).tensors.values()
    arrived = unpacked(found)
    assert arrived.dtype == tensor.dtype
    assert torch.equal(arrived, tensor)
    order = [dim for _, dim in sorted((-stride, dim) for dim, stride in enumerate(tensor.stride()))]
    assert [dim for _, dim in sorted((-stride, dim) for dim, stride in enumerate(arrived.stride()))] == order
    expanded = [stride == 0 for stride in tensor.stride()]
    assert [stride == 0 for stride in arrived.stride()] == expanded


def test_an_expanded_tensor_is_sent_once() -> None:
    assert len(packed(torch.randn(1, 8).expand(100, 8)).data) == 8 * 4


def test_a_frame_is_what_was_said_and_its_header_can_be_read_alone() -> None:
    frame = a_frame()
    data = encode(frame)
    assert decode(data) == frame
    assert {key: header(data)[key] for key in ("kind", "epoch", "to")} == {"kind": "ahead", "epoch": 3, "to": "b"}


def with_header(data: bytes, **changes: object) -> bytes:
    (length,) = struct.unpack("<I", data[4:8])
    head = json.loads(data[8 : 8 + length]) | changes
    text = json.dumps(head).encode()
    return MAGIC + struct.pack("<I", len(text)) + text + data[8 + length :]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (b"", "no frame of this version"),
        (b"LSD0" + b"\0" * 100, "no frame of this version"),
        (MAGIC + struct.pack("<I", 2**31) + b"{}", "a header of 2147483648 bytes"),
        (MAGIC + struct.pack("<I", 4) + b"nojs", "no JSON"),
        (MAGIC + struct.pack("<I", 2) + b"{}", "other keys"),
        (MAGIC + struct.pack("<I", 100_000) + b"[" * 100_000, "no JSON"),
        (with_header(encode(a_frame()), step=-1), "values of other kinds"),
        (with_header(encode(a_frame()), step=True), "values of other kinds"),
        (with_header(encode(a_frame()), kind=["x"]), "values of other kinds"),
        (with_header(encode(a_frame()), epoch=4), "hash is not its own"),
        (encode(a_frame())[:-1], "hash is not its own"),
    ],
)
def test_what_is_no_frame_is_named(broken: bytes, said: str) -> None:
    with pytest.raises(Malformed, match=said):
        decode(broken)


@pytest.mark.parametrize(
    "more",
    [
        {"shape": (2, 3), "data": bytes(20)},
        {"shape": (2**62, 2**62)},
        {"shape": (-1, -24)},
        {"dtype": "object"},
        {"order": (0, 0)},
        {"expanded": (True,)},
        {"shape": (1,) * 40, "order": tuple(range(40)), "expanded": (False,) * 40},
    ],
)
def test_a_tensor_whose_bytes_are_not_its_shape_s_is_none(more: dict[str, object]) -> None:
    given = {"dtype": "float32", "shape": (2, 3), "order": (0, 1), "expanded": (False, False), "data": bytes(24)}
    Array(**given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tensor|bytes"):
        Array(**{**given, **more})  # type: ignore[arg-type]


def test_ten_thousand_frames_that_somebody_has_tampered_with_harm_nobody() -> None:
    """Bits turned, bytes cut, inserted and doubled, headers that say something else, and whole frames of another time
    and place: dropped, and counted. The job goes on to the bits that it would have had."""
    draw = random.Random(0)
    local = together("llama", 3, 2, 3)
    heard: list[bytes] = []

    def tampered(data: bytes) -> bytes:
        made = bytearray(data)
        way = draw.randrange(6)
        at = draw.randrange(len(made))
        if way == 0:
            made[at] ^= 1 << draw.randrange(8)
        elif way == 1:
            del made[at:]
        elif way == 2:
            made[at:at] = draw.randbytes(draw.randrange(1, 64))
        elif way == 3:
            made = made + made
        elif way == 4:
            made = bytearray(draw.randbytes(draw.randrange(200)))
        else:
            key = draw.choice(["kind", "epoch", "step", "micro_batch", "to", "body", "tensors", "sender"])
            value = draw.choice([-1, 2**60, "x" * 1000, None, [], {"stage": "one"}, {"cutting": 1e300}, 0.5])
            made = bytearray(with_header(data, **{key: value}))
        return bytes(made)

    made = 0

    def watch(own: object, name: str, what: str, step: int) -> None:
        nonlocal made
        provider = local.providers[name]
        for _ in range(150 if heard and made < 12_000 else 0):
            provider.hear(tampered(draw.choice(heard)))
            local.coordinator.hear(name, tampered(draw.choice(heard)), local.now)
            made += 2
        inbox = local.inboxes[name]
        if inbox and len(inbox[0]) < 16_384:  # not the model itself: bytes are bytes
            heard.append(inbox[0])

    local.watch = watch
    local.run()
    assert losses(local) == undisturbed("llama", 3)
    left_alone = sum(each.counters.malformed for each in local.providers.values())
    assert left_alone + local.coordinator.counters["malformed"] == made >= 10_000


def test_a_frame_of_another_job_epoch_or_stage_changes_nothing() -> None:
    local = together("llama", 2, 2, 2)
    for _ in range(3):
        local.round()
    provider = local.providers["p1"]
    before = (provider.says.epoch, provider.says.step, provider.live)
    for more in (
        {"job": "another"}, {"to": "p0"}, {"epoch": 0}, {"epoch": provider.says.epoch + 1},
        {"epoch": provider.says.epoch, "body": {"cutting": 99, "stage": 0}},
        {"epoch": provider.says.epoch, "kind": "commit", "sender": "p0", "step": 1},
        {"epoch": provider.says.epoch, "kind": "input", "sender": "p0"},
        {"epoch": provider.says.epoch, "kind": "nonsense", "sender": "broker"},
    ):  # fmt: skip
        provider.hear(encode(a_frame(**{"to": "p1", **more})))
    assert (provider.says.epoch, provider.says.step, provider.live) == before
    found = provider.counters
    assert (found.foreign, found.stale, found.refused) == (2, 2, 4)
    local.run()
    assert losses(local) == undisturbed("llama", 2)
