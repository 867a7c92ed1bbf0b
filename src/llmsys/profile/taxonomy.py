"""What a module of a transformer is for, told by its name and its class: the rows of a table of modules.

    embedding           token, position and type tables
    norm                RMSNorm, LayerNorm
    qkv                 query, key and value projections
    rope                rotary embedding: the angles, and what attention does around its projections and its kernel
    scores, softmax, context    eager attention's three steps
    attention           a fused kernel; of models without rotation also what attention does around it
    output              attention's output projection
    gate, up, down      the MLP's projections
    activation          the MLP between its projections: the function, and the product of a gated one
    dropout             between layers
    residual            what a block does between its modules: additions
    block               a block whose modules are not called one by one: in functions of their own, nobody sees where
                        one of them ends
    model               what the model does between its modules: positions, masks, pooling
    logits              the head; `logits+loss` makes the loss itself (`train.loss=chunked`)
    loss                what the model does after its head

A class that is not known and has parameters is a row by its own name. The names are those of transformers' modules, so
the products of `llmsys.cost`, which are called as in the built model, fall into the same rows. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

ROWS = (
    *("embedding", "norm", "qkv", "rope", "scores", "softmax", "context", "attention", "output"),
    *("gate", "up", "activation", "down", "convolution", "dropout", "residual", "block", "model"),
    *("logits", "logits+loss", "loss"),
)
"""As tables have them."""
PHASES = ("data", "agreement", "communication", "optimizer")
"""Of the step, outside of both passes. `agreement`: ranks tell each other how many labels they have, and wait."""
REST = "unattributed"
FORWARD, BACKWARD, RECOMPUTE = "forward", "backward", "recompute"
KINDS = (FORWARD, BACKWARD, RECOMPUTE)

_LAYERS = (
    ("output", r"o_proj|attn\.c_proj|attention\.output\.dense|(?:Self|EncDec)Attention\.o"),
    ("down", r"down_proj|wo|mlp\.c_proj|output\.dense"),
    ("qkv", r"[qkv]_proj|query|key|value|c_attn|[qkv]"),
    ("gate", r"gate_proj|wi_0"),
    ("up", r"up_proj|wi|wi_1|c_fc|intermediate\.dense"),
    ("logits", r"lm_head|classifier|pooler"),
)
"""Row -> the end of a layer's name; the first that fits."""
_PATTERNS = tuple((row, re.compile(rf"(?:^|\.)(?:{ends})$")) for row, ends in _LAYERS)
_CLASSES = (
    ("embedding", re.compile(r"Embedding$")),
    ("norm", re.compile(r"Norm(\dd)?$")),
    ("dropout", re.compile(r"Dropout(\dd)?$")),
    ("convolution", re.compile(r"^Conv\dd$")),
)
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")
_BLOCK = re.compile(r"(?:^|\.)(?:layers?|h|block)\.\d+(?P<inner>\..*)?$")
_ATTENTION = re.compile(r"(?:^|\.)(?:self_attn|attn|attention\.self|SelfAttention|EncDecAttention)$")
_MLP = re.compile(r"(?:^|\.)(?:mlp|DenseReluDense|intermediate)$")


class Place(NamedTuple):
    """Where a module stands: its `row`, and whether only what it does itself counts there, its modules having rows of
    their own (`around`)."""

    row: str
    around: bool


def layer(name: str) -> str:
    """The row of a layer by its name alone; empty where the name says nothing. `<name>@<row>` names its row: so
    `llmsys.cost` calls products that are of no module."""
    if "@" in name:
        return name.rpartition("@")[2]
    return next((row for row, pattern in _PATTERNS if pattern.search(name)), "")


def place(name: str, classes: Sequence[type], *, leaf: bool, parameters: bool, rotary: bool) -> Place | None:
    """The place of a module, or None where its modules alone are of interest.

    `name` in the model, `classes` as `type(module).__mro__` has them. `leaf`: has no modules; `parameters`: has some of
    its own; `rotary`: the model rotates queries and keys.
    """
    names = [cls.__name__ for cls in classes]
    if found := layer(name):
        return Place("logits+loss" if found == "logits" and "LossHead" in names else found, False)
    if any("Rotary" in each for each in names):
        return Place("rope", False)
    if any(cls.__module__ in _ACTIVATIONS for cls in classes):
        return Place("activation", False)
    for row, pattern in _CLASSES:
        if any(pattern.search(each) for each in names) and (leaf or parameters):
            return Place(row, False)
    if (block := _BLOCK.search(name)) and block["inner"] is None:
        return Place("residual", True)
    if _ATTENTION.search(name) and not leaf:
        return Place("rope" if rotary else "attention", True)
    if _MLP.search(name) and not leaf:
        return Place("activation", True)
    if names[0].endswith("Embeddings"):
        return Place("embedding", True)
    return Place(names[0], not leaf) if parameters else None
