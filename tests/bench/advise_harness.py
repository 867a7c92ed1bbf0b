"""A prediction by rules of three, for tests of what is built on predictions: memory is the cost model's own, time is
arithmetic, gradients and offload at the rates of the machine that is named, one after another."""

from __future__ import annotations

from dataclasses import dataclass

from llmsys import schema
from llmsys.cost import flops, hardware, links, memory, traffic
from llmsys.cost.case import facts


@dataclass(frozen=True, kw_only=True)
class Made:
    """As `llmsys.bench.predict.prediction.Prediction`, as far as advice reads it."""

    peak_bytes: int
    host_bytes: int
    capacity_bytes: float
    host_capacity_bytes: float | None
    step_ms: float
    by_phase_ms: dict[str, float]
    tokens_per_s: float
    usd_per_million_tokens: float | None
    note: str = ""

    @property
    def fits(self) -> bool:
        host = self.host_capacity_bytes is None or self.host_bytes <= self.host_capacity_bytes
        return self.peak_bytes <= self.capacity_bytes and host

    @property
    def binds(self) -> str:
        if not self.fits:
            return "memory"
        most = max(self.by_phase_ms, key=lambda name: self.by_phase_ms[name])
        return {"comm": "network", "offload": "host"}.get(most, "compute")


def predict(config: schema.Config) -> Made:
    parts, known = (config.model, config.train, config.method, config.engine), facts(config, "cuda")
    card = hardware.described(config.hardware)
    assert card is not None
    phases = memory.by_phase(*parts, **known)
    host = config.train.world * max(phase.host_bytes for phase in phases)
    line = links.Line.of_rate(card.gbps(max(2, config.train.world)), 2e-5)
    ms = {
        "compute": flops.step_flops(*parts, **known) / card.peak(config.train.precision) / card.sustained * 1e3,
        "comm": traffic.step_seconds(line, *parts, **known) * 1e3,
        "offload": host / config.train.world / (card.pcie_gbps * 1e9) * 1e3,
        "launches": 0.5,
    }
    step_ms = sum(ms.values())
    tokens = config.train.global_batch * config.train.length
    price = card.usd_per_hour
    return Made(
        peak_bytes=max(phase.device_bytes for phase in phases),
        host_bytes=host,
        capacity_bytes=card.mem_gib * 2**30,
        host_capacity_bytes=None if config.hardware.host_gib is None else config.hardware.host_gib * 2**30,
        step_ms=step_ms,
        by_phase_ms=ms,
        tokens_per_s=tokens / step_ms * 1e3,
        usd_per_million_tokens=None if price is None else price * config.train.world * step_ms / 3.6 / tokens,
    )
