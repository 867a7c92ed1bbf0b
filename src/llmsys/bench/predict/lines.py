"""What joins the ranks of a prediction on a listed machine: one line, that of the slowest link of a ring through them.

Within a machine that is NVLink where it joins all of them, else PCIe: from card to card, or of GeForce cards through
the host's memory. A network joins machines, so it counts where there are more ranks than devices in one. The ring
leaves each machine over one rank's link, and goes at that link's speed where that is the slowest; scattering within a
machine first (`cost.links.Machines`) is not what the engines here do.

**Through the host's memory** all cards' traffic shares what the host can carry (NCCL's authors of such machines: "the
bandwidth your CPU and memory can deliver", for eight cards "8 flows in both directions", its issue 1639). So a flow
goes as fast as between two cards alone, or at its share of what eight flows have together, whichever is less. Bridges
join cards in pairs: in a ring over pairs every second hop is over a bridge and leaves the host alone, and of 8 ranks'
flows 4 remain. (Where it is the link between two CPUs that limits, which the ring crosses once each way with bridges
or without, they gain nothing; the paper's RTX 3090s gained 10 % of scaling efficiency.) Of cards that read each other's
memory over PCIe a hop is limited by the card's slot, which bridges leave as it is.
"""

from __future__ import annotations

from llmsys import schema
from llmsys.cost.hardware import Device
from llmsys.cost.links import Line

LINK = {"nvlink": 0.8, "pcie": 0.635, "host": 0.41, "given": 1.0}
"""Shares of a link's rate that collectives reach. NVLink: 20.0 of 25 GB/s, as NCCL's model of a machine has it (its
src/graph/topo.h; A100s reach 230 of 300: nccl-tests issue 149). PCIe: 12.0 of 15.75 GB/s of third generation in the
same model, less by its 1.2 between cards behind one CPU (8 A100 reach 21 of 31.5: nccl issue 841). Two cards through
the host: 12.9 of 31.5 GB/s each way (RTX 4090s: tinygrad/open-gpu-kernel-modules, issue 6). Rates that are given are
taken as they are."""
EIGHT, EIGHT_SHARE = 8, 0.32
"""Flows, and the share of PCIe's rate that each then has: 10.0 of 31.5 GB/s. It is what NCCL's model gives the link
between two Xeons of the paper's time (`SKL_QPI_BW`), taken for all that such a host carries."""
LATENCY_S = {"nvlink": 3.4e-6, "pcie": 5.7e-6, "host": 5.7e-6, "given": 5.7e-6, "network": 14e-6}
"""Of a message: NCCL's model, rings in its protocol for large ones (src/graph/tuning.cc, `hwLat`)."""
WORDS = {"nvlink": "NVLink", "pcie": "PCIe", "host": "PCIe, through the host's memory", "given": "as given"}


def between(config: schema.Config, devices: int) -> Line | None:
    """The network's line where ranks are in several machines of `devices` each, else None. ValueError where nothing
    says what joins them."""
    world = config.train.world
    if world <= devices:
        return None
    if config.network.up_mbit is None:
        raise ValueError(
            f"train.world={world}: hardware.devices={devices}; type hardware.devices={world} for one machine, or for "
            "several what joins them, e.g. network=eth10g"
        )
    return Line.of_network(config.network, LATENCY_S["network"])


def listed(config: schema.Config, device: Device) -> tuple[Line, list[str]]:
    """(the line, how it was come by) between the ranks of `config`. ValueError as of `between`."""
    world, name = config.train.world, config.network.name
    outer = between(config, config.hardware.devices)
    if outer is not None:
        return outer, [f"links: {name} between machines, by which the whole ring goes"]
    notes = [f"network={name}: not used, for all ranks are in one machine"] if config.network.up_mbit else []
    rate, kind, why = device.gbps(world), "nvlink", ""
    bridged = world // 2 if device.nvlink_ranks == 2 else 0
    if config.hardware.gbps is not None:
        kind = "given"
    elif world > device.nvlink_ranks:
        kind = "pcie" if device.p2p else "host"
        why = f"; bridges take {bridged} of the ring's {world} hops" if bridged else ""
    share = min(LINK[kind], EIGHT_SHARE * EIGHT / (world - bridged)) if kind == "host" else LINK[kind]
    if world > 1:
        notes.insert(0, f"links: {WORDS[kind]}, {rate:g} GB/s each way, of which {100 * share:.0f} %{why}")
    return Line.of_rate(rate * share, LATENCY_S[kind]), notes
