"""Claims about spans of modules: nothing is lost, nothing counts twice, every operator is where it belongs, in the
forward pass, in the backward pass and where the forward pass runs again; and the model computes what it did.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llmsys import models, schema, wiring
from llmsys.models import blocks
from llmsys.profile.modules import ModuleSpans
from llmsys.profile.parts import find
from llmsys.profile.taxonomy import REST
from llmsys.train.loop import Loop

CPU = torch.device("cpu")
LAYERS = 2
Seen = list[tuple[str, str, str]]
"""(row, kind, operator), one after another."""


def build(
    family: str = "llama", method: str = "full", recompute: str = "none", **settings: Any
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny model in training mode and a batch for it."""
    tied = family in ("t5", "gpt2")
    cfg = schema.Transformer(family=family, num_layers=LAYERS, tie_embeddings=tied, **settings)
    model = models.load(cfg, objective=cfg.objective, num_labels=3, device=CPU, seed=0, folder=None)
    adapted = {"lora": schema.LoRA, "lorafa": schema.LoRA, "lora_peft": schema.Adapter}
    by = wiring.method(adapted[method](kind=method, r=4) if method in adapted else schema.Method(kind=method))
    model = by.prepare(model, [])
    by.recompute(model, [recompute] * len(blocks(model)))
    ids = torch.randint(3, cfg.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "labels": torch.tensor([0, 1]) if cfg.objective == "classification" else ids}


class Operators(TorchDispatchMode):
    """Which span is open for each operator."""

    def __init__(self, spans: ModuleSpans) -> None:
        super().__init__()
        self.spans = spans
        self.seen: Seen = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((*self.spans.open, func._schema.name.removeprefix("aten::")))
        return func(*args, **(kwargs or {}))


def step(spans: ModuleSpans, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    model.zero_grad()
    with spans.step():
        with spans("forward"):
            loss: Tensor = model(**batch).loss
        with spans("backward"):
            loss.backward()
    return loss


def watched(*args: Any, **settings: Any) -> tuple[ModuleSpans, Seen]:
    model, batch = build(*args, **settings)
    spans = ModuleSpans(model, CPU)
    with spans.attached():
        step(spans, model, batch)  # the first of a block to be called decides how its row is called
        with Operators(spans) as operators:
            step(spans, model, batch)
    return spans, operators.seen


def calls(seen: Seen, kind: str) -> Counter[tuple[str, str]]:
    return Counter((row, operator) for row, of, operator in seen if of == kind)


def order(seen: Seen, kind: str, rows: Sequence[str]) -> list[str]:
    """The rows in which something was computed, one after another, of `rows`."""
    found: list[str] = []
    for row, of, operator in seen:
        if of == kind and row in rows and operator in COMPUTING and found[-1:] != [row]:
            found.append(row)
    return found


COMPUTING = ("mm", "addmm", "bmm", "_softmax", "_softmax_backward_data", "silu", "silu_backward", "embedding")
COMPUTING += ("embedding_dense_backward", "rsqrt", "pow", "_log_softmax", "_log_softmax_backward_data", "mul")
EAGER = ("scores", "softmax", "context")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "t5"])
def test_every_operator_lies_in_a_span(family: str, attention: str) -> None:
    """Of both passes; the one gradient that autograd begins with is nobody's."""
    _, seen = watched(family, attention=attention)
    assert {operator for row, _, operator in seen if row == REST} == {"ones_like"}
    assert {kind for _, kind, _ in seen} == {"forward", "backward"}
    rows = {row for row, _, _ in seen}
    assert rows >= {"embedding", "norm", "qkv", "output", "up", "activation", "down", "residual", "logits", "loss"}
    assert rows >= ({*EAGER} if attention == "eager" else {"attention"})


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "t5"])
@pytest.mark.parametrize("method", ["full", "lora_peft"])
def test_every_parameter_lies_in_one_span(family: str, method: str) -> None:
    """Of the spans that have no others within them."""
    model, _ = build(family, method)
    names = {part.name for _, part in find(model)[1:]}
    whole = {name for name in names if not any(other.startswith(f"{name}.") for other in names)}
    for name, module in model.named_modules():
        if module._parameters:
            assert len([each for each in whole if name == each or name.startswith(f"{each}.")]) == 1, name


