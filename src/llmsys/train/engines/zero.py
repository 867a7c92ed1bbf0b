"""DeepSpeed's ZeRO: optimizer state (1), gradients (2) and weights (3) shared over the ranks; offloaded on request.

(Rajbhandari et al., arXiv 1910.02054; Ren et al., ZeRO-Offload, arXiv 2101.06840.) DeepSpeed owns the exchange of
gradients, clipping and the update; the loop stays ours. It flattens each parameter group and gives every rank one piece
of the flat tensor, so the optimizer knows no parameters any more: `_fragments` says which part of which parameter lies
where, and with that checkpoints are written by parameter name, readable by any engine and any number of ranks, without
DeepSpeed's pickles.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmsys import schema
from llmsys.comm import collectives
from llmsys.comm.place import Place
from llmsys.errors import MissingPackage
from llmsys.models.surgery import blocks
from llmsys.train import zero_settings
from llmsys.train.engines import compiled
from llmsys.train.engines.local import Local
from llmsys.train.optimizer import keep, piece_of
from llmsys.train.protocols import Fill, Make, filled

MOMENTS = ("exp_avg", "exp_avg_sq")


class Fragment(NamedTuple):
    """`numel` elements of a parameter from `start` on lie on this rank, in `flat` from `offset` on."""

    parameter: nn.Parameter
    start: int
    flat: nn.Parameter
    offset: int
    numel: int


class DeepSpeed(Local):
    """`engine.zero` 0 to 3."""

    _engine: Any = None

    def __init__(self, config: schema.Config, place: Place, device: torch.device) -> None:
        super().__init__(config, place, device)
        assert isinstance(config.engine, schema.DeepSpeed)
        self.settings = config.engine
        self.divisor = self.world
        self.cuts_weights = self.settings.zero == 3

    def wrap(self, model: nn.Module, make: Make, fill: Fill = filled) -> nn.Module:
        deepspeed = _import(self.device)
        if self.device.type == "cpu":
            compiled.load("ShareMemCommBuilder")
        settings = self._settings(sum(p.numel() for p in model.parameters() if p.requires_grad))
        if self.settings.zero == 3:
            _cut(model, fill, settings)
        fill(model)
        self.model, self.trained = model, [p for p in model.parameters() if p.requires_grad]
        optimizer = self._cpu_adam(make(model)) if self.settings.optimizer == "cpu_adam" else make(model)
        self._engine, self._zero, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self.optimizer = self._zero.optimizer if self.settings.zero else optimizer
        if self.settings.zero == 3:
            _gather_what_is_read(model)
        engine: nn.Module = self._engine
        return engine

    def _settings(self, trained: int) -> dict[str, Any]:
        train, cuda = self.config.train, self.device.type == "cuda"
        return zero_settings.settings(self.config.model, train, self.settings, trained=trained, cuda=cuda)

    def _cpu_adam(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """DeepSpeed's vectorised AdamW over the same groups; compiled on first use."""
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        first = optimizer.param_groups[0]
        compiled.load("CPUAdamBuilder")
        made: torch.optim.Optimizer = DeepSpeedCPUAdam(
            [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in optimizer.param_groups],
            betas=first["betas"],
            eps=first["eps"],
            adamw_mode=True,
        )
        return made

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return self._boundary(last)

    @contextlib.contextmanager
    def _boundary(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        # inf or NaN becomes a gradient that is not finite anywhere, by which ZeRO leaves the update out on all ranks
        loss = loss * (loss.detach() * 0 + 1)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, sums: Tensor, max_norm: float) -> tuple[list[float], float]:
        if not self.settings.zero:
            return super().step(sums, max_norm)
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        values, norm_value = self._total(sums.detach().double()).tolist(), float(norm)
        applied = math.isfinite(values[0]) and math.isfinite(norm_value)
        assert applied or self._zero.overflow, "DeepSpeed updated the weights with a gradient that is not finite"
        return values, norm_value

    def _fragments(self) -> Iterator[Fragment]:
        """What of every trained parameter this rank updates."""
        if self.settings.zero == 3:
            for group, flat in zip(self._zero.fp16_groups, self._zero.fp32_partitioned_groups_flat, strict=True):
                for p in group:
                    _, offset, numel = self._zero.grad_position[self._zero.get_param_id(p)]
                    start = numel * self.rank
                    yield Fragment(
                        p, start, flat, offset, max(0, min(numel, p.ds_numel - start))
                    )  # the rest is padding
            return
        for group, flat in zip(self._zero.bit16_groups, self._zero.single_partition_of_fp32_groups, strict=True):
            for p in group:
                if p._hp_mapping is not None:
                    here, there = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
                    yield Fragment(p, here.start, flat, there.start, there.numel)

    def full(self, tensor: Tensor) -> Tensor:
        if self.settings.zero < 3 or not hasattr(tensor, "ds_id"):
            return tensor.detach()
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if not self.settings.zero:
            return super().moments(parameter)
        steps = [state["step"] for state in self.optimizer.state.values() if "step" in state]
        if not collectives.most(len(steps), self.device):
            return {}
        found = {key: self._gathered(parameter, key) for key in (*MOMENTS, "master")}
        if self.config.model.dtype == "fp32":
            del found["master"]
        step = collectives.most(int(steps[0]) if steps else 0, self.device)
        return {**found, "step": torch.tensor(float(step))}

    def _gathered(self, parameter: Any, key: str) -> Tensor:
        """A parameter's moment, or `master` copy, whole: the sum of the ranks' fragments, zero elsewhere, is exact."""
        shape = parameter.ds_shape if self.settings.zero == 3 else parameter.shape
        buffer = torch.zeros(shape.numel(), dtype=torch.float32, device=self.device)
        for fragment in self._by_parameter.get(parameter, []):
            piece = (
                fragment.flat.detach()[fragment.offset : fragment.offset + fragment.numel]
                if key == "master"
                else piece_of(self.optimizer, fragment.flat, key, fragment.offset, fragment.numel)
            )
            buffer[fragment.start : fragment.start + fragment.numel] = piece.to(self.device)
        collectives.all_reduce(buffer)
        return buffer.reshape(shape)

    @functools.cached_property
    def _by_parameter(self) -> dict[nn.Parameter, list[Fragment]]:
        found: dict[nn.Parameter, list[Fragment]] = {}
        for fragment in self._fragments():
            found.setdefault(fragment.parameter, []).append(fragment)
        return found

    def set_moments(self, moments: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        if not self.settings.zero:
            return super().set_moments(moments)
        filled = dict[nn.Parameter, None]()
        for fragment in self._fragments():
            values = moments.get(fragment.parameter)
            if values is None:
                continue
            filled[fragment.flat] = None
            state = self.optimizer.state.setdefault(fragment.flat, {})
            if not state:
                state.update({key: torch.zeros_like(fragment.flat) for key in MOMENTS})
                step = values["step"]
                state["step"] = int(step) if self.settings.optimizer == "cpu_adam" else step.to(fragment.flat.device)
            for key in (*MOMENTS, "master"):
                if key in values:
                    target = fragment.flat.detach() if key == "master" else state[key]
                    piece = values[key].reshape(-1)[fragment.start : fragment.start + fragment.numel]
                    target[fragment.offset : fragment.offset + fragment.numel] = piece.to(target.device)
        for flat in filled:
            keep(self.optimizer, flat)

    def held(self) -> dict[str, list[Tensor]]:
        if not self.settings.zero:
            return super().held()
        parameters: list[Any] = list(self.model.parameters())
        sharded = self.settings.zero == 3
        flats = list(dict.fromkeys(fragment.flat for fragment in self._fragments()))
        weights = [p.ds_tensor if sharded else p.detach() for p in parameters]
        graded = [p for p in parameters if p.requires_grad] if self.settings.zero == 1 else flats
        return {
            "weights": [*weights, *self.model.buffers()],
            "gradients": [torch.empty_like(p, device="meta") for p in graded],
            "optimizer": [
                v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)
            ],
            "master": [flat.detach() for flat in flats],
        }


