"""Where adapters go, and where they do not: the message says what is there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapter_harness import IDS, MLP, TARGETS, learnt, matrices, mlp, outputs, tiny
from torch import Tensor, nn

from llmsys.lorafa import LoRAFAConfig, delete_adapter, inject, load_adapter, merge, save_adapter, set_adapter, unload
from llmsys.lorafa.targets import adapted


def paths(model: nn.Module) -> list[str]:
    return [path for path, _ in adapted(model)]


def test_a_model_without_known_blocks_works_when_its_layers_are_named() -> None:
    assert paths(inject(MLP(), LoRAFAConfig(r=2, targets=TARGETS))) == ["first", "second"]
    with pytest.raises(ValueError, match=r"targets: no blocks are known in this model.*there are first, second, head"):
        inject(MLP(), LoRAFAConfig(r=2))


def test_a_head_is_adapted_only_when_it_is_named() -> None:
    assert "lm_head" not in paths(inject(tiny(), LoRAFAConfig(r=2)))
    assert paths(inject(tiny(), LoRAFAConfig(r=2, targets=("lm_head",)))) == ["lm_head"]


def test_a_full_path_is_one_layer() -> None:
    path = "model.layers.1.mlp.up_proj"
    assert paths(inject(tiny(), LoRAFAConfig(r=2, targets=(path,)))) == [path]


class Everything(nn.Module):
    """One of each that somebody might name."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv, self.norm = nn.Embedding(9, 8), nn.Conv2d(1, 4, 3), nn.LayerNorm(8)
        self.attention, self.linear = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"targets": ["q_prj"]}, "targets=q_prj: names no linear layer; there are out_proj, linear,"),
        ({"targets": ["words"]}, "targets=words: is an Embedding, which keeps token ids, not an input that a frozen A"),
        ({"targets": ["conv"]}, "targets=conv: is a Conv2d; only linear layers take adapters"),
        ({"targets": ["norm"]}, "targets=norm: is a LayerNorm"),
        ({"targets": ["attention.out_proj"]}, "nn.MultiheadAttention reads its weight without calling it"),
        ({"targets": ["linear1"]}, r"without calling it; torch\.backends\.mha\.set_fastpath_enabled\(False\) makes it"),
        ({"targets": ["linear"], "r": 9}, "r=9: exceeds the width of linear, which is 8 x 8"),
        ({"targets": ["linear"], "init": "pca"}, "init=pca: needs `batches`"),
        ({"targets": ["linear"], "init": "given"}, "init=given: is for adapters that load_adapter and from_peft read"),
        ({"targets": ["linear"], "recompute": "most"}, "recompute=most"),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_nothing_has_changed(config: dict[str, Any], message: str) -> None:
    model = Everything()
    before = {
        name: (type(module), p.requires_grad) for name, module in model.named_modules() for p in module.parameters()
    }
    with pytest.raises(ValueError, match=message) as caught:
        inject(model, LoRAFAConfig(**{"r": 2, **config}))
    assert "\n" not in str(caught.value)
    assert before == {n: (type(m), p.requires_grad) for n, m in model.named_modules() for p in m.parameters()}


def test_dora_is_refused() -> None:
    with pytest.raises(ValueError, match="use_dora=True: DoRA rescales"):
        LoRAFAConfig(use_dora=True)


@pytest.mark.parametrize("name", ["default", "a.b", "", "items"])
def test_a_name_that_is_taken_or_impossible(name: str) -> None:
    with pytest.raises(ValueError, match=f"name={name}: "):
        inject(mlp(), LoRAFAConfig(r=2, targets=TARGETS), name)


def test_torchs_own_encoder_works_once_its_fast_path_is_off() -> None:
    """Which reads weights past the layers: with it the adapter would be trained and then not used."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 1)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        learnt(inject(encoder, LoRAFAConfig(r=2)))
        assert paths(encoder) == ["layers.0.linear1", "layers.0.linear2"]
        x = torch.ones(1, 3, 16)
        with torch.no_grad():
            torch.testing.assert_close(encoder.eval()(x), encoder.train()(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_biases_are_the_adapters_own() -> None:
    """So another adapter, or none, has the base's; peft's `bias` changes the base for all."""
    model = mlp(bias="lora_only")
    base, changed = outputs(MLP()), outputs(model)
    trained = {path for path, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{layer}.adapters.default.{what}" for layer in TARGETS for what in ("B", "bias")}
    model.first.adapters["default"].B.data.zero_()
    model.second.adapters["default"].B.data.zero_()
    assert not torch.equal(outputs(model), changed)
    assert not torch.equal(outputs(model), base), "the bias alone changes the output"
    delete_adapter(model, "default")
    assert torch.equal(outputs(model), base)
    with pytest.raises(ValueError, match="bias=lora_only: no layer in targets has a bias"):
        inject(MLP(), LoRAFAConfig(r=2, targets=("head",), bias="lora_only"))


class Experts(nn.Module):
    """Two of three experts get tokens: one gets none, in an empty tensor; another is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layers[0](x[:5]), self.layers[1](x[5:5]), self.layers[2](x[5:])])


def test_experts_without_tokens_have_no_gradient_or_zero_and_training_goes_on() -> None:
    model = inject(Experts(), LoRAFAConfig(r=2, targets=("0", "1", "2", "3")))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.randn(8, 16)).square().sum().backward()
    optimizer.step()
    grads = [model.layers[i].adapters["default"].B.grad for i in range(4)]
    assert grads[0].any()
    assert not grads[1].any()
    assert grads[2].any()
    assert grads[3] is None


