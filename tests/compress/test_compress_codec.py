"""A tensor from one peer to another: what arrives, in how many bytes, and what of a stranger is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from llmsys.compress import CompressConfig, Payload, decode, encode
from llmsys.compress.codec import DTYPES
from llmsys.profile.live import Live

X = torch.randn(3, 50, 40, generator=torch.Generator().manual_seed(0))
BYTES = {
    "none": 24_000,
    "fp16": 12_000,
    "bf16": 12_000,
    "efsign": 4 + 750,
    "topk": 60 * 8,
    "randomk": 60 * 4,
    "powersgd": 4 * 4 * (150 + 40),
    "acpsgd": 4 * 4 * (150 + 40),
}


@pytest.mark.parametrize("method", BYTES)
def test_it_arrives_in_as_many_bytes_as_it_should(method: str) -> None:
    """The compressors' defining properties, each of what arrives."""
    payload = encode(X, CompressConfig(method=method, density=0.01), "x", 3)
    assert payload.data.nbytes == BYTES[method]
    y = decode(Payload(json.loads(json.dumps(payload.header)), payload.data))
    assert (y.shape, y.dtype) == (X.shape, X.dtype)
    if method in ("none", "fp16", "bf16"):
        assert torch.equal(y, X.to(DTYPES[method if method != "none" else "fp32"]).float())
    elif method == "efsign":
        torch.testing.assert_close(y, X.abs().mean() * X.sign())
    elif method in ("topk", "randomk"):
        assert int((y != 0).sum()) == 60
        assert torch.equal(y[y != 0], X[y != 0])
        assert method == "randomk" or float(y.abs()[y != 0].min()) >= float(X.abs()[y == 0].max())
    else:  # the best approximation in the rows' span: what is left has nothing in it
        assert torch.linalg.matrix_rank(y.view(-1, 40)) == 4
        assert float((y * (X - y)).sum().abs()) < 1e-2 * float(y.square().sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (0, 4), (7,), (5, 9)])
def test_every_type_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, dtype=dtype)
    for method in BYTES:
        y = decode(encode(x, CompressConfig(method=method, density=1.0)))
        assert (y.shape, y.dtype) == (x.shape, dtype)
        torch.testing.assert_close(y, x, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("topk", {"shape": [10, 10]}, "places beyond"),
        ("topk", {"k": 61}, "480 bytes where 'topk' has 488"),
        ("topk", {"k": 10**9}, "k=1000000000: must be from 1"),
        ("topk", {"k": "60"}, "k='60': must be a whole number"),
        ("topk", {"k": True}, "k=a bool: must be a whole number"),
        ("randomk", {"seed": 10**5000}, "seed=a int: must be a whole number below"),
        ("randomk", {"key": ["x"]}, "key=a list: must be text"),
        ("none", {"shape": [3, -50, 40]}, "must be a list of sizes"),
        ("none", {"shape": [3, True, 40]}, "must be a list of sizes"),
        ("none", {"shape": "all"}, "must be a list of sizes"),
        ("none", {"shape": [0, 10**30]}, "each from 0 and below"),
        ("none", {"shape": [0, 2**62, 2**62]}, "each from 0 and below"),
        ("none", {"shape": [0, *[2**31 - 1] * 9]}, "has more than 16777216 elements"),
        ("none", {"shape": [1] * 10**5}, "100000 dimensions"),
        ("none", {"dtype": "object"}, "dtype='object'"),
        ("none", {"dtype": ["fp32"]}, "dtype=a list"),
        ("efsign", {"shape": [2**20]}, "754 bytes where 'efsign' has"),
        ("acpsgd", {"r": 100}, "r=100: must be from 1 to 40"),
        ("none", {"method": "pickle\nas root"}, r"method='pickle\\nas root'"),
        ("none", {"method": {}}, "method=a dict"),
    ],
)
def test_what_does_not_fit_together_is_refused(method: str, change: dict[str, Any], words: str) -> None:
    """In one line, whatever the header says: a stranger has written it."""
    payload = encode(X, CompressConfig(method=method, density=0.01))
    with pytest.raises(ValueError, match=f"^[^\n]*{words}[^\n]*$"):
        decode(dataclasses.replace(payload, header={**payload.header, **change}))


@pytest.mark.parametrize("method", ["topk", "randomk", "acpsgd"])
def test_a_few_bytes_ask_for_no_more_than_is_expected(method: str) -> None:
    """An element, or a column and a row, that claim to stand for 2**28 elements: a gigabyte, of which not one byte is
    to be had."""
    side = 2**14 if method == "acpsgd" else 2**28
    header = {"method": method, "shape": [2**28 // side, side], "dtype": "fp32"}
    size = 4 * (2**28 // side + side) if method == "acpsgd" else (8 if method == "topk" else 4)
    own = {"k": 1, "r": 1, "key": "", "seed": 0, "step": 0}
    payload = Payload({**header, **own}, torch.zeros(size, dtype=torch.uint8))
    live = Live()
    for expected in ({}, {"max_elements": 1000}, {"shape": (2**28,)}):
        with live, pytest.raises(ValueError, match=r"16777216|1000 elements|\[268435456\] is expected"):
            decode(payload, **expected)  # type: ignore[arg-type]
    assert live.largest < 2**20


def test_as_many_elements_as_are_expected_arrive() -> None:
    payload = encode(X, CompressConfig(method="topk", density=0.01))
    assert torch.equal(decode(payload, shape=X.shape), decode(payload, max_elements=X.numel()))
    with pytest.raises(ValueError, match="has more than 5999 elements"):
        decode(payload, max_elements=X.numel() - 1)


@pytest.mark.parametrize("data", [torch.zeros(6000), torch.zeros(3, 8000, dtype=torch.uint8), b"bytes"])
def test_what_are_not_bytes_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match=r"^decode: [^\n]*$"):
        decode(dataclasses.replace(encode(X, CompressConfig(method="none")), data=data))


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 20), (torch.float16, 40)])
def test_factors_that_are_no_smaller_are_not_sent(dtype: torch.dtype, width: int) -> None:
    """r (N + M) fp32 numbers for N M, which may have 16 bits: where they are as many bytes or more it arrives whole."""
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    most = (x.nbytes - 1) // (4 * (40 + width))
    for r, whole in ((most, False), (most + 1, True)):
        payload = encode(x, CompressConfig(r=r))
        assert (payload.header["method"] == "none") is whole
        assert payload.data.nbytes <= x.nbytes
        assert torch.equal(decode(payload), x) is whole


def test_what_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.int64; compressors are for"):
        encode(torch.arange(3), CompressConfig())
    with pytest.raises(ValueError, match="method=efsign"):
        encode(X, CompressConfig(method="sign"))
