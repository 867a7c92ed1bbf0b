"""A tensor from one peer to another: what arrives, in how many bytes, and what of a stranger is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from llmsys.compress import CompressConfig, Payload, decode, encode
from llmsys.compress.codec import DTYPES

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
        ("topk", {"k": 61}, "480 bytes where topk has 488"),
        ("topk", {"k": 10**9}, "k=1000000000: must be from 1"),
        ("topk", {"k": "60"}, "k=60: must be a whole number"),
        ("none", {"shape": [3, -50, 40]}, "must be a list of sizes"),
        ("none", {"shape": "all"}, "must be a list of sizes"),
        ("none", {"shape": [2**20, 2**20]}, "elements: not what"),
        ("none", {"dtype": "object"}, "dtype=object"),
        ("efsign", {"shape": [2**30]}, "754 bytes where efsign has"),
        ("acpsgd", {"r": 100}, "r=100: must be from 1 to 40"),
        ("none", {"method": "pickle"}, "method=pickle"),
    ],
)
def test_what_does_not_fit_together_is_refused(method: str, change: dict[str, Any], words: str) -> None:
    payload = encode(X, CompressConfig(method=method, density=0.01))
    with pytest.raises(ValueError, match=words):
        decode(dataclasses.replace(payload, header={**payload.header, **change}))


def test_what_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.int64; compressors are for"):
        encode(torch.arange(3), CompressConfig())
    with pytest.raises(ValueError, match="method=efsign"):
        encode(X, CompressConfig(method="sign"))
