"""What the links of `network=` really carry: nominal against reached rate, and a fit of latency and bandwidth.

    python benchmarks/links.py [--world 2] [--repeats 7] [--out benchmarks/records] [eth100m 20/100 ...]

A link is named as in `conf/network`, or is UP/DOWN in Mbit/s; without any, all of `conf/network` are measured. Ranks
are processes on shaped links (`llmsys.comm.link`) and talk by gloo, as in a run. Two patterns, over a range of sizes:

    pair         rank 0 sends n bytes to rank 1 and gets them back; half of the time is one way
    all_reduce   n bytes are summed over all p ranks; each sends and receives 2 (p - 1) / p of them

The model t(n) = alpha + beta n is fitted to the medians: alpha is the time of messages up to 1 kB, beta what the three
largest take a byte beyond it. `reached` is the rate of the largest message, alpha included, `fitted` 1 / beta; headers
take 4 % of either. `worst error` is the model's over all messages of four token buckets or more: the shaper lets one
bucket (a few kB) through at once after a pause, so smaller messages are early.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llmsys.comm import link

PATTERNS = ("pair", "all_reduce")
SMALLEST, LARGEST_S = 64, 0.25
"""Bytes of the smallest message; how long the largest takes at the nominal rate."""


def sizes(mbit: float) -> list[int]:
    """Bytes of the messages, each four times the one before."""
    largest = mbit * 1e6 / 8 * LARGEST_S
    return [SMALLEST * 4**i for i in range(int(math.log(largest / SMALLEST, 4)) + 1)]


def fit(numbers: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(alpha in s, beta in s a byte) of messages of growing sizes."""
    alpha = statistics.median(t for n, t in zip(numbers, seconds, strict=True) if n <= 1024)
    return alpha, statistics.median((t - alpha) / n for n, t in zip(numbers[-3:], seconds[-3:], strict=True))


def rank_main() -> None:
    """One rank, which is told what to do on its standard input and answers on its standard output."""
    start = json.loads(sys.stdin.readline())
    link.isolate(start["switch"])  # before torch, which starts threads
    say(True)
    told = json.loads(sys.stdin.readline())

    import torch

    from llmsys.comm.group import group
    from llmsys.comm.place import Place, listen

    rank, world, address = start["rank"], start["world"], told["address"]
    listener = None
    if rank == 0:
        listener, port = listen(address)
        say(port)
    else:
        port = told["port"]
    torch.set_num_threads(1)
    place = Place(
        rank=rank,
        world=world,
        address=address,
        interface=told["interface"],
        store=(told["store"], port),
        listener=listener,
    )
    with group(place, torch.device("cpu")):
        say({pattern: measure(pattern, rank, told["sizes"], told["repeats"]) for pattern in PATTERNS})


