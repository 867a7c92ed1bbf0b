"""A graph and its tensors in a folder: `graph.json` and `tensors.safetensors`, read without the model's class.

Nothing is unpickled, and of what a file says nothing is run but operators of torch's own, by name.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from llmsys.decentral.graph import Graph
from llmsys.decentral.trace import Traced, value_of

GRAPH, TENSORS = "graph.json", "tensors.safetensors"


def save(traced: Traced, folder: str | Path) -> None:
    """Into `folder`, which is made; what is there of the two files is replaced, the graph last."""
    from safetensors.torch import save_file

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    half = path / f"{TENSORS}.part"
    save_file({key: tensor.contiguous() for key, tensor in traced.tensors.items()}, half)
    half.replace(path / TENSORS)
    text = path / f"{GRAPH}.part"
    text.write_text(json.dumps(traced.graph.to_json()), encoding="utf-8")
    text.replace(path / GRAPH)


def load(folder: str | Path) -> Traced:
    """ValueError, which names the file, for what is no graph, and where graph and tensors are not of one another."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder)
    for name in (GRAPH, TENSORS):
        if not (path / name).is_file():
            raise ValueError(f"{path / name}: no such file")
    try:
        graph = Graph.of_json(json.loads((path / GRAPH).read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path / GRAPH}: {error}") from None
    try:
        tensors = load_file(path / TENSORS)
    except SafetensorError as error:
        raise ValueError(f"{path / TENSORS}: {error}") from None
    for key, value in {**graph.parameters, **graph.constants, **graph.variables}.items():
        if key not in tensors:
            raise ValueError(f"{path / TENSORS}: has no tensor {key}, which the graph reads")
        found = value_of(tensors[key])
        if (found.dtype, found.shape) != (value.dtype, value.shape):
            raise ValueError(
                f"{path / TENSORS}: {key} is {found.dtype} {list(found.shape)}, and in the graph {value.dtype} "
                f"{list(value.shape)}"
            )
        tensors[key] = _laid_out(tensors[key], value.strides)
    return Traced(graph, tensors)


def _laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """As it lay when it was traced: kernels choose by that."""
    if tuple(tensor.stride()) == strides:
        return tensor
    made = tensor.new_empty_strided(tensor.shape, strides)
    return made.copy_(tensor)
