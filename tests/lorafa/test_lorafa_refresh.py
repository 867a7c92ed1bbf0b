"""Merge and redraw: the function stays, the span moves on, and what was learnt still fits the original base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_harness import IDS, MLP, TARGETS, learnt, matrices, mlp, outputs, tiny

from llmsys.lorafa import (
    LoRAFAConfig,
    delete_adapter,
    disable_adapter,
    from_peft,
    inject,
    load_adapter,
    merge,
    refresh,
    save_adapter,
    to_peft,
    unload,
)
from llmsys.lorafa.basis import draw
from llmsys.lorafa.refreshing import carried


def adapters(model: Any) -> list[Any]:
    return [layer.adapters["default"] for layer in model.modules() if hasattr(layer, "adapters")]


def test_a_refresh_changes_the_directions_and_not_the_function() -> None:
    model = mlp()
    before, old = outputs(model), matrices(model)
    refresh(model)
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-5)
    new = matrices(model)
    for path, adapter in zip(TARGETS, adapters(model), strict=True):
        assert torch.equal(new[f"{path}.adapters.default.A"], draw("orthonormal", 2, adapter.A.shape[1], 0, path, 1))
        assert not torch.equal(new[f"{path}.adapters.default.A"], old[f"{path}.adapters.default.A"])
        assert not adapter.B.any()


def test_the_updates_of_several_draws_add_up_to_a_higher_rank() -> None:
    """COLA's point: one adapter of r = 2 cannot leave 2 dimensions."""
    model, base = mlp(), MLP().first.weight
    for seed in (2, 3, 4):
        refresh(model)
        learnt(model, seed=seed)
    merge(model)
    assert torch.linalg.matrix_rank(model.first.weight - base, rtol=1e-4) == 8


@pytest.mark.parametrize("config", [{}, {"share_a": True, "init": "gaussian", "correction": "closed_form"}])
def test_a_refreshed_adapter_fits_the_original_base(tmp_path: Path, config: dict[str, Any]) -> None:
    """Bit for bit: the same terms are merged in the same order."""
    model = learnt(inject(tiny(), LoRAFAConfig(r=4, **config)))
    for seed in (2, 3):
        refresh(model)
        learnt(model, seed=seed)
    save_adapter(model, tmp_path)
    loaded = load_adapter(tiny(), tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    refresh(loaded)
    refresh(model)
    assert torch.equal(outputs(learnt(loaded)), outputs(learnt(model))), "and both go on alike"
    if config.get("correction"):
        for mine, theirs in zip(adapters(loaded), adapters(model), strict=True):
            assert torch.equal(mine.inverse, theirs.inverse)


def test_a_file_is_loaded_into_the_refreshed_model_itself_and_into_no_other(tmp_path: Path) -> None:
    model = mlp()
    save_adapter(model, tmp_path / "before")
    refresh(model)
    learnt(model, seed=4)
    save_adapter(model, tmp_path / "after")
    kept = outputs(model)
    learnt(model, seed=5)
    assert torch.equal(outputs(load_adapter(model, tmp_path / "after")), kept)
    with pytest.raises(ValueError, match="name=default: was refreshed otherwise than"):
        load_adapter(model, tmp_path / "before")
    with pytest.raises(ValueError, match="was refreshed, which would change what other adapters stand beside"):
        load_adapter(mlp("other"), tmp_path / "after")


def test_a_state_dict_brings_the_draws_along() -> None:
    """As a trainer's checkpoint of the whole model does: its weights hold what was merged, so A has to be the later."""
    model = mlp()
    refresh(model)
    learnt(model, seed=4)
    state = copy.deepcopy(model.state_dict())
    other = mlp()
    other.load_state_dict(state)
    assert torch.equal(outputs(other), outputs(model))
    assert [len(adapter.past) for adapter in adapters(other)] == [1, 1]
    other.load_state_dict(mlp().state_dict())
    assert torch.equal(outputs(other), outputs(mlp()))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's call
def test_peft_gets_all_draws_as_one_adapter_of_the_sum_of_their_ranks(tmp_path: Path) -> None:
    from peft import PeftModel

    model = learnt(inject(tiny(), LoRAFAConfig(r=4)))
    refresh(model)
    learnt(model, seed=2)
    to_peft(model, tmp_path)
    theirs = PeftModel.from_pretrained(tiny(), str(tmp_path)).eval()
    assert theirs.peft_config["default"].r == 8
    torch.testing.assert_close(outputs(theirs), outputs(model), rtol=0, atol=1e-4 * float(outputs(model).std()))
    torch.testing.assert_close(outputs(from_peft(tiny(), tmp_path)), outputs(theirs), rtol=0, atol=1e-6)


def trained(model: MLP, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for seed in range(steps):
        x = torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("correction", ["none", "closed_form"])
@pytest.mark.parametrize("init", ["orthonormal", "gaussian", "select"])
def test_the_first_moment_is_the_old_gradients_seen_along_the_new_directions(init: str, correction: str) -> None:
    """Of a gradient within the span of the old A, which is all that its moment knows of it, nothing is lost."""
    config = LoRAFAConfig(r=4, init=init, correction=correction, targets=("first",))
    model = inject(MLP(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.99))
    trained(model, optimizer)
    adapter = model.first.adapters["default"]
    gradient = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)) @ adapter.A  # of W, in the span of A

    def seen() -> torch.Tensor:
        return adapter.corrected(gradient @ adapter.A.T) * adapter.scale

    moments = optimizer.state[adapter.B]
    moments["exp_avg"].copy_(seen())
    steps = moments["step"].clone()
    refresh(model, optimizer)
    torch.testing.assert_close(moments["exp_avg"], seen(), rtol=1e-3, atol=1e-4)
    assert (moments["exp_avg_sq"] > 0).all(), "a zero would make the next step 1 / sqrt(1 - beta_2) too long"
    assert torch.equal(moments["step"], steps)
    trained(model, optimizer)


