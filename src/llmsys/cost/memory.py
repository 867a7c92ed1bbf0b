"""How many bytes a training step holds, before anything is loaded: weights, gradients, optimizer, activations, logits.

    weights      every parameter in the model's dtype, and an adapter's A and B in theirs
    gradients    what is trained, in its own dtype
    optimizer    AdamW: two moments like the gradient, and a 4-byte step count for each tensor
    activations  what autograd keeps of the blocks and the ends of the model; derived in `tape` and `walk`
    logits       the loss's log-probabilities: 4 bytes x tokens x vocabulary, often the largest single tensor

`lora_peft` trains A and B; `lorafa_peft` trains B, with A frozen, so no adapted layer keeps its input (arXiv
2308.03303, section 3.2). Both train BERT's classifier too, which is new. `majority` trains nothing and `probe` nothing
that passes through the model.

`train.recompute=block`: each block keeps only its input, T*D values; while the backward pass is in one block, what
that block keeps is there as well, so `activations` has the largest block once. Saved-tensor hooks see the first part
only: `ledger(...).kept`.

Not included: buffers (kilobytes), the allocator's slack, workspaces, and what an operator needs for a moment;
`peak_bytes` adds the largest of those, the gradient of the logits.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from llmsys import schema
from llmsys.cost import shapes, walk


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What autograd keeps of one micro-batch, in bytes, part by part; `blocks` as they are without recomputation."""

    embedding: int
    blocks: tuple[int, ...]
    block_input: int
    mask: int
    head: int
    logits: int
    recompute: bool

    @property
    def kept(self) -> int:
        """Bytes kept from forward to backward without the logits: what saved-tensor hooks see."""
        blocks = self.block_input * len(self.blocks) + self.mask if self.recompute else sum(self.blocks)
        return self.embedding + blocks + self.head

    @property
    def activations(self) -> int:
        """`kept`, and under recomputation the one block that is alive while its backward pass runs."""
        return self.kept + (max(self.blocks) if self.recompute else 0)


def estimate(
    model: schema.Model,
    train: schema.Train,
    method: schema.Method,
    engine: schema.Engine,
    *,
    num_labels: int = 2,
    padded: bool | None = None,
    device: str = "cpu",
) -> dict[str, int]:
    """Bytes a rank by kind: weights, gradients, optimizer, activations, logits.

    `num_labels`: classes of a classifier. `padded`: batches carry an attention mask; None means that they do for bert
    and do not for llama. `device`: `cpu` and `cuda` differ in dropout's masks. Raises ValueError for an engine or a
    method whose memory is not known here, and for a target that names no layer.
    """
    _known(method, engine)
    parts = ledger(model, train, method, num_labels=num_labels, padded=padded, device=device)
    width = _width(model)
    a, b = shapes.adapter_parameters(model, method)
    adapter_width = 4 if isinstance(method, schema.Adapter) and method.dtype == "fp32" else width
    table = shapes.parameters(model, num_labels if model.family == "bert" else 0)
    weights = 0 if method.kind == "majority" else width * sum(table.values()) + adapter_width * (sum(a) + sum(b))

    trained = [(numel, width) for name, numel in table.items() if _trained(name, method)]
    trained += [(numel, adapter_width) for numel in (a + b if method.kind == "lora_peft" else b)]
    gradients = sum(numel * wide for numel, wide in trained)
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": 2 * gradients + 4 * len(trained),
        "activations": parts.activations,
        "logits": parts.logits,
    }


