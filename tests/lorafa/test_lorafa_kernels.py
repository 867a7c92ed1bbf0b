"""Triton's kernels compute what plain torch computes, in Triton's interpreter, and are code for real GPUs."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsys.lorafa import kernels
from llmsys.lorafa.pieces.dropout import dropped

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed (pip install triton), so nothing here runs its kernels",
)


def program(name: str, cache: Path, **environment: str) -> Any:
    """What a program of this folder prints. It has a process of its own: Triton is an interpreter or it is none."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(name)],
        env={**os.environ, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Differences between kernels and plain torch, by what was compared."""
    return program("kernel_harness.py", tmp_path_factory.mktemp("cache"), TRITON_INTERPRET="1")


@pytest.fixture
def fresh() -> Iterator[None]:
    """The choice is made anew."""
    kernels._chosen.cache_clear()
    yield
    kernels._chosen.cache_clear()


@needs_triton
@pytest.mark.parametrize("what", [pytest.param("norms", marks=pytest.mark.slow), "gates", "blocks"])
def test_outputs_and_gradients_are_those_of_plain_torch(interpreted: Any, what: str) -> None:
    """fp32 to the order of sums and the last bit of exp. Narrower types round where torch rounds, so hardly a bit
    differs: none of norms and of a SwiGLU block, at most 2 % of elements (by their last bit) behind erf and tanh."""
    found = interpreted[what]
    assert len(found) >= 3
    for name, differs in found.items():
        assert differs["norm"] < (1e-6 if "fp32" in name else 1e-5), name
        assert "fp32" in name or differs["bits"] < (0.02 if "gelu" in name else 1e-3), name


@needs_triton
def test_a_mask_is_a_function_of_seed_and_place(interpreted: Any) -> None:
    for name, found in interpreted["masks"].items():
        assert found["dropped"] == pytest.approx(0.1, abs=0.005), "two deviations of 16,650 draws"
        assert found["scaled"], name
        assert found["again"], name
        assert found["backward"], "the gradient is dropped where the output was"
        for other in ("agree", "neighbours"):  # independent: both kept or both dropped
            assert found[other] == pytest.approx(0.9**2 + 0.1**2, abs=0.01), other


@needs_triton
def test_no_rows_are_no_error(interpreted: Any) -> None:
    assert interpreted["empty"]["rows"] == [0, 60]


@needs_triton
def test_every_kernel_is_code_for_a_gpu(tmp_path: Path) -> None:
    """Compiled for an H100, which need not be here; what becomes bf16 there is rounded to nearest."""
    found = program("kernel_compiler.py", tmp_path)
    assert len(found) == 11
    for kernel in found:
        assert kernel["bytes"] > 1000, kernel
        assert all(form.startswith("cvt.rn.bf16") for form in kernel["to_bf16"]), kernel


@pytest.mark.usefixtures("fresh")
def test_a_cpu_is_left_to_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for choice in ("", "torch"):
        monkeypatch.setenv(kernels.VARIABLE, choice)
        assert not kernels.serve(torch.ones(3))
    x = torch.ones(1000)
    assert torch.equal(dropped(x, 0.5, 7), dropped(x, 0.5, 7))


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("choice", "there", "said"),
    [
        ("", True, "by triton (Triton is installed)"),
        ("", False, "by torch (Triton is not installed)"),
        ("torch", True, "by torch (LLMSYS_KERNELS=torch)"),
        ("triton", True, "by triton (LLMSYS_KERNELS=triton)"),
    ],
)
def test_the_choice_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, choice: str, there: bool, said: str
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(kernels.VARIABLE, choice)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)
    with caplog.at_level(logging.INFO, "llmsys"):
        served = [kernels.serve(torch.ones(3)) for _ in range(2)]
    assert served == ["by triton" in said] * 2
    assert [record.message for record in caplog.records] == [f"lorafa: norms, gates and dropout {said}"]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("choice", "words"), [("cuda", "must be torch or triton"), ("triton", "pip install triton")])
def test_what_cannot_be_chosen_is_refused(monkeypatch: pytest.MonkeyPatch, choice: str, words: str) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(kernels.VARIABLE, choice)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"{kernels.VARIABLE}={choice}: .*{words}"):
        kernels.serve(torch.ones(3))


@pytest.mark.gpu
@needs_triton
def test_on_a_gpu_too() -> None:
    """The same comparisons with real kernels against torch's own, whose exponentials differ in the last bit too."""
    import kernel_harness

    torch.manual_seed(0)
    with torch.device("cuda"):
        assert kernels.serve(torch.ones(2))
        for what in (kernel_harness.norms, kernel_harness.gates, kernel_harness.blocks):
            for name, differs in what().items():
                assert differs["norm"] < (3e-6 if "fp32" in name else 3e-3), name
        for found in kernel_harness.masks().values():
            assert found["again"]
            assert found["backward"]
