"""A stage on torch: `planes.torch.Run` for each micro-batch, torch's AdamW, and its state by name."""

from __future__ import annotations

import platform
from collections.abc import Iterable

import torch
from torch import Tensor

from llmsys.decentral.cut import Stage
from llmsys.decentral.graph import Graph, Value
from llmsys.decentral.measure import best_s
from llmsys.decentral.planes import CONSTANT, MOMENTS, PARAMETER, Arrays, Rules, names_of, value_of
from llmsys.decentral.planes.layout import packed, unpacked
from llmsys.decentral.planes.torch import Run
from llmsys.decentral.wire import Array

FIRST, SECOND, STEPS = MOMENTS


class TorchPlane:
    """On `device`. Bits are those of one process with as many threads."""

    name = "torch"

    def __init__(self, device: str = "cpu") -> None:
        """ValueError for a device that is not there."""
        try:
            self.device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            why = str(error).strip().splitlines()[0]
            raise ValueError(f"device={device}: torch does not have it here: {why}") from None

    @property
    def stack(self) -> str:
        """On a CPU: kernels are chosen by what it can do, and add up by the number of threads."""
        if self.device.type != "cpu":
            return ""
        cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        return f"{self.name} {torch.__version__} {cpu} {torch.get_num_threads()}"

    def stage(self, graph: Graph, stage: Stage, given: Arrays, rules: Rules) -> TorchStage:
        return TorchStage(graph, stage, given, rules, self.device)

    def warm(self) -> None:
        """Autograd's thread and the optimizer's code: half a second, the first time."""
        weight = torch.ones(8, 8, device=self.device, requires_grad=True)
        optimizer = torch.optim.AdamW([weight], foreach=False)
        torch.nn.functional.cross_entropy(weight @ weight, torch.arange(8, device=self.device)).backward()
        optimizer.step()

    def matmul_s(self, rows: int, size: int) -> float:
        left, right = torch.rand(rows, size, device=self.device), torch.rand(size, size, device=self.device)

        def product() -> float:
            return float((left @ right)[0, 0])  # which waits for the device

        return best_s(product)


