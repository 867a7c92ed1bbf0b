"""What a pass does, operator by operator: arithmetic and bytes, from which time follows.

torch runs a model in eager mode as many small operators. Those that multiply matrices are paid by arithmetic, the
others by the memory that they read and write; a norm written in Python, as transformers has RMSNorm, is seven passes
over its input. `tape` notes the operators of both passes by part of the model. Here are the sizes of those that are
several operators in truth. n is a tensor's elements, w its bytes an element; bytes are read and written together.

    RMSNorm       forward    pow 8 n, mean 4 n, times 1/rms 8 n, times the weight 2 w n; casts (4 + w) n each way
                  backward   72 n and 2 w n, 4 w n more for the weight's gradient; casts
    rotation      forward    x cos 2 w n, minus w n, cat 2 w n, times sin 2 w n, sum 3 w n
                  backward   14 w n
    silu, gelu    2 w n and 3 w n, at the speed of exponentials
    softmax       the same
    loss          log-softmax 8 n and 12 n; the gradient's zeros 4 n; casts
    AdamW         fused: weight, gradient and two moments read, all but the gradient written

Each further use of a tensor adds its gradient to another one: 3 w n.
"""

from __future__ import annotations

from typing import NamedTuple

WHOLE = "whole_"
ARITHMETIC = (
    "product",
    "batched",
    "attention",
    "attention_backward",
    f"{WHOLE}attention",
    f"{WHOLE}attention_backward",
)
KINDS = (*ARITHMETIC, "stream", "exp", "dequant")
"""`product`: of two matrices; `batched`: many small ones at once, eager attention's; `attention`: a fused kernel that
skips what comes later, causal attention without a mask; `whole_attention`: one that skips nothing; of both the whole
square counts. `stream`: paid by bytes; `exp`: exponentials and random numbers, by bytes too; `dequant`: 4-bit and 8-bit
weights made wide again, by bytes."""
FORWARD, BACKWARD, AGAIN = "forward", "backward", "again"


class Op(NamedTuple):
    """Operators that are alike, `launches` of them, in a pass; `AGAIN`: forward, within the backward pass.

    `flops` and `nbytes` of all of them; `matrices`: products in each, which `batched` has several of; `width`: bytes an
    element, which says the precision.
    """

    passed: str
    kind: str
    flops: float
    nbytes: float
    launches: int = 1
    matrices: int = 1
    width: int = 4

    @property
    def size(self) -> float:
        """By which its speed goes: FLOPs of one product or kernel, bytes of one pass over memory."""
        return (self.flops if self.flops else self.nbytes) / (self.launches * self.matrices)


class Both(NamedTuple):
    """Bytes and operators of something forward and backward."""

    forward: float
    forward_launches: int
    backward: float
    backward_launches: int


def rms_norm(n: int, width: int, trained: bool) -> Both:
    cast = (4 + width) * n * (width != 4)
    forward = 2 * cast + 20 * n + 2 * width * n
    backward = 2 * cast + 72 * n + 2 * width * n + 4 * width * n * trained
    return Both(forward, 6 + 2 * (width != 4), backward, 14 + 2 * trained + 2 * (width != 4))


def rotation(n: int, width: int) -> Both:
    return Both(10 * width * n, 5, 14 * width * n, 7)
