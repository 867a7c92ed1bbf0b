"""Cross entropy of a language model's head without its logits: only a chunk of their rows exists at a time.

The mean loss over the n positions that have a label y_t is L = 1/n sum_t (log sum_v exp z_tv - z_t,y), z_t = W h_t + b.
Of a vocabulary of V = 128k the logits are 31 times as many numbers as the hidden states of an 8B model, and eager code
keeps their fp32 log-probabilities besides. But the derivative of a row,

    dz_t = p_t - e_y  (0 without a label),     dh_t = dz_t W / n,     dW = sum_t dz_t h_t^T / n,     db = sum_t dz_t / n

needs nothing but that row. So the gradients are made in the forward pass, chunk by chunk, and the backward pass merely
scales them (the idea of Liger, arXiv 2410.10989, section 3.2, and of torchtune's chunked loss).

Shapes: T rows, V vocabulary, D model width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llmsys.uncompiled import uncompiled


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    shift: bool = False,
    count: Tensor | int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The mean cross entropy of `h @ weight.T + bias` against `labels`, a scalar in fp32 (fp64 for fp64).

    h [..., D], weight [V, D], labels [...] of the same leading shape, bias [V]. The mean is over the labels that are
    not `ignore_index`; `count` is divided by instead, where it is given. Without any label the loss is 0 and so are its
    gradients. `shift`: the label of a position is that of the next one, and the last position has none (causal
    language models); else positions have their own (seq2seq).

    Saved: dh, and dW, db where those are trained; dh in the dtype of the products (under autocast autocast's), the
    others in their parameter's (fp32 for fp16's, since before 1/n a sum over all rows may exceed 65504). Alive for a
    moment: a chunk of the rows of h and of their logits, see `chunk_rows`, and where the products are narrower than
    fp32 also these logits in fp32; then dW is added up in fp32 too. Weights are read in the forward pass
    alone. Rounded where transformers rounds: logits and dz to the products' dtype, softmax and loss in fp32; the
    factor 1/n is applied last, so a dz in fp16 does not vanish. What a row without a label holds, NaN perhaps, counts
    nowhere. ValueError where the shapes do not fit. Differentiable once.
    """
    if h.shape[:-1] != labels.shape:
        raise ValueError(f"labels: have shape {list(labels.shape)}, and hidden states {list(h.shape)}")
    if shift:
        labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return _entropy(h.flatten(0, -2), weight, bias, labels.flatten(), count, ignore_index)


def chunk_rows(rows: int, vocabulary: int, width: int, *, trained: bool = False) -> int:
    """Rows of a chunk: as many as make its logits about as large as all hidden states, rows x V = T x D.

    Then no chunk costs more than what is there anyway, and each is as large a product as that allows: 256 rows for
    8192 tokens of Llama-3-8B (V/D = 31). Where the weight is `trained` there are V x D numbers of dW in any case, to
    which each chunk adds: then D/4 rows at least, a quarter of that, or adding would take longer than multiplying.
    """
    return max(1, math.ceil(rows / math.ceil(vocabulary / width)), min(rows, math.ceil(width / 4)) if trained else 0)


@uncompiled
def _entropy(
    h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, count: Tensor | int | None, ignore_index: int
) -> Tensor:
    known = labels != ignore_index
    if count is None:
        count = known.sum().clamp(min=1)
    scale = 1 / torch.as_tensor(count, dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
    target = labels.where(known, 0)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (h, weight, bias)):
        loss: Tensor = _LinearCrossEntropy.apply(h, weight, bias, target, known, scale)
        return loss
    return _chunked(h, weight, bias, target, known, (False,) * 3)[0] * scale


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss as one node, which keeps the gradients it will be asked for."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, known: Tensor, scale: Tensor
    ) -> Tensor:
        total, gradients = _chunked(h, weight, bias, target, known, ctx.needs_input_grad[:3])
        ctx.dtypes = [None if x is None else x.dtype for x in (h, weight, bias)]
        ctx.save_for_backward(scale, *gradients)
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, *gradients = ctx.saved_tensors
        found = [
            None if gradient is None else (gradient * (grad * scale)).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*found, None, None, None)


def _chunked(
    h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, known: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """(summed loss, its gradients by h, weight and bias where `wanted`), for target [T], which counts where `known`."""
    kind = h.device.type
    narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
    wide = torch.promote_types(narrow, torch.float32)
    rows = chunk_rows(len(h), *weight.shape, trained=wanted[1])
    w, b = weight.to(narrow), None if bias is None else bias.to(narrow)
    total = h.new_zeros((), dtype=wide)
    dh = h.new_empty(h.shape, dtype=narrow) if wanted[0] else None
    dw = weight.new_zeros(weight.shape, dtype=wide) if wanted[1] else None
    db = weight.new_zeros(len(weight), dtype=wide) if wanted[2] else None
    with torch.autocast(kind, enabled=False):
        for start in range(0, len(h), rows):
            part = slice(start, start + rows)
            x, y, counts = h[part].to(narrow), target[part, None], known[part, None].to(wide)
            x = x.where(known[part, None], 0)  # 0 times NaN is NaN
            z = x @ w.T if b is None else torch.addmm(b, x, w.T)
            p = z.to(wide)  # in place from here on
            at = p.sub_(p.amax(-1, keepdim=True)).gather(1, y)
            norm = p.exp_().sum(-1, keepdim=True)
            total += (counts * (norm.log() - at)).sum()
            if not any(wanted):
                continue
            p.mul_(counts / norm)
            p.scatter_(1, y, p.gather(1, y) - counts)
            dz = z.copy_(p)
            del p
            if dh is not None:
                torch.mm(dz, w, out=dh[part])
            if dw is not None:
                dw = torch.addmm(dw, dz.T, x, out=dw) if narrow == wide else dw.add_(dz.T @ x)
            if db is not None:
                db += dz.sum(0)
            del z, dz  # before the next chunk is there
    return total, [
        dh,
        None if dw is None else dw.to(_kept(weight.dtype)),
        None if bias is None or db is None else db.to(_kept(bias.dtype)),
    ]


def _kept(dtype: torch.dtype) -> torch.dtype:
    """In which a parameter's gradient waits for the factor 1/n: its own, if that has fp32's range."""
    return torch.float32 if dtype == torch.float16 else dtype
