"""A saved adapter is B and a seed: half of peft's file, the same model again, and never a torn or a wrong one."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import adapter_harness
import pytest
import torch
from adapter_harness import IDS, MLP, TARGETS, everything, learnt, matrices, mlp, outputs, tiny
from safetensors.torch import load_file, save_file

from llmsys.lorafa import LoRAFAConfig, inject, layer, load_adapter, merge, names, save_adapter, set_adapter, to_peft
from llmsys.lorafa.store import CONTENTS, FILE, META, fingerprint, read


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"init": "gaussian", "correction": "closed_form", "share_a": True, "seed": 5},
        {"init": "select", "dtype": "model", "targets": ("q_proj", "lm_head")},
        {"init": "weight_svd"},
        {"init": "pca", "share_a": True},
        {"train_a": True},
    ],
    ids=lambda config: "-".join(map(str, config.values())) or "default",
)
def test_what_is_saved_is_loaded_again(tmp_path: Path, config: dict[str, Any], dtype: str) -> None:
    """By a plain model, and by one that has the adapter at its start; into the tensors that an optimizer holds."""
    config = LoRAFAConfig(r=4, **config)
    model = learnt(inject(tiny(dtype=dtype), config, "mine", batches=[IDS]), "mine")
    save_adapter(model, tmp_path, "mine")
    loaded = load_adapter(tiny(dtype=dtype), tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    again = inject(tiny(dtype=dtype), config, batches=[IDS[:1]])
    held = [p for p in again.parameters() if p.requires_grad]
    load_adapter(again, tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    assert [id(p) for p in again.parameters() if p.requires_grad] == [id(p) for p in held]
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in again.named_parameters()
    }


def test_a_file_holds_no_a_and_is_about_half_of_pefts(tmp_path: Path) -> None:
    """B's share of an adapter: half of a square layer's, 54 % over LLaMA's seven, whose gate and up are wide. The
    header takes another percent of so small a model."""
    model = learnt(inject(tiny(hidden_size=256, intermediate_size=688), LoRAFAConfig(r=16)))
    own = save_adapter(model, tmp_path / "ours")
    peft = to_peft(model, tmp_path / "peft") / "adapter_model.safetensors"
    assert {name.rpartition(".")[2] for name in load_file(own)} == {"B"}
    ratio = own.stat().st_size / peft.stat().st_size
    share = (5 + 2 * 2.69) / (6 + 2.69 + 5 + 2 * 2.69)
    assert share < ratio < share + 0.01, ratio


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_file_fits_a_base_in_another_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    """A's entries are bf16's. fp16 rounds the smallest, and says so neither when it saves nor when it loads."""
    save_adapter(mlp(dtype=dtype), tmp_path)
    loaded = load_adapter(MLP(), tmp_path)
    a, expected = matrices(loaded), matrices(mlp())
    assert all(torch.equal(a[name], expected[name]) for name in expected)
    assert torch.equal(outputs(load_adapter(MLP(dtype), tmp_path)), outputs(mlp(dtype=dtype)))


def test_biases_and_a_new_head_are_saved_too(tmp_path: Path) -> None:
    model = mlp(bias="lora_only")
    torch.nn.init.ones_(model.head.weight)
    save_adapter(model, tmp_path, modules=["head"])
    loaded = load_adapter(MLP(), tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    assert loaded.head.weight.requires_grad, "as B: what was trained can be trained on"
    with pytest.raises(ValueError, match="modules=neck: this model has no such module"):
        save_adapter(model, tmp_path, modules=["neck"])
    with pytest.raises(ValueError, match="modules=first: has adapters itself"):
        save_adapter(model, tmp_path, modules=["first"])


def test_a_model_that_is_one_layer(tmp_path: Path) -> None:
    """Whose path is empty, and which takes a vector as nn.Linear does."""
    base = MLP().first
    config = LoRAFAConfig(r=2, targets=("",))
    model = learnt(inject(base, config))
    save_adapter(model, tmp_path)
    x = torch.linspace(-1, 1, 16)
    assert not torch.equal(model(x), MLP().first(x))
    assert torch.equal(load_adapter(MLP().first, tmp_path)(x), model(x))


def test_loaded_adapters_stand_beside_others(tmp_path: Path) -> None:
    save_adapter(mlp("one", r=4), tmp_path, "one")
    model = mlp("two")
    load_adapter(model, tmp_path, "one")
    assert names(model) == ["two", "one"]
    assert torch.equal(outputs(model), outputs(mlp("one", r=4)))
    set_adapter(model, "two")
    assert torch.equal(outputs(model), outputs(mlp("two")))


def test_an_adapter_loaded_into_one_that_is_there_is_the_active_one(tmp_path: Path) -> None:
    """And never into one that is merged: the weights would keep what was merged before."""
    model = mlp("one")
    save_adapter(model, tmp_path, "one")
    wanted = outputs(model)
    learnt(inject(model, LoRAFAConfig(r=2, targets=TARGETS), "two"), "two")
    assert torch.equal(outputs(load_adapter(model, tmp_path, "one")), wanted)
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"one"}
    merge(model)
    with pytest.raises(ValueError, match="load_adapter: the adapter is merged into the weights"):
        load_adapter(model, tmp_path, "one")


def test_a_state_dict_of_another_draw_is_refused() -> None:
    """It holds no A: without a word on which that was, B would be run beside another. Casts do not change that word."""
    state = {key: tensor.double() for key, tensor in mlp(seed=1).state_dict().items()}
    model = mlp(seed=1)
    model.load_state_dict(state)
    assert torch.equal(outputs(model), outputs(mlp(seed=1)))
    with pytest.raises(
        ValueError, match=r"first.adapters.default.B: was trained beside another A than .* seed=0, first"
    ):
        mlp().load_state_dict(state)
    mlp().load_state_dict({key: tensor for key, tensor in state.items() if not key.endswith("draw")})  # an older one


@pytest.mark.parametrize("config", [{}, {"share_a": True, "correction": "closed_form"}, {"train_a": True}], ids=str)
def test_an_adapter_that_gets_memory_later_starts_as_any_does(config: dict[str, Any], tmp_path: Path) -> None:
    """What `to_empty` leaves in memory is anything; a seeded A is in no state dict that would mend it."""
    config = LoRAFAConfig(r=2, targets=TARGETS, init="gaussian", **config)
    model = MLP().to("meta")
    save_adapter(mlp(), tmp_path)
    with pytest.raises(ValueError, match="load_adapter: first is on the meta device, which holds nothing"):
        load_adapter(model, tmp_path)
    inject(model, config).to_empty(device="cpu").load_state_dict(MLP().state_dict(), strict=False)
    fresh = inject(MLP(), config)
    assert torch.equal(outputs(model), outputs(fresh))
    assert torch.equal(outputs(learnt(model)), outputs(learnt(fresh)))


def test_a_state_that_an_engine_has_gathered_is_saved_in_place_of_the_models(tmp_path: Path) -> None:
    model = mlp()
    state = {path: torch.full_like(p, 2.0) for path, p in model.named_parameters() if p.requires_grad}
    save_adapter(model, tmp_path, state=state)
    assert all((tensor == 2).all() for tensor in load_file(tmp_path / FILE).values())


def refused(model: Any, folder: Path, message: str, name: str = "default") -> str:
    """The one line with which a file is refused; nothing at all has changed then."""
    before = everything(model)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, folder, name)
    assert everything(model) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder: Path, change: Any) -> None:
    """Gives a file what `change` makes of its header and tensors."""
    from safetensors import safe_open

    with safe_open(folder / FILE, framework="pt") as file:
        meta = file.metadata()
        header, tensors = json.loads(meta[META]), load_file(folder / FILE)
    change(header, tensors)
    save_file(tensors, folder / FILE, {**meta, META: json.dumps(header), CONTENTS: fingerprint(tensors)})


def other_hash(header: dict[str, Any], tensors: Any) -> None:
    header["layers"]["second"]["a"] = "0" * 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: h.update(format=2), "has format 2; this llmsys reads 1"),
        (lambda h, t: h["config"].update(seed=1), "A of first is not the one it was trained with: the hashes differ"),
        (other_hash, "A of second is not the one it was trained with: the hashes differ"),
        (lambda h, t: h["config"].update(knob=1), "this llmsys knows no knob"),
        (lambda h, t: h["config"].update(init="best"), "init=best: must be one of"),
        (lambda h, t: h.pop("layers"), "damaged, or no adapter of llmsys: KeyError 'layers'"),
        (lambda h, t: h["layers"]["second"].update(shares="first"), "damaged: second cannot share the A of first"),
        (lambda h, t: t.pop("second.B"), r"lacks second\.B"),
        (lambda h, t: t.update(third=torch.ones(1)), "has an unknown third"),
        (lambda h, t: t.update({"first.B": torch.ones(3, 2)}), r"first\.B has shape \(3, 2\), not \(32, 2\)"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused_and_nothing_has_changed(
    tmp_path: Path, change: Any, message: str
) -> None:
    save_adapter(mlp(), tmp_path)
    rewrite(tmp_path, change)
    for model in (MLP(), mlp(alpha=8)):
        assert str(tmp_path / FILE) in refused(model, tmp_path, message)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """A's hash tells nothing of B, which is all that was learnt."""
    file = save_adapter(mlp(), tmp_path)
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    refused(MLP(), tmp_path, "damaged: its tensors are not those that were saved")