class TorchStage:
    """See `planes.Executor`."""

    def __init__(self, graph: Graph, stage: Stage, given: Arrays, rules: Rules, device: torch.device) -> None:
        self.graph, self.own, self.rules, self.device = graph, stage, rules, device
        self.names = frozenset(names_of(stage, rules))
        self._held: dict[str, Tensor] = {}
        self._runs: dict[int, Run] = {}
        self._results: dict[int, float | list[int]] = {}
        self._gradients: dict[str, Tensor] = {}
        self._changed: dict[str, Tensor] = {}  # variables, which are what they were if the step is given up
        self._optimizer: torch.optim.AdamW | None = None

    # --- its state ---

    def put(self, state: Arrays) -> None:
        for name, array in state.items():
            if name not in self.names:
                raise ValueError(f"state {name}: is none of this stage's")
            self._held[name] = self._checked(name, array, value_of(self.graph, name, self.rules))
        self._optimizer = None  # it holds the tensors that were there before

    def begin(self) -> None:
        for name in self.missing:
            if name.startswith(STEPS):
                self._held[name] = torch.zeros((), dtype=torch.float32)
            elif name.startswith(MOMENTS):
                self._held[name] = torch.zeros_like(self._held[PARAMETER + name[2:]])

    @property
    def missing(self) -> set[str]:
        return set(self.names) - set(self._held)

    def state(self, names: Iterable[str]) -> dict[str, Array]:
        return {name: packed(self._held[name]) for name in names}

    # --- a step ---

    def forward(self, step: int, micro_batch: int, inputs: Arrays, received: Arrays) -> dict[str, Array]:
        run = self._run(step, micro_batch)
        sent = run.forward(self._all(inputs), self._all(received))
        if not self.rules.streams:  # else nothing goes back
            self._runs[micro_batch] = run
        self._changed |= {self.rules.variable(key, micro_batch): tensor for key, tensor in run.updates.items()}
        if self.graph.loss is not None:
            self._results[micro_batch] = float(run.outputs[self.graph.loss])
        elif run.outputs:
            self._results[micro_batch] = run.outputs[self.graph.outputs[0]].flatten().tolist()
        return {name: packed(tensor) for name, tensor in sent.items()}

    def backward(
        self, micro_batch: int, gradients: Arrays, shared: Arrays
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        run = self._runs.pop(micro_batch)
        back, found = run.backward(self._all(gradients), self._all(shared))
        on = {}
        for key, gradient in found.items():
            if key in self.own.shares:
                on[key] = packed(gradient)
            elif key in self._gradients:
                self._gradients[key] = self._gradients[key] + gradient
            else:
                self._gradients[key] = gradient
        return {name: packed(tensor) for name, tensor in back.items()}, on

    def _run(self, step: int, micro_batch: int) -> Run:
        return Run(
            self.graph,
            self.own,
            self._tensors(micro_batch),
            train=not self.rules.streams,
            share=1.0 / self.rules.micro_batches,
            draw=lambda node: self.rules.draw(step, micro_batch, node),
        )

    def result(self, micro_batch: int) -> float | list[int] | None:
        return self._results.get(micro_batch)

    def squares(self) -> dict[str, float]:
        return {key: float(each.double().square().sum()) for key, each in self._gradients.items()}

    def apply(self, rate: float, scale: float) -> None:
        if self._owned:
            self._update(rate, scale)
        self._held |= self._changed
        self.forget()

    def _update(self, rate: float, scale: float) -> None:
        if self._optimizer is None:
            self._optimizer = self._made()
        named = dict(zip(self._owned, (group["params"][0] for group in self._optimizer.param_groups), strict=True))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        for key, parameter in named.items():
            gradient = self._gradients.get(key)
            parameter.grad = gradient if gradient is None or scale == 1.0 else gradient * scale
        self._optimizer.step()
        for key, parameter in named.items():
            parameter.grad = None
            if parameter in self._optimizer.state:
                kept = self._optimizer.state[parameter]
                state = {FIRST: kept["exp_avg"], SECOND: kept["exp_avg_sq"], STEPS: kept["step"]}
                self._held |= {prefix + key: tensor for prefix, tensor in state.items()}

    def forget(self) -> None:
        self._runs.clear()
        self._results.clear()
        self._gradients.clear()
        self._changed.clear()

    @property
    def _owned(self) -> list[str]:
        return [key for key in self.own.parameters if key not in self.own.shares and self._floats(key)]

    def _floats(self, key: str) -> bool:
        return self._held[PARAMETER + key].is_floating_point()

    def _made(self) -> torch.optim.AdamW:
        """With the moments that are held."""
        for key in self._owned:
            self._held[PARAMETER + key] = self._held[PARAMETER + key].detach().requires_grad_()
        chosen = self.rules.optimizer
        groups = [
            {
                "params": [self._held[PARAMETER + key]],
                "weight_decay": chosen.weight_decay if self._held[PARAMETER + key].dim() >= 2 else 0.0,
            }
            for key in self._owned
        ]
        optimizer = torch.optim.AdamW(
            groups,
            betas=(chosen.beta1, chosen.beta2),
            eps=chosen.eps,
            foreach=False,
        )
        for key in self._owned:
            kept = {"step": STEPS, "exp_avg": FIRST, "exp_avg_sq": SECOND}
            if float(self._held[STEPS + key]) > 0:
                state = {word: self._held[prefix + key] for word, prefix in kept.items()}
                optimizer.state[self._held[PARAMETER + key]] = state
        return optimizer

    def _tensors(self, micro_batch: int) -> dict[str, Tensor]:
        found = {key: self._held[PARAMETER + key] for key in self.own.parameters}
        now = {**self._held, **self._changed}
        found |= {key: self._held[CONSTANT + key] for key in self.own.constants}
        return {**found, **{key: now[self.rules.variable(key, micro_batch)] for key in self.own.variables}}

    def _all(self, arrays: Arrays) -> dict[str, Tensor]:
        return {name: unpacked(array, self.device) for name, array in arrays.items()}

    def _checked(self, what: str, array: Array, value: Value) -> Tensor:
        """A tensor laid out as when it was traced."""
        if (array.dtype, array.shape) != (value.dtype, value.shape):
            said = f"{array.dtype} {list(array.shape)}"
            raise ValueError(f"{what}: is {said}, and in the graph {value.dtype} {list(value.shape)}")
        tensor = unpacked(array, "cpu" if what.startswith(STEPS) else self.device)  # where AdamW counts
        if tuple(tensor.stride()) == value.strides:
            return tensor
        return tensor.new_empty_strided(value.shape, value.strides).copy_(tensor)