def peak_bytes(
    model: schema.Model,
    train: schema.Train,
    method: schema.Method,
    engine: schema.Engine,
    *,
    num_labels: int = 2,
    padded: bool | None = None,
    device: str = "cpu",
) -> int:
    """The most bytes alive at once in a step: what a check before loading should compare with the device.

    Two moments compete. At the start of the backward pass all saved tensors are there, with the logits (held by the
    model's output) and, in fp32, their gradient before and after the log-softmax. At its end the saved tensors are
    gone and all gradients are there. Gradients are there at both where micro-batches are accumulated.
    """
    kinds = estimate(model, train, method, engine, num_labels=num_labels, padded=padded, device=device)
    # per logit: itself in the products' width, and two fp32 gradients; log-probabilities (4) are in `logits`
    per_logit = 8 + (2 if train.precision == "bf16" else 4)
    start = kinds["activations"] + kinds["logits"] + kinds["logits"] * per_logit // 4
    if train.accumulation > 1:
        start += kinds["gradients"]
    return kinds["weights"] + kinds["optimizer"] + max(start, kinds["gradients"])


def ledger(
    model: schema.Model,
    train: schema.Train,
    method: schema.Method,
    *,
    num_labels: int = 2,
    padded: bool | None = None,
    device: str = "cpu",
) -> Ledger:
    """The saved tensors of one micro-batch of `train.micro_batch` x `train.length` tokens."""
    if method.kind in shapes.UNTRAINED:
        return Ledger(embedding=0, blocks=(0,), block_input=0, mask=0, head=0, logits=0, recompute=False)
    chosen = setting(model, train, method, num_labels=num_labels, padded=padded, device=device)
    tape, block_input = walk.run(model, chosen)
    return Ledger(
        embedding=tape.saved["embedding"],
        blocks=tuple(tape.saved[f"block{i}"] for i in range(model.num_layers)),
        block_input=block_input.numel * block_input.width,
        mask=chosen.mask_bytes(model),
        head=tape.saved["head"],
        logits=tape.saved["logits"],
        recompute=train.recompute == "block",
    )


def setting(
    model: schema.Model,
    train: schema.Train,
    method: schema.Method,
    *,
    num_labels: int = 2,
    padded: bool | None = None,
    device: str = "cpu",
) -> walk.Setting:
    """The walk's settings of a config; see `estimate` for the keywords."""
    return walk.Setting(
        batch=train.micro_batch,
        length=train.length,
        method=method,
        autocast=train.precision == "bf16" and model.dtype == "fp32",
        padded=model.family == "bert" if padded is None else padded,
        cuda=device == "cuda",
        num_labels=num_labels,
    )


def bytes_per_block(model: schema.Model, train: schema.Train, method: schema.Method, *, device: str = "cpu") -> float:
    """Saved bytes of an inner block over B L D: the unit in which papers and `lorafa` compare methods."""
    deep = dataclasses.replace(model, num_layers=2)
    blocks = ledger(deep, train, method, device=device).blocks
    return blocks[1] / (train.micro_batch * train.length * model.hidden_size)


def num_params(model: schema.Model, num_labels: int = 0) -> int:
    """Parameters of a model, by arithmetic. BERT: without its pooler; with its classifier for `num_labels` > 0."""
    return sum(shapes.parameters(model, num_labels).values())


def trainable_params(model: schema.Model, method: schema.Method, num_labels: int = 0) -> int:
    """Parameters that the method trains."""
    table = shapes.parameters(model, num_labels if model.family == "bert" else 0)
    a, b = shapes.adapter_parameters(model, method)
    trained = sum(numel for name, numel in table.items() if _trained(name, method))
    return trained + sum(b) + (sum(a) if method.kind == "lora_peft" else 0)


def _width(model: schema.Model) -> int:
    return 2 if model.dtype == "bf16" else 4


def _trained(name: str, method: schema.Method) -> bool:
    if method.kind in shapes.UNTRAINED:
        return False
    return method.kind == "full" or name.startswith("classifier.")


def _known(method: schema.Method, engine: schema.Engine) -> None:
    if engine.kind != "local":
        raise ValueError(f"engine.kind={engine.kind}: no memory estimate for it; there is one for local")
    if method.kind not in shapes.METHODS:
        raise ValueError(
            f"method.kind={method.kind}: no memory estimate for it; there is one for {', '.join(shapes.METHODS)}"
        )