def test_a_second_adapter_with_modules_of_its_own_is_refused(tmp_path: Path) -> None:
    """They are the model's, one for all adapters: the first would go on with what was trained beside the second."""
    save_adapter(mlp(), tmp_path, modules=("head",))
    one = load_adapter(MLP(), tmp_path, "one")
    told = refused(one, tmp_path, "brings head of its own, and a model has one of each for all adapters", "two")
    assert "load it into another copy of the base, delete_adapter one first, or save it without `modules`" in told


def test_what_cannot_be_written_into_is_refused_before_anything_is(tmp_path: Path) -> None:
    """A head that has no memory yet, one that FSDP2 has cut, and blocks that transformers does not compute again."""
    save_adapter(mlp(), tmp_path / "head", modules=("head",))
    save_adapter(mlp(), tmp_path / "block")
    rewrite(tmp_path / "block", lambda header, tensors: header["config"].update(recompute="block"))
    bare, cut, blocks = MLP(), MLP(), MLP()
    bare.head.to("meta")
    cut.head.weight._local_tensor = torch.ones(1)  # type: ignore[attr-defined]  # as a DTensor has
    blocks.layers = torch.nn.ModuleList([torch.nn.Tanh()])
    refused(bare, tmp_path / "head", r"load_adapter: head\.weight is on the meta device")
    refused(cut, tmp_path / "head", r"load_adapter: head\.weight is cut over ranks")
    refused(blocks, tmp_path / "block", "recompute=block: is for transformers, and MLP is none")


