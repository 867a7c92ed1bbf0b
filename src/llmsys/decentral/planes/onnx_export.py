"""A stage for the ONNX plane: what its owner, who has torch, sends to a provider that has none.

`planes.joint` gives forward and backward; torch's exporter makes an ONNX model of each. Weights are arguments: what is
sent is the structure alone, some hundred kilobytes, once for each stage.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Iterator

import torch

from llmsys.decentral.cut import Stage
from llmsys.decentral.graph import Graph
from llmsys.decentral.planes import Rules
from llmsys.decentral.planes.joint import Function, functions
from llmsys.decentral.wire import Array

OPSET = 20


def exported(graph: Graph, stage: Stage, rules: Rules) -> dict[str, Array]:
    """`forward` and, of what is trained, `backward`: the models; `names`: JSON, what each takes and gives, by names of
    `planes.joint`. ValueError for a stage that ONNX has no operators for, and for parameters that are not in fp32."""
    for key, value in graph.parameters.items():
        if value.dtype != "float32":
            raise ValueError(f"parameter {key}: {value.dtype}: the onnx plane computes in float32")
    forward, backward = functions(graph, stage, rules)
    both = {"forward": forward} if rules.streams else {"forward": forward, "backward": backward}
    names = {what: {"takes": own.takes, "gives": own.gives} for what, own in both.items()}
    found = {"names": json.dumps(names).encode(), **{what: _model(own) for what, own in both.items()}}
    return {what: Array.of_bytes(data) for what, data in found.items()}


def _model(function: Function) -> bytes:
    values = function.values.values()
    examples = tuple(torch.empty_strided(v.shape, v.strides, dtype=getattr(torch, v.dtype)) for v in values)
    with _quiet(), torch.no_grad():
        program = torch.export.export(function.module, examples)
        try:
            made = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=OPSET)
        except torch.onnx.OnnxExporterError as error:
            without = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error))
            said = f"has no operator for {without.group(1)}" if without else str(error)
            raise ValueError(f"ONNX {said}") from error
    assert made is not None
    graph = made.model_proto.graph
    assert (len(graph.input), len(graph.output)) == (len(function.takes), len(function.gives))
    data: bytes = made.model_proto.SerializeToString()
    return data


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of other libraries' operators."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
