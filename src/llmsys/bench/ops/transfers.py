"""Copies between host and device, and collectives between ranks, over sizes.

A collective over a tensor of S bytes (what is reduced, the gathered result, what is scattered) that takes t has

    algbw = S / t        busbw = algbw x factor        2 (n-1)/n of an all-reduce, (n-1)/n of the others, on n ranks

as NCCL's tests define them (`cost.links.bus_factor`): busbw is what crosses each rank's link, whatever the number of
ranks, and is compared with the link's own rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmsys.bench.ops.clock import Clock, Timed, copies
from llmsys.comm import collectives
from llmsys.cost import links
from llmsys.schema.modules import COLLECTIVES

WIDTH = 4
"""Bytes of an element: fp32."""


def memcpy(sizes: Sequence[int], clock: Clock, pcie: float | None, memory: float | None) -> Iterator[Timed]:
    """`memcpy/<direction>/<bytes>`: h2d and d2h, `pinned` and `pageable`, and d2d; without a device `host`, from memory
    to memory. Rates count each byte once, though d2d and host read and write it. `pcie` and `memory`: peaks in bytes/s.
    """
    for nbytes in sizes:
        for direction, make, peak in _directions(clock.device, nbytes, pcie, memory):
            acts = [make() for _ in range(copies(2 * nbytes))]
            key = f"memcpy/{direction}/{nbytes}"
            yield Timed(key=key, seconds=clock.samples(acts), nbytes=nbytes, peak=peak)


def _directions(
    device: torch.device, nbytes: int, pcie: float | None, memory: float | None
) -> Iterator[tuple[str, Callable[[], Callable[[], object]], float | None]]:
    def make(target: dict[str, Any], source: dict[str, Any]) -> Callable[[], object]:
        to = torch.empty(nbytes, dtype=torch.uint8, **target)
        given = torch.randint(256, (nbytes,), dtype=torch.uint8, device=source.get("device", "cpu"))
        given = given.pin_memory() if source.get("pin_memory") else given
        return partial(to.copy_, given, non_blocking=True)

    half = memory / 2 if memory else None
    here: dict[str, Any] = {"device": device}
    if device.type != "cuda":
        yield "host", partial(make, here, here), half
        return
    for name, host in (("pinned", {"pin_memory": True}), ("pageable", {})):
        yield f"h2d_{name}", partial(make, here, host), pcie
        yield f"d2h_{name}", partial(make, host, here), pcie
    yield "d2d", partial(make, here, here), half


@dataclass(frozen=True, kw_only=True)
class Exchanged(Timed):
    """A collective of `world` ranks."""

    kind: str
    world: int

    def summary(self) -> dict[str, float]:
        """`<kind>/<bytes>/ms`, `/spread_percent`, `/algbw_gb_per_s`, `/busbw_gb_per_s`, and its `/peak_percent`."""
        found = super().summary()
        algbw = found.pop(f"{self.key}/gb_per_s")
        busbw = algbw * links.bus_factor(self.kind, self.world)
        found |= {f"{self.key}/algbw_gb_per_s": algbw, f"{self.key}/busbw_gb_per_s": busbw}
        if self.peak:
            found[f"{self.key}/peak_percent"] = 100 * busbw * 1e9 / self.peak
        return found


def exchange(sizes: Sequence[int], clock: Clock, link: float | None) -> Iterator[Exchanged]:
    """Every collective over every size, on all ranks of the group. `link`: peak of a rank's link in bytes/s."""
    world = collectives.world()
    for kind in COLLECTIVES:
        for nbytes in sizes:
            numel = max(world, nbytes // WIDTH // world * world)
            act = _collective(kind, numel, world, clock.device)
            if dist.is_initialized():
                dist.barrier()
            yield Exchanged(
                key=f"{kind}/{numel * WIDTH}",
                seconds=clock.samples([act]),
                nbytes=numel * WIDTH,
                peak=link,
                kind=kind,
                world=world,
            )


def _collective(kind: str, numel: int, world: int, device: torch.device) -> Callable[[], object]:
    """Over `numel` elements in all."""
    whole: Tensor = torch.zeros(numel, device=device)  # so that repeated sums stay finite
    if kind == "all_reduce":
        return partial(collectives.all_reduce, whole)
    part = torch.zeros(numel // world, device=device)
    if kind == "all_gather":
        return partial(collectives.all_gather, part)
    assert kind == "reduce_scatter", kind
    return partial(collectives.reduce_scatter, whole, part)
