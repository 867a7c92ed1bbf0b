"""`method=lora` and `method=lorafa` from the command line: every setting of the configuration is one of the adapter
that is trained, and what A was does not depend on an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_harness import mlp

import rank_runs
from llmsys import compose, schema
from llmsys.comm.place import Place
from llmsys.context import Context
from llmsys.lorafa import basis, load_adapter, save_adapter
from llmsys.lorafa.methods import LoRAFA
from llmsys.lorafa.targets import adapted, weight

TINY = ["train.length=16", "method.r=4", "train.lr_by_method.lorafa=1e-2", "dispatch.kind=inline"]
TINY += ["method=lorafa", "train.save_final=false", "profile.probe=false"]


def run(results: Path, *overrides: str, stop_after: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(`rank_runs.run`, the adapted layers that it leaves by path)"""
    seen: list[Context] = []
    found = rank_runs.run(Place(), str(results), [*TINY, *overrides], stop_after, seen)
    assert found["status"] in ("ok", "interrupted"), found["error"]
    engine: Any = seen[0].engine
    return found, dict(adapted(engine.model))


@pytest.mark.parametrize("init", ["gaussian", "orthonormal", "select", "weight_svd", "pca"])
def test_every_init_learns_at_the_one_rate(init: str, tmp_path: Path) -> None:
    """They are on one scale, so that a rate carries over; `pca`, whose z is the largest there is, falls furthest."""
    found, layers = run(tmp_path, f"method.init={init}")
    path, layer = next((path, layer) for path, layer in layers.items() if path.endswith("down_proj"))
    a, n = layer.adapter.a, layer.in_features
    if init in ("gaussian", "orthonormal", "select"):
        expected = basis.draw(init, 4, n, 0, path)
    elif init == "weight_svd":
        expected = basis.weight_svd(weight(layer, torch.float32), 4, 0)
    else:
        expected = a
        assert not torch.equal(a, basis.draw("orthonormal", 4, n, 0, path))
        torch.testing.assert_close(a @ a.T, torch.eye(4) / 3, atol=2e-3, rtol=0)
    assert torch.equal(a, expected)
    fall = found["losses"][0] - found["losses"][-1]
    assert 0.05 < fall < 0.5


def test_shared_a_and_the_correction_are_those_of_the_configuration(tmp_path: Path) -> None:
    """q, k and v have one A, gate and up another; the inverse is there once for each adapter, and not made again."""
    _, layers = run(tmp_path, "method.share_a=true", "method.correction=closed_form", "method.init=gaussian")
    a = {path: layer.adapter.a for path, layer in layers.items()}
    assert len({id(matrix) for matrix in a.values()}) == len(layers) * 4 // 7
    for layer in layers.values():
        matrix, inverse = layer.adapter.a.double(), layer.adapter.inverse
        torch.testing.assert_close(inverse.double() @ matrix @ matrix.T * layer.adapter.scale**2, torch.eye(4).double())


def test_a_run_with_an_a_from_its_data_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """A is in the checkpoint, what follows from it is not."""
    words = ("method.init=pca", "method.correction=closed_form", "method.dropout=0.1")
    whole, before = run(tmp_path / "whole", *words)
    assert run(tmp_path / "cut", *words, stop_after=3)[0]["status"] == "interrupted"
    again, after = run(tmp_path / "cut", *words)
    assert again["resumed"]
    assert again["losses"] == whole["losses"]
    for path in before:
        assert torch.equal(before[path].adapter.a, after[path].adapter.a)
        assert torch.equal(before[path].adapter.b, after[path].adapter.b)


@pytest.mark.parametrize("way", ["state_dict", "file", "checkpoint"])
def test_what_follows_from_a_follows_one_that_is_loaded(way: str, tmp_path: Path) -> None:
    """The inverse in the correction is not stored; over an A from elsewhere it would be another's."""
    ours, other = (mlp(init="weight_svd", correction="closed_form") for _ in range(2))
    with torch.no_grad():  # an A that this machine would not compute
        for _, layer in adapted(other):
            layer.adapter.A.copy_(basis.draw("gaussian", 2, layer.in_features, 5, "elsewhere"))
    if way == "state_dict":
        ours.load_state_dict(other.state_dict())
    elif way == "file":
        save_adapter(other, tmp_path)
        load_adapter(ours, tmp_path)
    else:
        method = LoRAFA(schema.LoRA(kind="lorafa", r=2))
        method.load_state(ours, method.state(other))
    for _, layer in adapted(ours):
        a = layer.adapter.a
        torch.testing.assert_close(layer.adapter.inverse @ a @ a.T * layer.adapter.scale**2, torch.eye(2))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.init=kaiming"], r"^method\.init=kaiming: .*orthonormal, gaussian, pca"),
        (["method.correction=yes"], r"^method\.correction=yes: .*none, closed_form"),
        (["method=lora", "method.correction=closed_form"], r"^method\.correction=closed_form: is for a frozen A"),
    ],
)
def test_what_there_is_not_is_refused_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        schema.build(compose.compose(["method=lorafa", *words]))
    assert "\n" not in str(refused.value)