def test_tied_weights_have_adapters_of_their_own_and_are_not_merged() -> None:
    """GPT-2's head is the embedding's table: merging into it would change the embedding too."""
    model = learnt(inject(tiny("gpt2"), LoRAFAConfig(r=2, targets=("lm_head",))))
    assert not torch.equal(outputs(model), outputs(tiny("gpt2")))
    assert model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(ValueError, match=r"the weight of lm_head is also transformer\.wte\.weight"):
        merge(model)


def test_share_a_is_one_tensor_through_everything(tmp_path: Any) -> None:
    """A dtype, a copy, a file: a matrix that drifted into three would still train, on three times the memory."""
    model = learnt(inject(tiny(), LoRAFAConfig(r=4, share_a=True)))

    def shared(model: Any) -> tuple[int, int]:
        layers = dict(adapted(model))
        for parent, group in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
            assert len({id(layers[f"model.layers.0.{parent}.{own}"].adapters["default"].a) for own in group}) == 1
        found = {id(layer.adapters["default"].a) for layer in layers.values()}
        return len(found), len(matrices(model))

    assert shared(model) == (8, 8)
    save_adapter(model, tmp_path)
    for changed in (copy.deepcopy(model), model.bfloat16(), model.double(), load_adapter(tiny(), tmp_path)):
        assert shared(changed) == (8, 8)
        own = changed.model.layers[0].self_attn.v_proj.adapters["default"]
        assert own.a.dtype == changed.lm_head.weight.dtype
    twin = copy.deepcopy(model)
    twin.model.layers[0].self_attn.q_proj.adapters["default"].A.zero_()
    assert not twin.model.layers[0].self_attn.k_proj.adapters["default"].a.any()
    assert model.model.layers[0].self_attn.k_proj.adapters["default"].a.any()


@pytest.mark.parametrize(
    "batches",
    [[{"input_ids": IDS}], ({"input_ids": IDS[:1]} for _ in range(2)), [(IDS,)], [IDS]],
    ids=["mappings", "generator", "tuples", "tensors"],
)
def test_pca_takes_what_loaders_give(batches: Any) -> None:
    model = inject(tiny(), LoRAFAConfig(r=4, init="pca"), batches=batches)
    assert all(a.any() for a in matrices(model).values())
    assert torch.equal(outputs(model), outputs(tiny())), "no hook, and no other mode, is left"


def test_pca_sees_the_layers_of_blocks_that_are_fused_already_and_the_base_alone() -> None:
    """A second adapter's inputs are not to depend on the first's."""
    config = LoRAFAConfig(r=4, init="pca")
    model = learnt(inject(tiny(), LoRAFAConfig(r=4)))
    inject(model, config, "b", batches=[IDS])
    alone = inject(tiny(), config, "b", batches=[IDS])
    mine, theirs = matrices(model), matrices(alone)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_pca_names_a_layer_that_no_batch_reaches() -> None:
    with pytest.raises(ValueError, match=r"init=pca: the batches never reach this layer: layers\.3"):
        inject(Experts(), LoRAFAConfig(r=2, targets=("0", "2", "3"), init="pca"), batches=[torch.randn(8, 16)])


@pytest.mark.parametrize("init", ["select", "weight_svd", "gaussian", "orthonormal", "pca"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_init_leaves_the_model_as_it_is_until_b_moves(family: str, init: str) -> None:
    model = inject(tiny(family), LoRAFAConfig(r=4, init=init), batches=[IDS])
    assert torch.equal(outputs(model), outputs(tiny(family)))
    assert not torch.equal(outputs(learnt(model)), outputs(tiny(family)))


def test_nothing_unfreezes_a() -> None:
    """A buffer has no gradient to switch on, and no optimizer finds it."""
    model = mlp()
    before = matrices(model)
    model.requires_grad_(True)
    set_adapter(model, "default")
    assert not any(buffer.requires_grad for buffer in model.buffers())
    assert not {id(b) for b in model.buffers()} & {id(p) for p in model.parameters()}
    after = matrices(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_trained_base_weight_is_refused_in_the_forward_pass() -> None:
    model = mlp().requires_grad_(True)
    with pytest.raises(ValueError, match="the weight of an adapted AdaptedLinear is trained"):
        model(torch.ones(1, 16))


def test_a_head_that_the_caller_unfroze_stays_so_under_a_second_adapter() -> None:
    model = mlp()
    model.head.requires_grad_(True)
    inject(model, LoRAFAConfig(r=2, targets=TARGETS), "b")
    assert model.head.weight.requires_grad


def test_unload_gives_the_model_back() -> None:
    model, plain = learnt(inject(tiny(), LoRAFAConfig(r=2))), tiny()
    unload(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(outputs(model), outputs(plain))


def test_a_peft_model_is_sent_to_from_peft() -> None:
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match="from_peft reads what peft saved"):
        inject(get_peft_model(MLP(), LoraConfig(target_modules=["first"])), LoRAFAConfig(r=2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"r": 4.5}, "r=4.5: must be a whole number"),
        ({"r": True}, "r=True: must be a whole number"),
        ({"seed": "0"}, "seed='0': must be a whole number"),
        ({"alpha": float("nan")}, "alpha=nan: must be a number"),
        ({"recompute": None}, "recompute=None: must be text"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAFAConfig(**wrong)
