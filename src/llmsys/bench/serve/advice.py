"""Which hardware, how many cards of it, and which weights serve a model at the most tokens a second, under what a
request has to keep. Predicted without torch: from rooflines (`work`), or from passes that were measured (`pace`).

A pass takes on each of N cards with tensor parallelism

    t = sum over rows of max(flops / N / (peak c), bytes / N / (bandwidth m)) + 2 all-reduces of T D activations a block

c: the share of its peak that a card's large products reach (`cost.hardware`); m: SHARE of its memory's bandwidth. The
NF4 weights of a pass with more than one row are widened in memory first, as bitsandbytes' kernels do. The
all-reduces (Megatron-LM, arXiv 1909.08053) go over the card's links: 2 (N - 1) / N of the bytes, and LINE_S to start.
Where passes were measured on a machine it is asked about alone: the weights that it had, one device, and no more
sequences than were measured.

A server of B sequences reads a new prompt while the others wait, so that in the time of B requests it does B prefills
of one prompt each and as many decoding steps as a request has tokens: B O / (B prefill + O decode) tokens a second.
Between two tokens of a request there is a decoding step and its share of the prefills: its time per token is
decode + prefill (B - 1) / O. The first token comes after its own prefill, and the step that was under way.
Memory holds the weights, cut over the cards, and the cache of B whole requests; SPARE of it is left to kernels.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from llmsys import schema
from llmsys.bench.serve import work
from llmsys.bench.serve.pace import Pace, measured
from llmsys.cost.hardware import DEVICES, Device

SHARE = 0.8
"""Of a memory's bandwidth that kernels of decoding reach; an assumption, as `notes` of the answer says."""
SPARE = 0.1
LINE_S = 10e-6
GIB = 2**30
TENSOR_PARALLEL = (1, 2, 4, 8)
MOST = 1024
"""Sequences of one server."""
HERE = "here"
"""The card of a machine that was measured."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """`cards` of one kind with tensor parallelism; `quant` of the weights; `batch` sequences at a time. `binds`: what
    allows no more sequences: memory, ttft, tpot, most (`MOST`), or measured: no more were at a time."""

    card: str
    title: str
    cards: int
    quant: str
    batch: int
    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float
    memory_gib: float
    binds: str
    usd_per_million: float | None

    @property
    def techniques(self) -> str:
        parts = (["Q"] if self.quant == "nf4" else []) + ([f"TP{self.cards}"] if self.cards > 1 else [])
        return "+".join(["F", *parts])


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The most tokens a second for a card first; and what was left out, with the reason."""

    ranking: tuple[Choice, ...]
    left_out: tuple[tuple[str, str], ...]


def answer(config: schema.Config, speeds: Path | None = None) -> Answer:
    """`speeds`: the record of a run of `bench_serve_modules`, whose machine is asked about. ValueError where the model
    generates no text, no hardware is known by the name that was given, or the record is of something else."""
    task, model = config.task, _model(config)
    assert isinstance(task, schema.Advise)
    if speeds is not None:
        device, pace = here(config, speeds)
        made = best(config, HERE, device, 1, pace)
        if isinstance(made, Choice):
            return Answer(ranking=(made,), left_out=())
        return Answer(ranking=(), left_out=((f"1 x {device.title}", made),))
    name = config.hardware.name
    most = config.hardware.devices if name != "auto" else max(TENSOR_PARALLEL)
    found, left = list[Choice](), list[tuple[str, str]]()
    for card, device in DEVICES.items() if name == "auto" else [(name, DEVICES[name])]:
        for cards in (each for each in TENSOR_PARALLEL if each <= most):
            for quant in ("none", "nf4"):
                own = dataclasses.replace(model, quant=quant)
                known = own.dtype in device.tflops
                made = best(config, card, device, cards, on_roofline(own, device)) if known else f"no {own.dtype}"
                if isinstance(made, Choice):
                    found.append(made)
                else:
                    left.append((f"{cards} x {card}" + ("" if quant == "none" else f", {quant}"), made))
    found.sort(key=lambda each: -each.tokens_per_s / each.cards)
    return Answer(ranking=tuple(found), left_out=tuple(left))


def here(config: schema.Config, speeds: Path) -> tuple[Device, Pace]:
    """The machine of a run of `bench_serve_modules`, and its passes. ValueError as `pace.of_record`, and where the
    config names another one."""
    name, model = config.hardware.name, _model(config)
    pace, record = measured(speeds, model, config.server)
    if name != "auto":
        raise ValueError(f"hardware.name={name}: task.speeds={speeds} is another machine, the one that was measured; "
                         "take hardware=auto with it, or leave task.speeds out")  # fmt: skip
    gib = config.hardware.mem_gib or record.summary.get("mem_gib")
    if gib is None:
        raise ValueError(f"task.speeds={speeds}: does not say how much memory there is; hardware.mem_gib=24 does")
    peak = {model.dtype: pace.flops_per_s / 1e12}
    title, gb_per_s = str(record.env["device_name"]), pace.bytes_per_s / 1e9
    return Device(title=title, mem_gib=gib, gb_per_s=gb_per_s, tflops=peak, pcie_gbps=0.0, source="measured"), pace


def _model(config: schema.Config) -> schema.Transformer:
    model = config.model
    if not isinstance(model, schema.Transformer):
        raise ValueError(f"model={model.name}: generates no text; e.g. model=llama2_7b")
    work.by_row(model, 1, 1)
    return model