def _cut(model: nn.Module, fill: Fill, settings: dict[str, Any]) -> None:
    """Fills a block, cuts its weights over the ranks, and goes on to the next, so that no rank holds all of them.

    DeepSpeed itself, given a model that is not cut, moves the whole of it to each rank's device first. What it would
    cast it does not touch once it is cut: with bf16 that is peft's adapters, which are in fp32.
    """
    from deepspeed.runtime.zero import Init

    first: Any = None
    for part in (*(block for _, block in blocks(model)), model):
        fill(part)
        whole = [p for p in part.parameters() if not hasattr(p, "ds_id")]
        for p in whole if "bf16" in settings else ():
            if p.is_floating_point():
                p.data = p.data.to(torch.bfloat16)
        if first is None:
            Init(module=part, config_dict_or_path=settings)
            first = whole[0]
        else:
            first.convert_to_zero_parameters(param_list=whole)


def _gather_what_is_read(model: nn.Module) -> None:
    """Has ZeRO-3 gather for a module, in both passes, weights of modules that it reads without calling them.

    It gathers a module's own weights when the module is called. One that reads others' has a method
    `parameters_read()`, which names them. They are registered with it one by one, as DeepSpeed's documentation has it
    for such weights; the other way, to mark the module as a leaf, reduces all its gradients when that of its input is
    there, and the first block's input has none where embeddings are frozen: they would be reduced before they exist.
    """
    from deepspeed.runtime.zero import register_external_parameter

    for module in model.modules():
        read = getattr(module, "parameters_read", None)
        for parameter in read() if read else ():
            register_external_parameter(module, parameter)


def _import(device: torch.device) -> Any:
    """The library, told which kind of device to use and to keep its greetings out of our output."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise MissingPackage("engine=deepspeed: needs DeepSpeed: pip install 'llmsys[deepspeed]'") from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