def test_every_phase_of_the_loop_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes one further at each look; the names are those by which the loop calls its phases."""
    source = inspect.getsource(Loop.step)
    names = re.findall(r'spans\("(\w+)"\)', source)
    assert {"data", "agreement", "communication", "optimizer"} <= set(names)
    spans = ModuleSpans(nn.Linear(1, 1), CPU)
    ticks = iter(range(10**3))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    with spans.step():
        for name in names:
            with spans(name):
                pass
    rows = spans.rows()
    for name in {*names} - {"forward", "backward"}:
        assert rows[name][""] == [3000.0], "its own two looks lie within its cuts"


def test_products_are_where_their_layers_are() -> None:
    """Forward one product a layer; backward two, of its input and of its weight, which is added up there too."""
    _, seen = watched(attention="sdpa")
    forward, backward = calls(seen, "forward"), calls(seen, "backward")
    each = {"qkv": 3, "output": 1, "gate": 1, "up": 1, "down": 1}
    for row, count in each.items():
        assert (forward[row, "mm"], backward[row, "mm"]) == (LAYERS * count, 2 * LAYERS * count), row
    assert (forward["logits", "mm"], backward["logits", "mm"]) == (1, 2)
    assert sum(n for (row, op), n in forward.items() if op == "mm") == LAYERS * 7 + 1
    kernel = "_scaled_dot_product_flash_attention_for_cpu"
    assert {row for row, operator in forward if operator == kernel} == {"attention"}
    assert {row for row, operator in backward if operator == f"{kernel}_backward"} == {"attention"}
    assert {row for row, operator in backward if operator == "silu_backward"} == {"activation"}
    assert {row for row, operator in backward if operator == "embedding_dense_backward"} == {"embedding"}
    assert {row for row, operator in forward if operator == "neg"} == {"rope"}


def test_eager_attention_is_three_spans() -> None:
    _, seen = watched(attention="eager")
    forward, backward = calls(seen, "forward"), calls(seen, "backward")
    for row, product in (("scores", "bmm"), ("context", "bmm")):
        assert (forward[row, product], backward[row, product]) == (LAYERS, 2 * LAYERS)
    assert (forward["softmax", "_softmax"], backward["softmax", "_softmax_backward_data"]) == (LAYERS, LAYERS)


def test_the_backward_pass_is_the_forward_pass_reversed() -> None:
    """Row by row: each begins where the one before it has ended."""
    rows = ("embedding", "norm", "qkv", *EAGER, "output", "gate", "up", "down", "logits", "loss")
    _, seen = watched(attention="eager")
    forward = order(seen, "forward", rows)
    assert len(forward) == 3 + LAYERS * 10 + 1
    assert order(seen, "backward", rows) == forward[::-1]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_is_computed_again_is_recomputation(attention: str) -> None:
    """Neither lost nor counted as forward: the blocks' operators once more, row by row, but for down's product, which
    the backward pass does not read. The part that was interrupted goes on."""
    _, plain = watched(attention=attention)
    _, seen = watched(attention=attention, recompute="block")
    computing = {"mm", "bmm", "_softmax", "silu", "mul", "neg", "rsqrt"}
    angles = {"rope": {"mul", "bmm"}}  # which no block makes; that it rotates shows in `neg`
    once, forward, again = (
        Counter({key: n for key, n in calls(ops, kind).items() if key[1] in computing - angles.get(key[0], set())})
        for ops, kind in ((plain, "forward"), (seen, "forward"), (seen, "recompute"))
    )
    assert forward == once
    inside = Counter({key: n for key, n in once.items() if key[0] not in ("logits", "loss", "model", "embedding")})
    del inside["down", "mm"]
    inside["norm", "rsqrt"] -= 1  # the last norm is no block's
    inside["norm", "mul"] -= 2
    assert again == inside
    backward = calls(seen, "backward")
    assert backward["down", "mm"] == 2 * LAYERS
    assert {operator for row, _, operator in seen if row == REST} == {"ones_like"}


@pytest.mark.parametrize("recompute", ["none", "attn+mlp", "block"])
@pytest.mark.parametrize("method", ["lora", "lorafa"])
def test_blocks_that_run_as_chains_are_one_row(method: str, recompute: str) -> None:
    """Their modules are not called, so nobody claims to know them; attention's function is looked up, and seen."""
    spans, seen = watched(method=method, recompute=recompute)
    rows = spans.rows()
    assert {"block", "attention", "norm", "logits"} <= rows.keys()
    assert not {"qkv", "output", "gate", "up", "down", "residual"} & rows.keys()
    assert {operator for row, _, operator in seen if row == REST} == {"ones_like"}
    kernel = "_scaled_dot_product_flash_attention_for_cpu"
    assert calls(seen, "backward")["attention", f"{kernel}_backward"] == LAYERS
    assert calls(seen, "recompute")["attention", kernel] == (0 if recompute == "none" else LAYERS)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_all_rows_together_are_the_step(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes one further at each look: nothing is negative, so nothing counts twice, and nobody's are the
    13 looks at the ends of the step and of its two phases, whatever lies within."""
    model, batch = build(recompute=recompute)
    spans = ModuleSpans(model, CPU, warmup=1)
    ticks = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    with spans.attached():
        for _ in range(3):
            step(spans, model, batch)
    rows = spans.rows()
    for i, whole in enumerate(spans.samples["step_ms"]):
        values = [ms[i] for kinds in rows.values() for ms in kinds.values()]
        assert min(values) >= 0
        assert sum(values) == whole == 1000 * (spans.cuts + 1 + 4), "cuts, the step's two ends, two phases of two looks"
        assert sum(ms[i] for ms in rows[REST].values()) == 13_000
    assert len(spans.samples["step_ms"]) == 2


@pytest.mark.parametrize(
    ("family", "method", "recompute"),
    [
        ("llama", "full", "none"),
        ("llama", "full", "block"),
        ("llama", "lora_peft", "block"),
        ("llama", "lorafa", "attn+mlp"),
        ("bert", "full", "none"),
        ("t5", "lora", "none"),
    ],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_loss_and_gradients_keep_their_bits(family: str, method: str, recompute: str, attention: str) -> None:
    model, batch = build(family, method, recompute, attention=attention)
    spans = ModuleSpans(model, CPU)
    found = []
    for attached in (False, True):
        if attached:
            with spans.attached():
                loss = step(spans, model, batch)
        else:
            loss = step(spans, model, batch)
        found.append((loss, [None if p.grad is None else p.grad.clone() for p in model.parameters()]))
    (plain, before), (same, after) = found
    assert torch.equal(plain, same)
    for a, b in zip(before, after, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]


def test_nothing_is_left_behind() -> None:
    """No hook, no function in transformers' place of another, also where a step has failed."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, batch = build(recompute="block")
    spans = ModuleSpans(model, CPU)
    functions = [vars(block)["_gradient_checkpointing_func"] for _, block in blocks(model)]
    with pytest.raises(IndexError), spans.attached():
        step(spans, model, {key: ids + 10**6 for key, ids in batch.items()})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [vars(block)["_gradient_checkpointing_func"] for _, block in blocks(model)] == functions
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_cuda_spans_time_the_device(recompute: str) -> None:
    """Events in the stream, also from the thread in which autograd runs: together they are the step."""
    model, batch = build(recompute=recompute)
    model, batch = model.cuda(), {key: value.cuda() for key, value in batch.items()}
    spans = ModuleSpans(model, torch.device("cuda"), warmup=1)
    with spans.attached():
        for _ in range(4):
            step(spans, model, batch)
    rows = spans.rows()
    for i, whole in enumerate(spans.samples["step_ms"]):
        assert sum(ms[i] for kinds in rows.values() for ms in kinds.values()) == pytest.approx(whole)
        assert min(ms[i] for row, kinds in rows.items() if row != REST for ms in kinds.values()) >= 0
    assert rows["down"]["backward"][0] > 0
