"""Every piece's derivative is right, and it keeps the bytes that its docstring names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lorafa_harness import R, kept, tensors_of, toy, with_adapters
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from llmsys.lorafa.pieces.activation import KINDS, Activation, kind
from llmsys.lorafa.pieces.attention import Core
from llmsys.lorafa.pieces.dropout import Dropout, dropped
from llmsys.lorafa.pieces.join import Beside, Branch, Residual
from llmsys.lorafa.pieces.linears import Linears
from llmsys.lorafa.pieces.norm import LayerNorm, RMSNorm, T5Norm
from llmsys.lorafa.pieces.piece import Chain, Piece, run
from llmsys.lorafa.pieces.relu import ReLU, packed, unpacked
from llmsys.lorafa.pieces.scores import Scores

B, L, N, M = 2, 3, 8, 5
T = B * L
QKV = {"q_proj": (N, M), "k_proj": (N, M), "v_proj": (N, M)}


def rand(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    return torch.randn(*(shape or (B, L, N)), dtype=dtype, generator=torch.Generator().manual_seed(seed))


def norm(cls: type[nn.Module], dtype: torch.dtype = torch.float64, trained: bool = False) -> Any:
    module = cls(N).to(dtype).requires_grad_(trained)
    for parameter in module.parameters():
        parameter.data.copy_(1 + 0.3 * rand(N, seed=4))
    return module


def softmaxed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, p: float = 0.0) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    return F.dropout(torch.softmax(scores if bias is None else scores + bias, -1), p) @ v


class Case:
    """A model that holds the weights, how to make the piece, and its inputs, which require gradients."""

    def __init__(self, piece: Callable[[], Piece], *inputs: Tensor, model: nn.Module | None = None) -> None:
        self.piece, self.inputs = piece, [each.requires_grad_() for each in inputs]
        self.model = model or nn.Linear(1, 1).requires_grad_(False)

    def __call__(self) -> tuple[Tensor, ...]:
        torch.manual_seed(5)  # for the seeds of dropout
        outputs = run(self.piece(), *self.inputs)
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    def trained(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def linears(dtype: torch.dtype = torch.float64, layer_bias: bool = False, **config: Any) -> Case:
    model = with_adapters(toy(dtype, layer_bias, **QKV), **config)
    return Case(lambda: Linears(list(model.layers[0].values())), rand(dtype=dtype), model=model)


def weightless(piece: Callable[[], Piece], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Case:
    return Case(piece, *(rand(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)))


def normed(piece: type[Any], cls: type[nn.Module], trained: bool, dtype: torch.dtype = torch.float64) -> Case:
    module = norm(cls, dtype, trained)
    return Case(lambda: piece(module), rand(dtype=dtype), model=module)


def mlp(cut: str, dtype: torch.dtype = torch.float64, **config: Any) -> Case:
    """Norm, two linear layers, gated SiLU, dropout, a linear layer; in one chain, and alone, inside a residual, ..."""
    model = with_adapters(toy(dtype, gate_proj=(N, 6), up_proj=(N, 6), down_proj=(6, N)), **config)
    model.norm = norm(LlamaRMSNorm, dtype)
    gate, up, down = model.layers[0].values()

    def piece() -> Piece:
        inner = Chain(Linears([gate, up]), Activation("silu"), Dropout(0.3), Linears([down]))
        joined = {"residual": Residual(inner), "branch": Branch(inner), "chain": inner}[cut]
        return Chain(RMSNorm(model.norm), joined)

    return Case(piece, rand(dtype=dtype), model=model)


def attention(random: bool = False, learnt: bool = False, dtype: torch.dtype = torch.float64, **config: Any) -> Case:
    """Norm, query, key, value, core, output: one chain."""
    model = with_adapters(toy(dtype, q_proj=(N, N), k_proj=(N, N), v_proj=(N, N), o_proj=(N, N)), **config)
    model.norm = norm(LlamaRMSNorm, dtype)
    model.bias = nn.Parameter(rand(1, L, L, dtype=dtype), requires_grad=learnt)
    q, k, v, o = model.layers[0].values()

    def piece() -> Piece:
        core = Core(softmaxed, torch.device("cpu"), random, {"bias": model.bias * 2, "p": 0.3 if random else 0.0})
        return Chain(RMSNorm(model.norm), Linears([q, k, v]), core, Linears([o]))

    return Case(piece, rand(dtype=dtype), model=model)


def crossing(dtype: torch.dtype = torch.float64, **config: Any) -> Case:
    model = with_adapters(toy(dtype, **QKV), **config)
    model.norm = norm(T5LayerNorm, dtype)
    q, k, v = model.layers[0].values()
    sides = lambda: Beside(Chain(T5Norm(model.norm), Linears([q])), Linears([k, v]))  # noqa: E731
    return Case(sides, rand(dtype=dtype), rand(B, 4, N, dtype=dtype, seed=6), model=model)


CASES: dict[str, Callable[[], Case]] = {
    "linears": linears,
    "linears, A trained": lambda: linears(train_a=True),
    "linears, A shared": lambda: linears(share_a=True),
    "linears, A shared and trained": lambda: linears(share_a=True, train_a=True),
    "linears, dropout": lambda: linears(dropout=0.4),
    "linears, dropout, A trained": lambda: linears(dropout=0.4, train_a=True),
    "linears, dropout, A shared": lambda: linears(dropout=0.4, share_a=True),
    "linears, bias": lambda: linears(layer_bias=True),
    "linears, bias trained": lambda: linears(layer_bias=True, bias="lora_only"),
    "RMSNorm": lambda: normed(RMSNorm, LlamaRMSNorm, False),
    "RMSNorm, trained": lambda: normed(RMSNorm, LlamaRMSNorm, True),
    "T5Norm": lambda: normed(T5Norm, T5LayerNorm, True),
    "LayerNorm": lambda: normed(LayerNorm, nn.LayerNorm, False),
    "LayerNorm, trained": lambda: normed(LayerNorm, nn.LayerNorm, True),
    **{f"{name}": lambda name=name: weightless(lambda: Activation(name), (T, N)) for name in KINDS},
    **{f"{name}, gated": lambda name=name: weightless(lambda: Activation(name), (T, N), (T, N)) for name in KINDS},
    "an unknown activation": lambda: weightless(lambda: Activation(ACT2FN["mish"]), (T, N), (T, N)),
    "an activation that does nothing": lambda: weightless(lambda: Activation(ACT2FN["linear"]), (T, N), (T, N)),
    "ReLU": lambda: weightless(ReLU, (T, 3)),
    "dropout": lambda: weightless(lambda: Dropout(0.4), (T, N)),
    "no dropout": lambda: weightless(lambda: Dropout(0.4, training=False), (T, N)),
    "core": lambda: weightless(lambda: Core(softmaxed, torch.device("cpu")), (B, L, N), (B, L, N), (B, L, N)),
    "scores": lambda: weightless(lambda: Scores(None, True, 0.5, 0.4), (B, 4, L, N), (B, 2, L, N), (B, 2, L, N)),
    "MLP": lambda: mlp("chain"),
    "MLP, A trained": lambda: mlp("chain", train_a=True, dropout=0.4),
    "MLP in a residual": lambda: mlp("residual", train_a=True),
    "MLP on a branch": lambda: mlp("branch"),
    "attention": attention,
    "attention, A trained": lambda: attention(train_a=True),
    "attention, dropout": lambda: attention(random=True, dropout=0.4),
    "attention, bias trained": lambda: attention(learnt=True, random=True, train_a=True),
    "cross-attention": crossing,
    "cross-attention, A trained": lambda: crossing(train_a=True),
}


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_finite_differences(name: str) -> None:
    case = CASES[name]()
    assert torch.autograd.gradcheck(lambda *_: case(), (*case.inputs, *case.trained()), fast_mode=True)


@pytest.mark.parametrize("name", ["linears, A shared and trained", "MLP in a residual", "attention, bias trained"])
def test_a_first_block_s_input_needs_no_gradient(name: str) -> None:
    """Its embedding is frozen; what is trained behind it gets the same gradients."""
    whole, first = CASES[name](), CASES[name]()
    first.inputs[0].requires_grad_(False)
    for case in (whole, first):
        sum(output.square().sum() for output in case()).backward()
    assert first.inputs[0].grad is None
    for a, b in zip(whole.trained(), first.trained(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", CASES)
def test_strides_of_inputs_and_gradients_do_not_matter(name: str) -> None:
    plain, strided = CASES[name](), CASES[name]()
    strided.inputs = [_strided(each.detach()).requires_grad_() for each in strided.inputs]
    grads = []
    for case, view in ((plain, torch.clone), (strided, _strided)):
        outputs = case()
        grads.append(torch.autograd.grad(outputs, case.inputs, [view(2 * y.detach()) for y in outputs]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    outputs = strided()
    torch.autograd.grad(outputs, strided.inputs, [torch.ones(()).to(y).expand_as(y) for y in outputs])  # of a sum


def _strided(each: Tensor) -> Tensor:
    """The same numbers, the first axis innermost."""
    return each.clone().transpose(0, -1).contiguous().transpose(0, -1)


def kept_by(case: Case) -> int:
    return kept(case.model, lambda: case()[0])


BF16 = torch.bfloat16
X, Z = 2 * T * N, 2 * T * R  # bytes of x and of one z in bf16


KEPT: dict[str, tuple[Callable[[], Case], int]] = {
    "linears": (lambda: linears(BF16), 3 * Z),
    "linears, dropout": (lambda: linears(BF16, dropout=0.3), 3 * Z),
    "linears, A shared": (lambda: linears(BF16, share_a=True), Z),
    "linears, bias trained": (lambda: linears(BF16, layer_bias=True, bias="lora_only"), 3 * Z),
    "linears, A trained": (lambda: linears(BF16, train_a=True, dropout=0.3), 3 * Z + X),
    "RMSNorm": (lambda: normed(RMSNorm, LlamaRMSNorm, False, BF16), X + 4 * T),
    "T5Norm": (lambda: normed(T5Norm, T5LayerNorm, True, BF16), X + 4 * T),
    "LayerNorm": (lambda: normed(LayerNorm, nn.LayerNorm, True, BF16), X + 2 * 2 * T),
    "LayerNorm, fp32": (lambda: normed(LayerNorm, nn.LayerNorm, True, torch.float32), 2 * X + 2 * 4 * T),
    "silu, gated": (lambda: weightless(lambda: Activation("silu"), (T, N), (T, N), dtype=BF16), 2 * X),
    "gelu": (lambda: weightless(lambda: Activation("gelu"), (T, N), dtype=BF16), X),
    "ReLU": (lambda: weightless(ReLU, (T, N), dtype=BF16), T * N // 8),
    "ReLU, 9 elements": (lambda: weightless(ReLU, (3, 3), dtype=BF16), 2),
    "dropout": (lambda: weightless(lambda: Dropout(0.3), (T, N), dtype=BF16), 0),
    "scores": (lambda: weightless(lambda: Scores(None, True, 1.0, 0.3), *[(B, 2, L, N)] * 3, dtype=BF16), 3 * 2 * X),
    "MLP": (lambda: mlp("chain", BF16), X + 4 * T + 3 * Z),
    "MLP in a residual, A trained": (lambda: mlp("residual", BF16, train_a=True), X + 4 * T + 3 * Z),
    "MLP on a branch": (lambda: mlp("branch", BF16), X + 4 * T + 3 * Z),
    "attention": (lambda: attention(dtype=BF16), X + 4 * T + 4 * Z + 2 * L * L),
    "attention, A trained": (lambda: attention(True, dtype=BF16, train_a=True), X + 4 * T + 4 * Z + 2 * L * L),
    "cross-attention": (lambda: crossing(BF16), X + 4 * T + Z + 2 * B * 4 * (N + 2 * R)),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_a_piece_keeps_is_what_its_docstring_says(name: str) -> None:
    case, expected = KEPT[name]
    assert kept_by(case()) == expected


def test_an_adapter_in_fp32_keeps_no_wider_copy() -> None:
    """peft casts x to fp32 for each adapter."""
    model = with_adapters(toy(BF16, **QKV), dtype="fp32", train_a=True)
    case = Case(lambda: Linears(list(model.layers[0].values())), rand(dtype=BF16), model=model)
    assert kept_by(case) == 3 * Z + X


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_kept_out_of_sight(name: str) -> None:
    """What hooks on saved tensors do not see (attributes, closures) can be neither counted nor offloaded. Weights are
    read from their modules, which both passes share; so is a trained bias, which autograd holds anyway."""
    case = CASES[name]()
    node: Any = case()[0].grad_fn
    if "bias trained" not in name or "linears" in name:
        assert list(tensors_of(vars(node))) == []


def test_what_is_kept_out_of_sight_is_found() -> None:
    """The control of the test above: a core whose closure holds a mask."""
    mask = rand(L, L)
    case = weightless(lambda: Core(lambda q, k, v: softmaxed(q, k, v, mask), torch.device("cpu")), *[(B, L, N)] * 3)
    node: Any = case()[0].grad_fn
    assert [each is mask for each in tensors_of(vars(node))] == [True]


def test_dropout_drawn_again_is_the_same_mask() -> None:
    x = torch.ones(40, 50, dtype=torch.float64)
    y = dropped(x, 0.25, seed=7)
    assert torch.equal(y, dropped(x, 0.25, seed=7))
    assert torch.equal(y, dropped(x.T.contiguous().T, 0.25, seed=7))
    assert not torch.equal(y, dropped(x, 0.25, seed=8))
    assert set(y.unique().tolist()) == {0.0, 1 / 0.75}
    assert abs((y == 0).float().mean().item() - 0.25) < 0.03  # 3 deviations of 2000 draws
    assert torch.equal(dropped(x, 0.0, seed=7), x)
    assert dropped(x[:0], 0.5, seed=7).shape == (0, 50)
    torch.manual_seed(0)
    x.requires_grad_()
    y = run(Dropout(0.5), x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, y)


def test_bits_are_unpacked_as_they_were_packed() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 5), (2, 8), (4, 3, 16), (0, 8), (1,)):
        mask = torch.rand(shape, generator=generator) > 0.5
        bits = packed(mask)
        assert bits.dtype == torch.uint8
        assert bits.numel() == (mask.numel() + 7) // 8
        assert torch.equal(unpacked(bits, shape), mask)


def test_scores_without_dropout_are_sdpa_s() -> None:
    q, k, v = rand(B, 4, L, N), rand(B, 2, 7, N, seed=1), rand(B, 2, 7, N, seed=2)
    mask = torch.zeros(B, 1, L, 7, dtype=torch.float64)
    mask[0, ..., :3] = -torch.inf
    mask[1, :, 1] = -torch.inf  # a row that sees nothing
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5, enable_gqa=True)
    torch.testing.assert_close(run(Scores(mask, False, 0.5, 0.0), q, k, v), expected)


def test_activations_of_transformers_are_known_by_what_they_compute() -> None:
    known = {name: kind(ACT2FN[name]) for name in ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")}
    assert known == {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_new": "gelu_new",
        "gelu_pytorch_tanh": "gelu_tanh",
        "relu": "relu",
    }
    assert [kind(act) for act in (nn.GELU(), nn.GELU("tanh"), F.gelu)] == ["gelu", "gelu_tanh", "gelu"]
    assert [kind(ACT2FN[name]) for name in ("gelu_python", "mish", "relu2", "quick_gelu")] == [None] * 4
    x = rand(50)
    for name, ours in known.items():
        assert torch.equal(run(Activation(str(ours)), x), ACT2FN[name](x))
    with pytest.raises(ValueError, match=r"the activation PReLU has trained weights"):
        Activation(nn.PReLU())


def test_the_closed_form_correction_multiplies_b_s_gradient_by_a_constant() -> None:
    """g (A A^T)^-1 / s^2 (arXiv 2308.03303v2); dx is the same."""
    config = {"init": "gaussian", "alpha": 4 * R}
    plain, corrected = linears(**config), linears(**config, correction="closed_form")
    for case in (plain, corrected):
        sum(output.sin().sum() for output in case()).backward()
    torch.testing.assert_close(plain.inputs[0].grad, corrected.inputs[0].grad)
    for name, b in plain.model.named_parameters():
        if name.endswith(".B"):
            a = plain.model.get_submodule(name.rpartition(".")[0]).a
            expected = b.grad @ torch.linalg.inv(a @ a.T) / 16
            torch.testing.assert_close(corrected.model.get_parameter(name).grad, expected, rtol=1e-5, atol=1e-7)


def test_there_is_no_second_derivative() -> None:
    case = linears()
    (dx,) = torch.autograd.grad(case()[0].square().sum(), case.inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_two_backward_passes_add_up() -> None:
    case = mlp("chain", train_a=True)
    (output,) = case()
    output.sum().backward(retain_graph=True)
    once = [p.grad.clone() for p in case.trained() if p.grad is not None]
    output.sum().backward()
    assert len(once) == 6
    for p, grad in zip(case.trained(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)


def test_without_gradients_nothing_is_kept() -> None:
    case = attention(train_a=True)
    with torch.no_grad():
        assert not case()[0].requires_grad
    for parameter in case.trained():
        parameter.requires_grad_(False)
    case.inputs[0].requires_grad_(False)
    assert case()[0].grad_fn is None


def test_an_expert_that_gets_no_token_gets_no_gradient_or_zeros() -> None:
    model = with_adapters(toy(**QKV), dropout=0.3, train_a=True)
    x = rand(T, N).requires_grad_()
    used, empty, never = model.layers[0].values()
    (used(x).sum() + empty(x[:0]).sum()).backward()
    assert used.adapter.B.grad.abs().sum() > 0
    assert not empty.adapter.B.grad.any()
    assert never.adapter.B.grad is None
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    empty(x.detach()[:0].view(0, 3, N))


def test_frozen_a_costs_no_product_with_the_input() -> None:
    """One of the three products of a backward pass is gone, and in a chain nothing before the last layer is computed
    again for it."""
    calls: list[str] = []

    class Watched(Activation):
        def again(self, inputs: Any, extras: Any) -> tuple[Tensor, ...]:
            calls.append("again")
            return super().again(inputs, extras)

    for train_a, expected in ((False, 1), (True, 2)):  # the forward pass runs it once
        model = with_adapters(toy(down_proj=(N, M)), train_a=train_a)
        calls.clear()
        x = rand().requires_grad_()
        run(Chain(Watched("gelu"), Linears([model.layers[0]["down_proj"]])), x).sum().backward()
        assert len(calls) == expected


def test_attention_computed_again_runs_its_core_once_more_whether_or_not_a_is_trained() -> None:
    for train_a in (False, True):
        model = with_adapters(toy(q_proj=(N, N), k_proj=(N, N), v_proj=(N, N), o_proj=(N, N)), train_a=train_a)
        *qkv, o = model.layers[0].values()
        calls: list[None] = []

        def core(q: Tensor, k: Tensor, v: Tensor, calls: list[None] = calls) -> Tensor:
            calls.append(None)
            return softmaxed(q, k, v)

        run(
            Chain(Linears(qkv), Core(core, torch.device("cpu")), Linears([o])), rand().requires_grad_()
        ).sum().backward()
        assert len(calls) == 2


def test_a_trained_weight_is_refused() -> None:
    model = with_adapters(toy(**QKV))
    model.layers[0]["q_proj"].weight.requires_grad_(True)
    with pytest.raises(ValueError, match="LoRA-FA takes it as frozen"):
        model.layers[0]["q_proj"](rand())


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which Dynamo reads of every tensor at a graph break
def test_torch_compile_goes_around_pieces() -> None:
    model = with_adapters(toy(down_proj=(N, M), up_proj=(N, N)), train_a=True)
    down, up = model.layers[0].values()

    def forward(x: Tensor) -> Tensor:
        y: Tensor = run(Chain(Linears([up]), Activation("gelu")), x.sin())
        return down(y.cos()).square().sum()  # an adapted layer alone

    x, grads = rand().requires_grad_(), []
    for function in (forward, torch.compile(forward, backend="aot_eager")):
        loss = function(x)
        grads.append([loss.detach(), *torch.autograd.grad(loss, [x, down.adapter.A, down.adapter.B, up.adapter.A])])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