def on_roofline(model: schema.Transformer, device: Device) -> Pace:
    """By what large products and decoding reach of the device's peaks."""
    flops = device.peak(model.dtype) * device.reached(model.dtype)
    return Pace(model=model, flops_per_s=flops, bytes_per_s=device.gb_per_s * 1e9 * SHARE)


def best(config: schema.Config, card: str, device: Device, cards: int, pace: Pace) -> Choice | str:
    """With as many sequences as memory and the limits allow; why not, where that is none."""
    task, model = config.task, pace.model
    assert isinstance(task, schema.Advise)
    if model.num_kv_heads % cards:
        return f"{model.num_kv_heads} heads of keys are not cut over {cards} cards"
    own = Timed(pace, device, cards, task.prompt_tokens, task.output_tokens)
    room = device.mem_gib * GIB * (1 - SPARE)
    binds, batch, most = "memory", 0, pace.sequences or MOST
    for wanted in _sizes(most):
        if own.memory_bytes(wanted) > room:
            break
        if task.slo_ttft_ms and own.ttft_s(wanted) * 1e3 > task.slo_ttft_ms:
            binds = "ttft"
            break
        if task.slo_tpot_ms and own.tpot_s(wanted) * 1e3 > task.slo_tpot_ms:
            binds = "tpot"
            break
        batch, binds = wanted, binds if wanted < most else "measured" if pace.sequences else "most"
    if not batch:
        needs = own.memory_bytes(1) / GIB
        why = {"ttft": f"a first token alone takes {own.ttft_s(1) * 1e3:.0f} ms",
               "tpot": f"a token alone takes {own.tpot_s(1) * 1e3:.1f} ms"}  # fmt: skip
        return why.get(binds, f"one request needs {needs:.1f} GiB of a card that has {device.mem_gib:g}")
    speed = own.tokens_per_s(batch)
    hour = None if device.usd_per_hour is None else device.usd_per_hour * cards
    return Choice(
        card=card,
        title=device.title,
        cards=cards,
        quant=model.quant,
        batch=batch,
        ttft_ms=own.ttft_s(batch) * 1e3,
        tpot_ms=own.tpot_s(batch) * 1e3,
        tokens_per_s=speed,
        memory_gib=own.memory_bytes(batch) / GIB,
        binds=binds,
        usd_per_million=None if hour is None else hour / speed / 3600 * 1e6,
    )


def _sizes(most: int) -> list[int]:
    """Numbers of sequences that are tried: all small ones, then by steps of an eighth."""
    found = [1]
    while found[-1] < most:
        found.append(min(most, found[-1] + max(1, found[-1] // 8)))
    return found


class Timed:
    """Seconds and bytes, of one card among `cards`, by the `pace` of one alone."""

    def __init__(self, pace: Pace, device: Device, cards: int, prompt: int, new: int) -> None:
        self.pace, self.model, self.device, self.cards, self.prompt, self.new = (
            pace, pace.model, device, cards, prompt, new)  # fmt: skip

    def prefill_s(self) -> float:
        return self._cut(self.pace.prefill_s(1, self.prompt), self.prompt)

    def decode_s(self, batch: int) -> float:
        """A step, when requests are half done on average."""
        return self._cut(self.pace.decode_s(batch, self.prompt + self.new // 2), batch)

    def _cut(self, alone_s: float, tokens: int) -> float:
        """Over the cards, a pass of so many new tokens that takes one card `alone_s`."""
        if tokens > 1 and not self.pace.fits:
            alone_s += work.widened_bytes(self.model) / self.pace.bytes_per_s
        if self.cards == 1:
            return alone_s
        nbytes = tokens * self.model.hidden_size * work.BYTES[self.model.dtype]
        share = 2 * (self.cards - 1) / self.cards
        line = LINE_S + share * nbytes / (self.device.gbps(self.cards) * 1e9)
        return alone_s / self.cards + 2 * self.model.num_layers * line

    def ttft_s(self, batch: int) -> float:
        return self.prefill_s() + (self.decode_s(batch) if batch > 1 else 0.0)

    def tpot_s(self, batch: int) -> float:
        return self.decode_s(batch) + self.prefill_s() * (batch - 1) / self.new

    def tokens_per_s(self, batch: int) -> float:
        return batch * self.new / (batch * self.prefill_s() + self.new * self.decode_s(batch))

    def memory_bytes(self, batch: int) -> float:
        """Of one card: its share of the weights and of the cache of whole requests."""
        cache = work.cache_bytes(self.model, batch * (self.prompt + self.new))
        return (work.weight_bytes(self.model) + cache) / self.cards


def vllm(choice: Choice, config: schema.Config) -> str:
    """The command that means this choice; its first words say where the weights are to be put."""
    task, model = config.task, config.model
    assert isinstance(task, schema.Advise)
    assert isinstance(model, schema.Transformer)
    words = ["vllm", "serve", '"${MODEL:?the folder or hub id of the weights}"']
    words += ["--dtype", work.DTYPES[model.dtype]]
    words += ["--max-num-seqs", str(choice.batch), "--max-model-len", str(task.prompt_tokens + task.output_tokens)]
    words += ["--tensor-parallel-size", str(choice.cards)] if choice.cards > 1 else []
    words += ["--quantization", "bitsandbytes"] if choice.quant == "nf4" else []
    words += ["--gpu-memory-utilization", f"{1 - SPARE:g}"]
    return "#!/usr/bin/env bash\nset -euo pipefail\n" + " ".join(words) + ' "$@"\n'
