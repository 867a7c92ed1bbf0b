"""What a stage's tensors go through on their way out, and on their way in: noise, then the codec that was agreed.

Results, gradients and sums of gradients of shared parameters may lose something: those that are hidden states
(`Graph.hidden`), in fp32. Masks, positions, new values of parameters and states of stages go as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmsys.decentral.codecs import LOSSY, SCALES, decoded, encoded
from llmsys.decentral.compression import NONE, Codecs
from llmsys.decentral.cut import Stage
from llmsys.decentral.graph import Graph, Value
from llmsys.decentral.noise import Noise
from llmsys.decentral.planes import Rules
from llmsys.decentral.wire import Array

AHEAD, BACK, SHARED = "ahead", "back", "shared"
"""Results, their gradients, sums of gradients of shared parameters."""


class Packing:
    """Of `stage`, whose part of the graph is `graph`. Without `codecs` everything goes as it is."""

    def __init__(
        self, graph: Graph, stage: Stage, rules: Rules, codecs: Codecs | None = None, noise: Noise | None = None
    ) -> None:
        self.graph, self.stage, self.rules, self.codecs, self.noise = graph, stage, rules, codecs, noise

    def packed(self, kind: str, step: int, micro_batch: int, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """What is sent of these."""
        found: dict[str, Array] = {}
        for name, array in arrays.items():
            if kind == AHEAD and self.noise is not None and name in self.noise.names:
                array = self.noise.added(array, self.rules, step, micro_batch, name)
            codec = self._codec(kind, name, self.stage.index)
            found |= {name: array} if codec == NONE else encoded(codec, name, array)
        return found

    def unpacked(self, kind: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """What was sent as these. ValueError for what is not as was agreed; names that nobody waits for stay."""
        senders = {AHEAD: self.stage.receives, BACK: self.stage.sends, SHARED: self.stage.hears}.get(kind, {})
        found, left = {}, dict(arrays)
        for name in [each for each in arrays if each in senders]:
            codec = self._codec(kind, name, senders[name])
            if codec != NONE:
                found[name] = decoded(codec, name, left, self._value(kind, name).shape)
                del left[name]
                left.pop(name + SCALES, None)
        return {**left, **found}

    def _codec(self, kind: str, name: str, sender: int) -> str:
        if self.codecs is None or kind not in (AHEAD, BACK, SHARED):
            return NONE
        loses = self._value(kind, name).dtype == LOSSY and (kind == SHARED or name in self.stage.hidden)
        return (self.codecs.ahead if kind == AHEAD else self.codecs.back)[sender] if loses else NONE

    def _value(self, kind: str, name: str) -> Value:
        return self.graph.parameters[name] if kind == SHARED else self.graph.by_name[name].values[0]
