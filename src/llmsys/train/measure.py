"""What a finished loop has cost, for its record: time by phase, memory by kind, arithmetic against the peak, energy.

Arithmetic. F_model are the FLOPs of a step's matrix products on one rank, forward and backward, that the method needs;
F_hardware those that are done: with what is computed again, by `train.recompute`, by a fused attention kernel (its
scores, in the backward pass) or by LoRA's fused blocks. With t the median step and P the peak of one device,

    achieved_tflops = F_model / t
    mfu             = F_model / (t P)        model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B)
    hfu             = F_hardware / (t P)     hardware FLOPs utilisation

as in llm-foundry's tables: a forward pass counts once and a backward pass twice where everything is trained, attention
4 L D for each token, forward, of a layer (the whole square, though a causal kernel may skip half). What is not as
there: our products leave the embedding out, which multiplies nothing; and a frozen weight has no dW, and no dx where
nothing before it is trained, so that an adapter's step counts about two forward passes, not three. So `mfu` compares
how well runs use a device, of any method; tokens per second compare methods. Padding counts. With 8-bit linear layers
(`train.fp8`) P is that of `train.precision` all the same, and a share above 1 is possible.

P is that of `peaks`: the datasheet's where the card is known by its name, else the speed of a matrix product measured
here; never a guess. `notes` says which.

Memory. `weights_bytes`, `gradients_bytes`, `optimizer_bytes` and `master_bytes` are what the rank holds, by its engine;
`saved_bytes` what autograd keeps of one micro-batch, which is `activations_bytes` and `logits_bytes` (what the loss
keeps behind the head); `offloaded_bytes` of all this lie in the host's memory. On CUDA `workspace_bytes` is the rest of
the peak: what lives for a moment, and those gradients that exist then. All of these are the first rank's. The peaks
(`peak_gib`, `reserved_gib`, `device_gib`, `host_peak_gib`) and `alloc_retries` are each of the rank that has most.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmsys import schema
from llmsys.comm import collectives
from llmsys.cost import flops
from llmsys.cost.case import Facts
from llmsys.profile import memory
from llmsys.profile.busy import Busy
from llmsys.profile.energy import ENERGY
from llmsys.profile.spans import Spans
from llmsys.schema import recompute
from llmsys.train import checks
from llmsys.train.loop import Loop, Outcome
from llmsys.train.peaks import peak_flops

HIDDEN = {
    "ddp": "gradients are exchanged within backward",
    "fsdp2": "weights are gathered within forward and backward, gradients exchanged within backward",
    "tp": "activations are exchanged within forward and backward",
}
"""Engine -> which phases its communication is a part of, and so has no time of its own among them."""
ZERO = {
    0: "gradients are exchanged within backward",
    1: "gradients are exchanged within backward, weights gathered within optimizer",
    2: "gradients are exchanged within backward, weights gathered within optimizer",
    3: "weights are gathered within forward and backward, gradients exchanged within backward",
}
"""The same of ZeRO's stages."""


def measure(config: schema.Config, loop: Loop, outcome: Outcome) -> dict[str, Any]:
    """`summary`, `samples`, `notes` and `kernel` of a finished loop. What is still done with the model disturbs nothing
    that was measured or saved: a step whose collectives are timed, and a forward pass. Collective."""
    from llmsys.models import kernel

    spans = loop.spans
    busy = _busy(loop)
    batch = {key: value.to(loop.device) for key, value in loop.micro_batches(0)[0].items()}
    saved, logits = _saved(loop, batch) if config.profile.probe else (0, None)
    loop.engine.settle()
    kept, held = loop.context.grad_sync.held(), loop.engine.held()
    accounted: dict[str, float] = dict(memory.accounted({**held, **({"compress": kept} if kept else {})}, saved))
    if config.profile.probe:
        if logits is not None:
            accounted |= {"logits_bytes": logits, "activations_bytes": saved - logits}
        accounted |= on_host(config, held, loop.device)
        accounted |= workspace(config, accounted, loop.peak.summary)
    else:
        accounted = {key: value for key, value in accounted.items() if key not in ("saved_bytes", "accounted_bytes")}
    with loop.mixed():
        observed = kernel.observed(loop.model, batch)
    seconds = spans.summary["step_ms_p50"] / 1e3
    used, peak = _efficiency(config, loop.device, seconds)
    spent, counter = _energy(loop, outcome)
    summary = {
        "loss": outcome.loss,
        **outcome.evaluation,
        **_throughput(config, outcome, seconds),
        **spans.summary,
        **busy,
        **over_ranks(loop.peak.summary),
        **accounted,
        **used,
        **spent,
        **loop.energy.clocks,
        **loop.watch.summary,
        **loop.traffic.summary,
        **_policies(config, loop.model),
        **loop.sizes,
        "timed_steps": len(spans.samples["step_ms"]),
        "profiler_overhead_us_per_step": spans.overhead_us_per_step(),
    }
    notes = {"peak_tflops": peak, **counter, **_hidden(config, loop.device)}
    return {"summary": summary, "samples": spans.samples, "notes": notes, "kernel": observed}


