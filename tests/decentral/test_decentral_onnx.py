"""Stages on ONNX Runtime: the owner exports forward and backward, and gradients are torch's within rounding."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from decentral_harness import example, traced
from decentral_running import MICRO_BATCHES, RATE, job, losses, machines, mem_gib, training, undisturbed

from llmsys.decentral.chain import chain
from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.cut import cut, part
from llmsys.decentral.exports import Exports
from llmsys.decentral.graph import Graph, Node, Value
from llmsys.decentral.local import Local
from llmsys.decentral.planes import CONSTANT, PARAMETER, AdamW, Executor, Plane, Rules, plane_of
from llmsys.decentral.planes.joint import functions
from llmsys.decentral.planes.layout import packed, unpacked
from llmsys.decentral.planes.onnx import array_of, numbers_of
from llmsys.decentral.planes.onnx_export import exported

RULES = Rules(micro_batches=MICRO_BATCHES, optimizer=AdamW(weight_decay=0.01))
FAMILIES = ["llama", *(pytest.param(each, marks=pytest.mark.slow) for each in ("gpt2", "bert", "t5"))]


def stages(family: str, planes: tuple[str, str]) -> list[tuple[Executor, object]]:
    """Both halves of a model, each on its plane, with the model's parameters."""
    own = traced(family)
    found = []
    for stage, plane in zip(cut(own.graph, chain(own.graph).at((chain(own.graph).count // 2,))), planes, strict=True):
        piece = part(own.graph, stage)
        given = exported(piece, stage, RULES) if plane == "onnx" else {}
        made = plane_of(plane).stage(piece, stage, given, RULES)
        made.put({PARAMETER + key: packed(own.tensors[key]) for key in stage.parameters})
        made.put({CONSTANT + key: packed(own.tensors[key]) for key in stage.constants})
        made.begin()
        found.append((made, stage))
    return found


def one_step(family: str, planes: tuple[str, str]) -> dict[str, torch.Tensor]:
    """Parameters and moments after a step of one micro-batch."""
    inputs = {name: packed(each) for name, each in example(family).items()}
    (first, ahead), (second, behind) = stages(family, planes)
    sent = first.forward(1, 0, {name: inputs[name] for name in ahead.inputs}, {})  # type: ignore[attr-defined]
    second.forward(1, 0, {name: inputs[name] for name in behind.inputs}, sent)  # type: ignore[attr-defined]
    back, shared = second.backward(0, {}, {})
    first.backward(0, back, shared)
    found = {}
    for made, stage in ((first, ahead), (second, behind)):
        made.apply(RATE, 0.5)
        keys = [key for key in stage.parameters if key not in stage.shares]  # type: ignore[attr-defined]
        names = [prefix + key for key in keys for prefix in ("m/", "v/", "t/", "p/")]
        found |= {name: unpacked(each) for name, each in made.state(names).items()}
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_torchs_within_a_ten_thousandth(family: str) -> None:
    """The first moment after a step is a tenth of the gradient; embeddings are tied over the cut where they are."""
    ours, torchs = one_step(family, ("onnx", "onnx")), one_step(family, ("torch", "torch"))
    assert set(ours) == set(torchs)
    for name, expected in torchs.items():
        norm = float(expected.float().norm())
        if name.startswith("p/"):  # AdamW's first step is a sign: where a gradient is rounding alone, it is either
            continue
        assert float((ours[name] - expected).float().norm()) <= 1e-4 * norm + 1e-9, name


@pytest.mark.slow
@pytest.mark.parametrize("planes", [("onnx", "torch"), ("torch", "onnx")])
def test_planes_in_one_pipeline_learn_what_one_process_does(planes: tuple[str, str]) -> None:
    local = together(planes, steps=8)
    local.run()
    for found, expected in zip(losses(local), undisturbed("llama", 8), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    first, last = (sum(each) for each in (losses(local)[0], losses(local)[-1]))
    assert first != pytest.approx(last, rel=1e-4)  # parameters have moved


@pytest.mark.slow
def test_its_stage_is_taken_over_by_torch_and_back() -> None:
    """The onnx provider is killed in mid-step; then torch's, once another onnx one has come."""
    done = []

    def watch(local: Local, name: str, what: str, step: int) -> None:
        if step == 4 and not done:
            done.append("onnx")
            local.kill("p0")
        if step == 7 and len(done) == 1:
            done.append("torch")
            local.join(dataclasses.replace(machines(mem_gib("llama", 2), 4)[3], plane="onnx"), plane_of("onnx"))
        if step == 9 and len(done) == 2 and "p1" in local.providers:
            done.append("gone")
            local.kill("p1")

    local = together(("onnx", "torch", "torch"), steps=12, watch=watch)
    local.run()
    assert done == ["onnx", "torch", "gone"]
    assert "p3" in local.coordinator.owners
    for found, expected in zip(losses(local), undisturbed("llama", 12), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


def together(planes: tuple[str, ...], steps: int, watch: object = None) -> Local:
    own = training("llama", steps)
    own = dataclasses.replace(own, exports=Exports(own.rules))
    local = Local(Coordinator(job("llama"), own), watch)  # type: ignore[arg-type]
    for machine, plane in zip(machines(mem_gib("llama", 2), len(planes)), planes, strict=True):
        local.join(dataclasses.replace(machine, plane=plane), plane_of(plane))
    return local


def test_a_job_that_exports_nothing_sends_such_a_provider_away() -> None:
    local = Local(Coordinator(job("llama"), training("llama", 2)))
    for machine, plane in zip(machines(mem_gib("llama", 2), 3), ("onnx", "torch", "torch"), strict=True):
        local.join(dataclasses.replace(machine, plane=plane), plane_of(plane))
    local.run()
    assert local.coordinator.owners == ["p1", "p2"]
    assert list(local.coordinator.refusals) == ["p0: plane=onnx: this job exports nothing"]
    assert losses(local) == undisturbed("llama", 2)


def test_a_provider_that_cannot_run_its_stage_says_so_and_others_do() -> None:
    """What goes wrong with it is the broker's to know: nobody waits for it."""

    class Broken:
        name = "torch"

        def stage(self, *given: object) -> Executor:
            raise ValueError("operator aten.new.default: is not in torch 1.0")

        def warm(self) -> None: ...

    local = Local(Coordinator(job("llama"), training("llama", 2)))
    planes: list[Plane] = [Broken(), plane_of("torch"), plane_of("torch")]
    for machine, plane in zip(machines(mem_gib("llama", 2), 3), planes, strict=True):
        local.join(machine, plane)
    local.run()
    assert local.coordinator.owners == ["p1", "p2"]
    (why,) = local.coordinator.refusals
    assert why == "p0: plan: ValueError: operator aten.new.default: is not in torch 1.0"
    assert losses(local) == undisturbed("llama", 2)


def test_what_draws_random_numbers_is_not_exported() -> None:
    value = Value(dtype="float32", shape=(4,), strides=(1,))
    drawn = Node(name="drop", kind="operator", target="aten.dropout.default", values=(value,), random=True,
                 args=({"tensor": "weight"}, 0.5, True))  # fmt: skip
    loss = Node(name="loss", kind="loss", target="aten.sum.default", args=({"node": "drop"},),
                values=(Value(dtype="float32", shape=(), strides=()),))  # fmt: skip
    graph = Graph(nodes=(drawn, loss), outputs=("loss",), parameters={"weight": value})
    (stage,) = cut(graph, {"drop": 0, "loss": 0})
    with pytest.raises(ValueError, match="operator drop: draws random numbers"):
        functions(graph, stage, RULES)


def test_numbers_travel_as_they_are() -> None:
    """Rows, a transposed tensor, an expanded one, a number alone; of torch and of numpy."""
    for tensor in (torch.arange(6.0).view(2, 3), torch.arange(6).view(2, 3).T, torch.ones(1, 3).expand(4, 3),
                   torch.tensor(3.5), torch.zeros(0, 2), torch.tensor([True, False])):  # fmt: skip
        found = numbers_of(packed(tensor))
        assert np.array_equal(found, tensor.numpy())
        assert torch.equal(unpacked(array_of(found)), tensor)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own, as it is imported
def test_compiled_torch_is_a_plane_as_well() -> None:
    ours, torchs = (one_step("llama", (name, "torch")) for name in ("torch_compiled", "torch"))
    for name, expected in torchs.items():
        if not name.startswith("p/"):
            assert float((ours[name] - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-9, name
