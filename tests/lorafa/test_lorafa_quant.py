"""Over a base of NF4 or of 8-bit integers: the same bytes are kept as over a full one, none of them a layer's input,
and the gradients are those of the dequantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lorafa_harness import adapter_grads, batch, error, with_adapters
from torch import nn

import rank_runs
from llmsys import models, schema
from llmsys.comm.place import Place
from llmsys.context import Context
from llmsys.lorafa import basis, store
from llmsys.lorafa.blocks import fuse_blocks
from llmsys.lorafa.layer import adapted_class
from llmsys.lorafa.targets import adapted
from llmsys.profile.live import Live
from llmsys.profile.memory import saved_tensors

FORMATS = ["nf4", "int8"]
CPU = torch.device("cpu")


def make(quant: str, family: str = "llama", dtype: str = "fp32", policy: str = "none", **config: Any) -> Any:
    """A tiny model with adapters that have learnt."""
    cfg = schema.Transformer(family=family, quant=quant, dtype=dtype, tie_embeddings=family == "t5")
    base = models.load(cfg, objective=cfg.objective, num_labels=3, device=CPU, seed=0, folder=None)
    model = with_adapters(base, **config)
    fuse_blocks(model, policy)
    return model


def inputs(family: str = "llama") -> dict[str, Any]:
    found = batch(family, padding=0)
    if family == "bert":
        del found["use_cache"]
        found["labels"] = torch.arange(2)
    return found


@pytest.mark.parametrize("quant", FORMATS)
def test_one_layer_at_a_time_is_there_in_full(quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is packed needs memory for the packed weights and one more layer, not for the model in full width."""
    from llmsys.models import filling

    held: list[int] = []
    fill = filling.Filler.__call__
    built: list[nn.Module] = []
    begin = filling.Filler.__init__

    def begun(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        built.append(model)
        begin(self, model, *args, **kwargs)

    def watched(self: Any, module: nn.Module) -> None:
        fill(self, module)
        held.append(sum(type(m) is nn.Linear and not m.weight.is_meta for m in built[0].modules()))

    monkeypatch.setattr(filling.Filler, "__init__", begun)
    monkeypatch.setattr(filling.Filler, "__call__", watched)
    cfg = schema.Transformer(quant=quant)
    models.load(cfg, objective=cfg.objective, num_labels=0, device=CPU, seed=0, folder=None)
    assert held == [1] * (7 * cfg.num_layers) + [1]  # at the end the head


def dequantised(model: nn.Module) -> nn.Module:
    """The same model and adapters on `nn.Linear` layers with the weights that the few bits stand for."""
    for _, layer in adapted(model):
        weight = layer.dequantised(torch.float32)
        plain: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        layer.__dict__["dense"] = plain
    for path, layer in list(adapted(model)):
        plain = layer.__dict__.pop("dense")
        plain.adapters, plain.active, plain.merged = layer.adapters, layer.active, None
        plain.__class__ = adapted_class(nn.Linear)
        model.set_submodule(path, plain)
    return model


CASES = [("fp32", "none", False), ("bf16", "mlp", False), ("bf16", "none", True)]
SLOW = [(d, p, t) for d in ("fp32", "bf16") for p in ("none", "mlp", "attn+mlp") for t in (False, True)]


@pytest.mark.parametrize("cases", [CASES, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["some", "all"])
def test_no_byte_more_is_kept_than_over_a_full_base(cases: list[tuple[str, str, bool]]) -> None:
    """By hooks, and by a counter of live bytes, which sees what an autograd node holds by itself too: bitsandbytes'
    int8 product holds its input. The loss itself, 4 bytes, is alive without being kept."""
    for dtype, policy, train_a in cases:
        ledger = []
        for quant in ("none", *FORMATS):
            model = make(quant, dtype=dtype, policy=policy, train_a=train_a)
            ledger.append(saved_tensors(model, lambda model=model: model(**inputs()).loss))
            with Live() as live:
                loss = model(**inputs()).loss
            assert live.now == ledger[-1] + loss.nbytes, (quant, dtype, policy)
        assert len(set(ledger)) == 1, (dtype, policy, train_a)


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("family", ["llama", "bert", pytest.param("t5", marks=pytest.mark.slow)])
def test_gradients_are_those_of_the_dequantised_weights(quant: str, family: str) -> None:
    """The losses to the bit, since the same products are made."""
    for config in ({}, {"train_a": True}, {"share_a": True, "correction": "closed_form"}):
        model, reference = (make(quant, family, **config) for _ in range(2))
        reference = dequantised(reference)
        losses = [m.train()(**inputs(family)).loss for m in (model, reference)]
        for loss in losses:
            loss.backward()
        assert losses[0] == losses[1]
        found, expected = adapter_grads(model), adapter_grads(reference)
        assert found.keys() == expected.keys()
        assert all(error(found[name], expected[name]) < 1e-6 for name in found)
        assert all(gradient.any() for gradient in found.values())


TINY = ["train.length=16", "method.r=4", "train.steps=6", "dispatch.kind=inline", "method.dropout=0.1"]
TINY += ["train.recompute='none:1,mlp:1'", "train.lr_by_method.lorafa=1e-2", "train.lr_by_method.lora=1e-2"]


def train(results: Path, quant: str, *overrides: str, stop_after: int | None = None) -> dict[str, Any]:
    seen: list[Context] = []
    words = [*TINY, f"model.quant={quant}", *overrides]
    found = rank_runs.run(Place(), str(results), words, stop_after, seen)
    assert found["status"] in ("ok", "interrupted"), found["error"]
    engine: Any = seen[0].engine
    for path, layer in adapted(engine.model):
        config, a = layer.adapter.config, layer.adapter.a
        if not config.train_a:
            drawn = basis.draw(config.init, config.r, a.shape[1], config.seed, path)
            assert basis.fingerprint(a) == basis.fingerprint(drawn)
    return found


@pytest.mark.parametrize("quant", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["lorafa", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_run_learns_and_goes_on_with_the_same_bits(quant: str, method: str, tmp_path: Path) -> None:
    """As far down as over the full base, with A as it was drawn; the base is quantised again when the run goes on."""
    words = [f"method={method}"]
    full, whole = train(tmp_path / "full", "none", *words), train(tmp_path / "whole", quant, *words)
    falls = [found["losses"][0] - found["losses"][-1] for found in (full, whole)]
    assert falls[1] == pytest.approx(falls[0], rel=0.3)
    assert falls[1] > 0
    assert whole["losses"] != full["losses"]
    assert whole["summary"]["saved_bytes"] == full["summary"]["saved_bytes"]
    assert train(tmp_path / "cut", quant, *words, stop_after=3)["status"] == "interrupted"
    again = train(tmp_path / "cut", quant, *words)
    assert again["losses"] == whole["losses"]
    first, second = (store.read(Path(found["out"]) / "weights" / store.FILE) for found in (whole, again))
    assert first[0].text() == second[0].text()
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1].keys() | second[1].keys())
