"""Changes to a step that are known, and how long what they put in the place of its modules takes, measured by itself.

What a change would save is predicted before it is made: the time that the modules it replaces take in the step, less
the time of their replacement alone, at the model's own shapes, forward and backward, as often as the step has it.

    flash          eager attention's three steps -> torch's fused kernel         model.attention=sdpa
    chunked_loss   head and loss over whole logits -> some rows at a time        train.loss=chunked
    fused_norm     RMSNorm written in Python -> torch.nn.functional.rms_norm     no setting of the trainer
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmsys import schema
from llmsys.bench.ops.clock import Clock, copies
from llmsys.models.build import DTYPES
from llmsys.models.linear_cross_entropy import linear_cross_entropy
from llmsys.train.evaluate import autocast

Act = partial[Tensor]
"""An operator with its operands, of which those that want a gradient get one."""


@dataclass(frozen=True, kw_only=True)
class Alone:
    """What comes in the place of modules, by itself: its forward pass, and that with the backward pass, on several sets
    of operands each. `step_s`: a step's seconds, of those of the two."""

    forward: Sequence[Callable[[], object]]
    both: Sequence[Callable[[], object]]
    step_s: Callable[[float, float], float]

    def once_ms(self, clock: Clock) -> float:
        """ms of a step's, of each set of operands once."""
        return 1e3 * self.step_s(clock.once(self.forward), clock.once(self.both))


@dataclass(frozen=True, kw_only=True)
class Change:
    """`rows` of the table of modules go. `replaces` is the config with it, or None where it is no setting, and `patch`
    then changes a built model in place."""

    name: str
    rows: tuple[str, ...]
    setting: str
    applies: Callable[[schema.Config], bool]
    replacement: Callable[[schema.Config, Clock], Alone]
    configured: Callable[[schema.Config], schema.Config]
    patch: Callable[[nn.Module], None] | None = None


def known(config: schema.Config) -> list[Change]:
    """Those that `config` has not made yet."""
    if not isinstance(config.model, schema.Transformer) or config.model.family != "llama":
        return []
    if isinstance(config.method, schema.LoRA):  # whose blocks are chains of functions of their own
        return []
    return [change for change in CHANGES if change.applies(config)]


def _model(config: schema.Config) -> schema.Transformer:
    assert isinstance(config.model, schema.Transformer)
    return config.model


def _alone(
    config: schema.Config,
    clock: Clock,
    make: Callable[[], Act],
    held: int,
    step_s: Callable[[float, float], float],
) -> Alone:
    """Of what `make` makes, from operands of `held` bytes."""
    mixed = partial(autocast, clock.device, config.train.precision, config.model.dtype)

    def forward(act: Act) -> Tensor:
        with mixed():
            return act()

    def both(act: Act) -> None:
        out = forward(act)
        inputs = [x for x in act.args if isinstance(x, Tensor) and x.requires_grad]
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    acts = [make() for _ in range(copies(held))]
    once, twice = ([partial(f, act) for act in acts] for f in (forward, both))
    return Alone(forward=once, both=twice, step_s=step_s)


def _in_blocks(config: schema.Config) -> Callable[[float, float], float]:
    """A step's, of what each block has once; forward once more where blocks are computed again."""
    again = config.train.recompute == "block"
    times = _model(config).num_layers * schema.accumulation(config.train, config.engine)
    return lambda forward, both: times * (both + again * forward)


def _random(config: schema.Config, clock: Clock, *shape: int, narrow: bool = False) -> Tensor:
    """With a gradient. `narrow`: what a product has made, under autocast in bf16."""
    dtype = DTYPES[config.train.precision if narrow else config.model.dtype]
    return torch.randn(shape, dtype=dtype, device=clock.device).requires_grad_()


def _flash(config: schema.Config, clock: Clock) -> Alone:
    model, train = _model(config), config.train

    def make() -> Act:
        q, k, v = (
            _random(config, clock, train.micro_batch, model.num_heads, train.length, model.head_width, narrow=True)
            for _ in "qkv"
        )
        return partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)

    held = 8 * 4 * train.micro_batch * train.length * model.num_heads * model.head_width
    return _alone(config, clock, make, held, _in_blocks(config))


def _chunked_loss(config: schema.Config, clock: Clock) -> Alone:
    model, train = _model(config), config.train

    def make() -> Act:
        h = _random(config, clock, train.micro_batch, train.length, model.hidden_size)
        weight = _random(config, clock, model.vocab_size, model.hidden_size)
        weight.requires_grad_(config.method.kind == "full")
        labels = torch.randint(model.vocab_size, (train.micro_batch, train.length), device=clock.device)
        return partial(linear_cross_entropy, h, weight, labels, shift=True)

    held = 8 * model.hidden_size * (train.micro_batch * train.length + model.vocab_size)
    times = schema.accumulation(train, config.engine)
    return _alone(config, clock, make, held, lambda _, both: times * both)


def _fused_norm(config: schema.Config, clock: Clock) -> Alone:
    model, train = _model(config), config.train

    def make() -> Act:
        x = _random(config, clock, train.micro_batch, train.length, model.hidden_size)
        weight = _random(config, clock, model.hidden_size).requires_grad_(config.method.kind == "full")
        return partial(_rms_norm, x, weight, model.norm_eps)

    blocks, times = _in_blocks(config), schema.accumulation(train, config.engine)  # two in a block, and the last one
    held = 16 * train.micro_batch * train.length * model.hidden_size
    return _alone(config, clock, make, held, lambda forward, both: 2 * blocks(forward, both) + times * both)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _patch_norms(model: nn.Module) -> None:
    """Has every RMSNorm of `model`, in place, computed by torch's own function."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_forward, module)


def _forward(norm: Any, x: Tensor) -> Tensor:
    return _rms_norm(x, norm.weight, norm.variance_epsilon)


def _with_model(config: schema.Config, **values: object) -> schema.Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **values))  # type: ignore[arg-type]


CHANGES = (
    Change(
        name="flash",
        rows=("scores", "softmax", "context"),
        setting="model.attention=sdpa",
        applies=lambda config: _model(config).attention == "eager",
        replacement=_flash,
        configured=lambda config: _with_model(config, attention="sdpa"),
    ),
    Change(
        name="chunked_loss",
        rows=("logits", "loss"),
        setting="train.loss=chunked",
        applies=lambda config: config.train.loss == "whole",
        replacement=_chunked_loss,
        configured=lambda config: dataclasses.replace(config, train=dataclasses.replace(config.train, loss="chunked")),
    ),
    Change(
        name="fused_norm",
        rows=("norm",),
        setting="torch.nn.functional.rms_norm, no setting here",
        applies=lambda config: True,
        replacement=_fused_norm,
        configured=lambda config: config,
        patch=_patch_norms,
    ),
)