def measure(pattern: str, rank: int, numbers: list[int], repeats: int) -> list[list[float]]:
    """Seconds of each repeat, for each size; one more, which is left out, opens the connections."""
    import torch
    import torch.distributed as dist

    def pair(buffer: torch.Tensor) -> None:
        for source in (0, 1):
            if rank == source:
                dist.send(buffer, 1 - source)
            elif rank == 1 - source:
                dist.recv(buffer, source)

    act: Callable[[torch.Tensor], Any] = pair if pattern == "pair" else dist.all_reduce
    found = []
    for n in numbers:
        buffer = torch.zeros(n // 4)
        times = []
        for _ in range(repeats + 1):
            dist.barrier()
            before = time.perf_counter()
            act(buffer)
            times.append((time.perf_counter() - before) / (2 if pattern == "pair" else 1))
        found.append(times[1:])
    return found


def say(message: Any) -> None:
    print(json.dumps(message), flush=True)


class Rank:
    """The parent's end of a rank. A context manager: the process ends with it."""

    def __init__(self, **start: int) -> None:
        command = [sys.executable, __file__, "--rank"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.tell(**start)

    def tell(self, **message: Any) -> None:
        assert self.process.stdin is not None
        print(json.dumps(message), file=self.process.stdin, flush=True)

    def hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a rank ended without a word; its error is above")
        return json.loads(line)

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.kill()
        self.process.wait()


def run(network: Any, world: int, repeats: int) -> dict[str, Any]:
    """Pattern -> seconds by size and repeat, of rank 0; beside it `sizes`."""
    numbers = sizes(min(network.up_mbit, network.down_mbit))
    with ExitStack() as stack:
        switch = stack.enter_context(link.Switch())
        ranks = [stack.enter_context(Rank(rank=r, world=world, switch=switch.pid)) for r in range(world)]
        assert all(rank.hear() for rank in ranks)
        links = switch.connect([rank.process.pid for rank in ranks], network)
        told = {"store": links[0].address, "sizes": numbers, "repeats": repeats, "interface": links[0].interface}
        ranks[0].tell(address=links[0].address, **told)
        port = ranks[0].hear()
        for rank, its in zip(ranks[1:], links[1:], strict=True):
            rank.tell(address=its.address, port=port, **told)
        heard = [rank.hear() for rank in ranks]  # of all: none is stopped before the others are done
        return {**heard[0], "sizes": numbers}


def summary(measured: dict[str, Any], network: Any, world: int) -> dict[str, float]:
    """Nominal, reached and fitted rates in Mbit/s, alpha in ms, by pattern."""
    nominal = min(network.up_mbit, network.down_mbit)
    found: dict[str, float] = {"nominal_mbit": nominal}
    for pattern in PATTERNS:
        share = 1.0 if pattern == "pair" else 2 * (world - 1) / world
        carried = [share * n for n in measured["sizes"]]
        medians = [statistics.median(times) for times in measured[pattern]]
        alpha, beta = fit(carried, medians)
        found[f"{pattern}_reached_mbit"] = carried[-1] * 8e-6 / medians[-1]
        found[f"{pattern}_fitted_mbit"] = 8e-6 / beta
        found[f"{pattern}_alpha_ms"] = alpha * 1e3
        large = [(n, t) for n, t in zip(carried, medians, strict=True) if n >= 4 * link.burst_bytes(nominal)]
        found[f"{pattern}_worst_error_percent"] = 100 * max(abs(alpha + beta * n - t) / t for n, t in large)
    return {key: round(value, 4) for key, value in found.items()}


def the_network(word: str) -> Any:
    """`schema.Network` of a name in `conf/network`, or of UP/DOWN. ValueError where it is neither, or has no rate."""
    from llmsys import compose, schema

    try:
        up, down = (float(part) for part in word.split("/"))
    except ValueError:
        if word not in compose.choices("network"):
            raise ValueError(f"{word}: neither UP/DOWN in Mbit/s nor one of {names()}") from None
        network = schema.Network(**compose.compose([f"network={word}"])["network"])
        if network.up_mbit is None:
            raise ValueError(f"{word}: has no rate: give one of {names()}, or UP/DOWN in Mbit/s") from None
        return network
    return schema.Network(name=word.replace("/", "_"), up_mbit=up, down_mbit=down)


def names() -> str:
    """The named networks."""
    from llmsys import compose

    return ", ".join(name for name in compose.choices("network") if name != "none")


def main(words: Sequence[str]) -> list[Any]:
    """Measures each link, writes a record of each, prints the table, and returns the records."""
    import side_by_side
    from llmsys.job import Record, code_hash
    from llmsys.profile import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=side_by_side.RECORDS)
    parser.add_argument("links", nargs="*")
    asked = parser.parse_args(words)
    records = []
    for network in [the_network(word) for word in asked.links or names().split(", ")]:
        start, started = time.perf_counter(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        measured = run(network, asked.world, asked.repeats)
        samples = {
            f"{pattern}_{n}_ms": [round(t * 1e3, 4) for t in times]
            for pattern in PATTERNS
            for n, times in zip(measured["sizes"], measured[pattern], strict=True)
        }
        record = Record(
            name="links",
            run_id=f"{network.name}-{asked.world}",
            task="benchmark",
            status="ok",
            config={"network": vars(network)},
            env=environment.describe("cpu", 1),
            code_hash=code_hash(),
            started=started,
            seconds=round(time.perf_counter() - start, 3),
            world=asked.world,
            summary=summary(measured, network, asked.world),
            samples=samples,
        )
        record.leave(asked.out)
        records.append(record)
    print(side_by_side.show_links(records))
    return records


if __name__ == "__main__":
    if sys.argv[1:] == ["--rank"]:
        rank_main()
    else:
        main(sys.argv[1:])