def test_the_second_moment_keeps_its_size_in_directions_that_were_never_seen() -> None:
    """Its expectation over random directions, of a gradient of which only the row's size is known."""
    generator = torch.Generator().manual_seed(0)
    n, r = 400, 4
    rows = torch.randn(5, 300, n, generator=generator, dtype=torch.float64)  # of 300 steps
    rows *= torch.tensor([1.0, 2, 4, 8, 16]).view(5, 1, 1)
    old, new = (draw("orthonormal", r, n, seed, "x").double() for seed in (0, 1))
    second = (rows @ old.T).square().mean(1)
    _, moved = carried(second, second, 3 * old @ new.T)
    torch.testing.assert_close(moved, (rows @ new.T).square().mean(1), rtol=0.4, atol=0)
    same_first, same_second = carried(second, second, torch.eye(r, dtype=torch.float64))
    assert torch.equal(same_first, second)
    assert torch.equal(same_second, second)


def test_momentum_of_sgd_is_carried_too_and_alike_in_every_dtype() -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        model = mlp(dtype=dtype)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)
        trained(model, optimizer)
        before = optimizer.state[adapters(model)[0].B]["momentum_buffer"].clone()
        refresh(model, optimizer)
        found.append(optimizer.state[adapters(model)[0].B]["momentum_buffer"])
        assert not torch.allclose(found[-1], before)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def factored(model: MLP) -> Any:
    optimizer = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad])
    trained(model, optimizer, 1)
    return optimizer


@pytest.mark.parametrize(
    ("make", "optimizer", "message"),
    [
        (lambda: mlp(train_a=True), None, "refresh: train_a=True: a trained A has no draw"),
        (lambda: mlp(init="weight_svd"), None, "refresh: init=weight_svd: has no next draw; orthonormal, gaussian"),
        (MLP, None, "refresh: needs one adapter, and that active; there are none"),
        (lambda: learnt(inject(mlp(), LoRAFAConfig(r=2, targets=TARGETS), "b"), "b"), None, "there are default, b"),
        (lambda: merge(mlp()), None, "refresh: the adapter is merged"),
        (lambda: inject(tiny(quant="nf4"), LoRAFAConfig(r=2)), None, "refresh: .*q_proj is quantised"),
        (mlp, factored, "refresh: Adafactor keeps (row|col)_var, which cannot be carried to a new A"),
        (mlp, lambda m: torch.optim.AdamW(m.head.parameters()), "refresh: the optimizer does not train B of first"),
        (mlp, lambda m: {}, r"refresh: a dict is no torch\.optim\.Optimizer"),
    ],
)
def test_what_cannot_be_refreshed_says_so(make: Any, optimizer: Any, message: str) -> None:
    model = make()
    made = None if optimizer is None else optimizer(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        refresh(model, made)
    same = torch.nan_to_num  # packed bits may be NaN
    assert all(torch.equal(same(tensor), same(before[name])) for name, tensor in model.state_dict().items())


def test_what_needs_the_original_base_says_so() -> None:
    model = refresh(mlp())
    for what, call in {
        "disable_adapter": lambda: disable_adapter(model).__enter__(),
        "delete_adapter": lambda: delete_adapter(model, "default"),
        "inject": lambda: inject(model, LoRAFAConfig(r=2, targets=TARGETS), "b"),
        "unload": lambda: unload(model),
    }.items():
        with pytest.raises(ValueError, match=f"{what}: refresh has merged into the weights"):
            call()
    merged = outputs(merge(model, keep=False))
    assert torch.equal(outputs(unload(model)), merged)


def test_a_step_after_a_refresh_trains_the_new_b() -> None:
    model = inject(tiny(), LoRAFAConfig(r=4, share_a=True)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
        refresh(model, optimizer)
    loss = model(input_ids=IDS, labels=IDS).loss
    assert loss < tiny()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(adapter.B.grad.any() for adapter in adapters(model))
