"""Claims about graphs: they are plain data that any machine reads, and what is no graph is refused by its name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from decentral_harness import FAMILIES, eager, example, model, named, quarters, staged, traced
from torch import Tensor, nn

from llmsys.decentral import cut as cuts
from llmsys.decentral import store
from llmsys.decentral.graph import Graph, Node, Value
from llmsys.decentral.planes.layout import packed, unpacked
from llmsys.decentral.planes.torch import operation
from llmsys.decentral.trace import trace

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_and_counts_are_the_models(family: str) -> None:
    graph = traced(family).graph
    kinds = Counter(node.kind for node in graph.nodes)
    assert kinds["placeholder"] == len(example(family))
    assert kinds["loss"] == 1
    own = {key for node in graph.nodes if node.kind == "parametric" for key in node.tensors if key in graph.parameters}
    assert own == {*graph.parameters}
    numel = sum(torch.Size(value.shape).numel() for value in graph.parameters.values())
    assert numel == sum(p.numel() for p in model(family).parameters())


def test_flops_are_those_of_the_products() -> None:
    """2 for each weight and token, and of eager attention 4 L D a token and layer."""
    graph = traced("llama").graph
    tokens, layers, width, length = 2 * 16, 4, 32, 16
    weights = layers * (2 * width * width + 2 * width * 16 + 3 * width * 64) + width * 64
    assert sum(node.flops for node in graph.nodes) == 2 * weights * tokens + layers * 4 * length * width * tokens


def test_operators_are_of_layers() -> None:
    blocks = list(dict.fromkeys(node.block for node in traced("llama").graph.operators))
    assert [each for each in blocks if ".layers." in each] == [f"model.layers.{i}" for i in range(4)]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_the_same_job(family: str, tmp_path: Path) -> None:
    store.save(traced(family), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {store.GRAPH, store.TENSORS}
    loaded = store.load(tmp_path)
    assert loaded.graph == traced(family).graph
    stages = cuts.cut(loaded.graph, cuts.contiguous(loaded.graph, quarters(loaded.graph, 2)))
    loss, gradients, _, _ = staged(loaded.graph, stages, loaded.tensors, example(family))
    expected, wanted = eager(family)
    assert torch.equal(loss, expected)
    assert all(torch.allclose(named(loaded.graph, gradients)[name], each) for name, each in wanted.items())


def test_a_machine_without_the_models_class_runs_it(tmp_path: Path) -> None:
    """In a process that cannot import transformers."""
    store.save(traced("llama"), tmp_path)
    ids, labels = (value.tolist() for value in example("llama").values())
    code = f"""
import sys
sys.modules["transformers"] = None
import torch
from llmsys.decentral import cut, store
from llmsys.decentral.planes.torch import Run
torch.set_num_threads(1)
own = store.load({str(tmp_path)!r})
(stage,) = cut.cut(own.graph, {{node.name: 0 for node in own.graph.operators}})
run = Run(own.graph, stage, own.tensors)
run.forward({{"input_ids": torch.tensor({ids}), "labels": torch.tensor({labels})}}, {{}})
print(next(iter(run.outputs.values())).item().hex())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loss = eager("llama")[0]
    torch.set_num_threads(threads)
    assert done.stdout.strip() == loss.item().hex()


def test_what_does_not_export_is_said_with_torchs_reason() -> None:
    class Picks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if bool(x.sum() > 0) else -x

    class Stops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.inner(x)

    with pytest.raises(ValueError, match=r"^Picks does not export: "):
        trace(Picks(), {"x": torch.ones(2)})
    with pytest.raises(ValueError, match="computes with parameters where gradients are switched off"):
        trace(Stops(), {"x": torch.ones(2, 4)})


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    store.save(traced("gpt2"), tmp_path)
    plain = json.loads((tmp_path / store.GRAPH).read_text())

    def broken(**changes: object) -> str:
        (tmp_path / store.GRAPH).write_text(json.dumps({**plain, **changes}))
        with pytest.raises(ValueError) as caught:
            store.load(tmp_path)
        return str(caught.value)

    first = plain["nodes"][-1]
    assert "this reads graphs of version 1" in broken(version=2)
    assert "is there twice" in broken(nodes=[*plain["nodes"], first])
    assert "reads nowhere, which no node before it gives" in broken(
        nodes=[*plain["nodes"], {**first, "name": "new", "args": [{"node": "nowhere"}]}]
    )
    assert "has no tensor" in broken(constants={"gone": plain["parameters"]["transformer.wte.weight"]})
    assert "no node of the graph" in broken(outputs=["nothing"])
    assert "graph.json: no graph" in broken(nodes=[{}])
    (tmp_path / store.TENSORS).unlink()
    assert "no such file" in broken()


@pytest.mark.parametrize("target", ["os.system", "aten.__class__", "aten.nothing.default", "prims.add", "aten"])
def test_nothing_is_called_but_torchs_operators(target: str) -> None:
    with pytest.raises(ValueError, match=f"operator {target}"):
        operation(target)


def test_a_tensor_arrives_as_it_lay() -> None:
    whole = torch.arange(24.0).reshape(2, 3, 4)
    wide = torch.arange(8.0).reshape(2, 1, 4).expand(2, 5, 4)
    for tensor in (whole, whole.transpose(0, 2), whole.permute(1, 0, 2), wide, whole[0, 0, 0]):
        found = unpacked(packed(tensor))
        assert torch.equal(found, tensor)
        assert found.stride() == tensor.stride()


def test_a_graph_by_hand() -> None:
    """What a planner needs no torch for."""
    value = Value(dtype="float32", shape=(2, 3), strides=(3, 1))
    nodes = [Node(name="x", kind="placeholder", values=(value,))]
    nodes += [Node(name="y", kind="parametric", target="aten.mul.Tensor", values=(value,),
                   args=({"node": "x"}, {"tensor": "w"}))]  # fmt: skip
    graph = Graph(nodes=tuple(nodes), outputs=("y",), parameters={"w": value})
    assert (graph.by_name["y"].reads, graph.by_name["y"].tensors, graph.trained) == (("x",), ("w",), {"y"})
    assert Graph.of_json(json.loads(json.dumps(graph.to_json()))) == graph