def test_a_model_is_as_it_was_where_there_is_no_memory_for_the_last_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(mlp(), tmp_path)
    make, made = layer.Adapter.__init__, []

    def second(self: Any, *args: Any, **more: Any) -> None:
        made.append(self)
        if len(made) == 2:
            raise torch.OutOfMemoryError
        make(self, *args, **more)

    monkeypatch.setattr(layer.Adapter, "__init__", second)
    model = MLP()
    before = everything(model)
    with pytest.raises(torch.OutOfMemoryError):
        load_adapter(model, tmp_path)
    assert everything(model) == before


@pytest.mark.parametrize("damage", ["missing", "cut", "garbage", "foreign"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, damage: str) -> None:
    file = save_adapter(mlp(), tmp_path)
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    elif damage == "garbage":
        file.write_bytes(b"\x80\x04garbage" * 99)
    else:
        save_file({"weight": torch.ones(1)}, file)
    refused(MLP(), tmp_path, f"^{file}: (no such file|damaged)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 128}, r"model\.layers\.0\.self_attn\.q_proj is 64 x 64, not 128 x 128"),
        ({"num_layers": 1}, r"model\.layers\.1\.self_attn\.q_proj is no linear layer of this one"),
        ({"num_layers": 3}, r"it has nothing for model\.layers\.2\.self_attn\.q_proj"),
        ({"family": "gpt2"}, r"model\.layers\.0\.self_attn\.q_proj is no linear layer of this one"),
    ],
)
def test_an_adapter_for_another_model_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_adapter(learnt(inject(tiny(), LoRAFAConfig(r=4))), tmp_path)
    refused(tiny(**changes), tmp_path, f"is for another model: {message}")


def test_an_adapter_of_the_same_name_in_another_shape_is_refused(tmp_path: Path) -> None:
    save_adapter(mlp(), tmp_path)
    for other, what in (
        ({"r": 3}, "has another r"),
        ({"seed": 1}, "has another seed"),
        ({"targets": ("first",)}, "is beside other"),
    ):
        refused(mlp(**other), tmp_path, f"name=default: {what}.* load that under another name")


def test_an_a_that_was_written_into_is_not_saved_as_its_seed(tmp_path: Path) -> None:
    model = mlp()
    model.second.adapters["default"].A[0, 0] += 1
    with pytest.raises(ValueError, match="A of second is not what seed=0 gives"):
        save_adapter(model, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_part_that_was_adapted_is_saved_as_that_part(tmp_path: Path) -> None:
    """A's draw has the name that its layer had: under another one the file could not be loaded."""
    whole = torch.nn.Sequential(mlp())
    with pytest.raises(ValueError, match=r"0\.first was first when its A was drawn"):
        save_adapter(whole, tmp_path)
    save_adapter(whole[0], tmp_path)


def test_what_torch_compile_wraps_has_the_names_inside(tmp_path: Path) -> None:
    compiled = torch.compile(MLP(), backend="eager")
    inject(compiled, LoRAFAConfig(r=2, targets=TARGETS))
    save_adapter(learnt(compiled), tmp_path)
    assert torch.equal(outputs(load_adapter(MLP(), tmp_path)), outputs(mlp()))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    save_adapter(mlp(), tmp_path)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    load_adapter(MLP(), tmp_path)


def test_a_half_written_adapter_never_replaces_a_good_one(tmp_path: Path) -> None:
    """Processes of their own are killed by SIGKILL at three moments; a fourth finds no room."""
    moments = ("write", "sync", "rename", "full")
    for moment in moments:
        save_adapter(mlp(), tmp_path / moment)
    command = [sys.executable, adapter_harness.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {**dict.fromkeys(moments, -signal.SIGKILL), "full": errno.EFBIG}
    for moment in moments:
        left = os.listdir(tmp_path / moment)
        assert len(left) == (1 if moment == "full" else 2), "an unfinished file was there when the process died"
        assert torch.equal(outputs(load_adapter(MLP(), tmp_path / moment)), outputs(mlp()))
        save_adapter(mlp(alpha=7), tmp_path / moment)
        assert read(tmp_path / moment / FILE)[0].config.alpha == 7
        assert os.listdir(tmp_path / moment) == [FILE], "which the next save has removed"