def _busy(loop: Loop) -> dict[str, float]:
    """How long a step's collectives and copies take themselves: one more step, at a rate of 0: no weight changes."""
    config = loop.config
    offload = config.engine.offload if isinstance(config.engine, schema.DeepSpeed) else "none"
    if not config.profile.probe or (loop.engine.world == 1 and (offload == "none" or loop.device.type == "cpu")):
        return {}
    busy = Busy(loop.device, offloads=offload != "none")
    timed, loop.spans = loop.spans, Spans(loop.device)  # it is none of the timed steps
    collectives.most(0, loop.device)  # the first rank has been writing: nobody is to wait for it in there
    lr, loop.lr = loop.lr, 0.0
    with busy():
        loop.step(config.train.steps)
    loop.spans, loop.lr = timed, lr
    return busy.summary


def _throughput(config: schema.Config, outcome: Outcome, seconds: float) -> dict[str, float]:
    """Of all ranks, and of one device."""
    each = {"samples_per_s": config.train.global_batch / seconds}
    if outcome.tokens_per_step:
        each |= {"tokens_per_s": outcome.tokens_per_step / seconds}
        each |= {"tokens_per_s_per_device": outcome.tokens_per_step / seconds / config.train.world}
    return each


def _saved(loop: Loop, batch: dict[str, Tensor]) -> tuple[int, int | None]:
    """(bytes that autograd keeps of a micro-batch, those kept behind a language model's head; None of a classifier)."""
    head = getattr(loop.model, "get_output_embeddings", lambda: None)()
    chunked = loop.config.train.loss == "chunked"
    behind: dict[tuple[str, int], int] = {}
    passed = False

    def entered(*_: Any) -> None:
        nonlocal passed
        passed = True

    def note(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if passed:
            behind.setdefault((str(tensor.device), storage.data_ptr()), storage.nbytes())
        else:  # what is kept before the head, its input say, may be kept again behind it
            behind[str(tensor.device), storage.data_ptr()] = 0

    hook = None
    if isinstance(head, nn.Module):  # which makes the loss itself where it is chunked
        hook = (head.register_forward_pre_hook if chunked else head.register_forward_hook)(entered)
    try:
        saved = memory.saved_tensors(loop.model, lambda: loop.forward(batch, 1), note)
    finally:
        if hook:
            hook.remove()
    return saved, sum(behind.values()) if passed else None


def on_host(config: schema.Config, held: dict[str, list[Tensor]], device: torch.device) -> dict[str, float]:
    """`offloaded_bytes`: what of a rank's tensors is in the host's memory and not on its GPU. With the optimizer go,
    from stage 2 on, the gradients that it reads: between steps there are none, so they are known by their size."""
    if device.type == "cpu" or not isinstance(config.engine, schema.DeepSpeed) or config.engine.offload == "none":
        return {}
    found = {kind: [tensor for tensor in tensors if tensor.device.type == "cpu"] for kind, tensors in held.items()}
    if config.engine.zero > 1:
        found["gradients"] = held["gradients"]
    return {"offloaded_bytes": memory.accounted(found, 0)["accounted_bytes"]}


def over_ranks(peak: dict[str, float]) -> dict[str, float]:
    """Of each number of a rank's peak the most of all ranks, and the least of `host_peak_reset`: whether every host's
    mark could be reset. Collective."""
    signs = {key: -1.0 if key == "host_peak_reset" else 1.0 for key in sorted(peak)}
    own = torch.tensor([sign * peak[key] for key, sign in signs.items()], dtype=torch.float64)
    most = collectives.all_gather(own).amax(0).tolist()
    return {key: sign * value for (key, sign), value in zip(signs.items(), most, strict=True)}


def workspace(config: schema.Config, accounted: dict[str, float], peak: dict[str, float]) -> dict[str, float]:
    """`workspace_bytes`: what the device's peak has beside all that is there at the end of a forward pass."""
    if "peak_gib" not in peak:
        return {}
    there = accounted["accounted_bytes"] - accounted.get("offloaded_bytes", 0)
    offloaded = (
        isinstance(config.engine, schema.DeepSpeed) and config.engine.offload != "none" and config.engine.zero > 1
    )
    if schema.accumulation(config.train, config.engine) == 1 and not offloaded:  # they come as saved tensors go
        there -= accounted["gradients_bytes"]
    return {"workspace_bytes": max(0.0, peak["peak_gib"] * memory.GIB - there)}


def _efficiency(config: schema.Config, device: torch.device, seconds: float) -> tuple[dict[str, float], str]:
    """`achieved_tflops`, `mfu`, `hfu`, `peak_tflops`, and where the peak is from."""
    parts = (config.model, config.train, config.method, config.engine)
    known: Facts = {**checks.facts(config, device), "device": device.type}
    peak, source = peak_flops(config, device)
    model, done = flops.model_flops(*parts, **known), flops.step_flops(*parts, **known)
    found = {
        "achieved_tflops": model / seconds / 1e12,
        "mfu": model / seconds / peak,
        "hfu": done / seconds / peak,
        "peak_tflops": peak / 1e12,
    }
    return found, source


def _energy(loop: Loop, outcome: Outcome) -> tuple[dict[str, float], dict[str, str]]:
    """(joules of a step on all devices and tokens for each, where all of them count; of what, or why there are none).
    Clocks are the first rank's."""
    counter = loop.energy
    steps = loop.config.train.steps - (outcome.resumed_from_step or 0) - loop.spans.warmup
    total, devices = torch.tensor([counter.joules, float(bool(counter.source))], dtype=torch.float64), 1
    if loop.device.type == "cuda":  # each rank has a device of its own; a host they share
        collectives.all_reduce(total)
        devices = loop.config.train.world
    joules, counting = total.tolist()
    if counting < devices:
        return {}, {ENERGY: "another rank's counter cannot be read", **counter.why}
    if not joules:
        return {}, {ENERGY: f"did not move in {steps} steps: {counter.source}", **counter.why}
    found = {ENERGY: joules / steps}
    if outcome.tokens_per_step:
        found["tokens_per_j"] = outcome.tokens_per_step * steps / joules
    return found, {ENERGY: counter.source, **counter.why}


def _hidden(config: schema.Config, device: torch.device) -> dict[str, str]:
    """Which phases have no time of their own, and where it is."""
    found = {}
    engine = config.engine
    where = ZERO[engine.zero] if isinstance(engine, schema.DeepSpeed) else HIDDEN.get(engine.kind)
    if where and config.train.world > 1:
        found["communication_ms"] = f"{where}; communication_busy_ms is its own time, overlapped or not"
        if config.compress.kind != "none":
            where = "within backward" if engine.kind == "ddp" else "compressed, between backward and optimizer"
            found["communication_ms"] = f"gradients are exchanged {where}"
    if isinstance(engine, schema.DeepSpeed) and engine.offload != "none":
        where = "copies within backward and optimizer; offload_busy_ms is their own time, overlapped or not"
        found["offload_ms"] = where if device.type == "cuda" else "the device is the host: nothing is copied"
    return found


def _policies(config: schema.Config, model: nn.Module) -> dict[str, int]:
    """How many blocks compute what again, as it was done: `blocks_<policy>` (`attn+mlp` as `attn_mlp`)."""
    from llmsys.models import blocks

    if config.train.recompute == "none":
        return {}
    each = recompute.policies(config.train.recompute, len(blocks(model)))
    return {f"blocks_{policy.replace('+', '_')}": each.count(policy) for policy in recompute.POLICIES if policy in each}
