"""`python -m llmsys.decentral provider`: offers this machine to a broker."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from llmsys.decentral import joining
from llmsys.decentral.door import Door
from llmsys.decentral.fleet import Provider as Machine
from llmsys.decentral.limits import Limits, needed_by
from llmsys.decentral.link import Line
from llmsys.decentral.pieces import Slow
from llmsys.decentral.planes import PLANES, plane_of
from llmsys.decentral.presence import Presence
from llmsys.decentral.provider import Provider
from llmsys.decentral.quota import Quota, Watch


def add(parser: argparse.ArgumentParser) -> None:
    """Its words."""
    joining.add(parser)
    parser.add_argument("--name", default=f"provider-{uuid.uuid4().hex[:8]}", help="default: a new one each time")
    parser.add_argument("--plane", choices=sorted(PLANES), default="torch", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="of torch's planes, e.g. cuda:0; default: %(default)s")
    parser.add_argument(
        "--tflops", type=float, required=True, help="peak; measure what is reached with decentral_profile"
    )
    parser.add_argument("--efficiency", type=float, default=0.5, help="share of the peak; default: %(default)s")
    parser.add_argument("--mem-gib", type=float, required=True, help="that the job may use")
    parser.add_argument("--up-mbit", type=float, default=100.0, help="default: %(default)s")
    parser.add_argument("--down-mbit", type=float, default=100.0, help="default: %(default)s")
    parser.add_argument("--capped", action="store_true", help="never use more of the line than that")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="to add to it, for tests; default: %(default)s")
    parser.add_argument("--limit-gib", type=float, default=0.0, help="of resident memory; more, and it leaves; 0: none")
    parser.add_argument("--pause-while", metavar="COMMAND", default="", help="pauses as long as this succeeds")
    parser.add_argument("--yield-gpu", action="store_true", help="pauses while others compute on a GPU (nvidia-smi)")
    parser.add_argument("--region", default="")
    parser.add_argument(
        "--direct",
        metavar="HOST:PORT",
        default="",
        help="listen there for other providers, and talk to those that listen past the broker, where that is not "
        "slower; port 0: any that is free; default: no port is opened",
    )
    parser.add_argument(
        "--direct-as", metavar="HOST:PORT", default="", help="by which others dial that, behind a port forward, say"
    )
    parser.add_argument("--untrusted", action="store_true", help="it is shown nothing that the job keeps private")
    parser.add_argument("--stdin", action="store_true", help="it ends when its standard input does")
    parser.add_argument(
        "--patience",
        metavar="S",
        type=float,
        default=30.0,
        help="to dial again a broker that has gone; default: %(default)s",
    )
    parser.add_argument("--stay", action="store_true", help="dial again when a job ends, and without end")
    quotas = parser.add_argument_group("quotas", "It hands over and ends when one is used up.")
    quotas.add_argument("--quota-gib", metavar="GIB", type=float, default=math.inf, help="over its line, both ways")
    quotas.add_argument("--quota-hours", metavar="H", type=float, default=math.inf, help="with a broker")
    quotas.add_argument("--quota-tflop", metavar="TFLOP", type=float, default=math.inf, help="10**12, by its own count")
    quotas.add_argument("--quota-file", metavar="FILE", type=Path, help="what was used counts on from life to life")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """The exit code, once it is let go. ValueError for settings that cannot be; what `Presence.run` raises."""
    if not given.name.isascii() or not 0 < len(given.name) <= 64:
        raise ValueError(f"--name {given.name[:64]}: must be text of 64 characters at most, all in ASCII")
    if not given.patience >= 0:
        raise ValueError(f"--patience {given.patience}: must be 0 or more")
    machine = Machine(
        name=given.name,
        tflops=given.tflops,
        efficiency=given.efficiency,
        mem_gib=given.mem_gib,
        up_mbit=given.up_mbit,
        down_mbit=given.down_mbit,
        region=given.region,
        plane=given.plane,
        trusted=not given.untrusted,
    )
    needed = needed_by(given.pause_while, gpu=given.yield_gpu)
    quota = Quota(gib=given.quota_gib, hours=given.quota_hours, tflop=given.quota_tflop)
    watch = Watch(quota, given.quota_file)
    if given.stdin:
        threading.Thread(target=_end_with_stdin, name="stdin", daemon=True).start()
    token, own = joining.credentials(given)
    if given.direct_as and not given.direct:
        raise ValueError(f"--direct-as {given.direct_as}: of what listens at --direct HOST:PORT, which is not given")
    door = Door.at(given.direct, given.direct_as) if given.direct else None
    plane = plane_of(given.plane, given.device)
    plane.warm()
    slow = Slow(up_mbit=given.up_mbit, down_mbit=given.down_mbit, delay_ms=given.delay_ms) if given.capped else None

    def dial(life: str, busy: Callable[[], bool]) -> Line:
        limits.start()
        return Line(given.join, token, machine, life, own, slow, busy, watch.meter, door)

    def again(text: str) -> None:
        print(f"llmsys.decentral: {text}; it dials again", file=sys.stderr, flush=True)

    presence = Presence(dial, given.patience, staying=given.stay, why=again)

    def why(text: str) -> None:
        print(f"{machine.name} {text}", file=sys.stderr, flush=True)

    limits = Limits(given.limit_gib, needed, why, presence.leave, presence.pause, presence.resume)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, presence.interrupt)
    if hasattr(signal, "SIGUSR1"):  # Windows has none
        signal.signal(signal.SIGUSR1, presence.pause)
        signal.signal(signal.SIGUSR2, presence.resume)

    def used_up(what: str) -> None:
        print(f"llmsys.decentral: the quota is used up: {what}; it goes", file=sys.stderr, flush=True)
        presence.leave()

    watch.begin(used_up)
    try:
        presence.run(lambda: Provider(machine.name, plane))
    finally:
        watch.write()
    return 0


def _end_with_stdin() -> None:
    while os.read(0, 4096):  # not by sys.stdin, whose lock an interpreter that ends would wait for
        pass
    os._exit(1)
