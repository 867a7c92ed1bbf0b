"""`python -m llmsys.decentral COMMAND`: jobs over machines that people offer."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmsys.decentral import credentials, ledger, probe_command, view
from llmsys.decentral.door import Door
from llmsys.decentral.fleet import Provider as Machine
from llmsys.decentral.limits import Limits, needed_by
from llmsys.decentral.link import Credentials, Line, Refused, asked
from llmsys.decentral.pieces import Slow
from llmsys.decentral.planes import PLANES, plane_of
from llmsys.decentral.presence import Presence
from llmsys.decentral.provider import Provider
from llmsys.decentral.quota import Quota, Watch
from llmsys.errors import MissingPackage


def main(words: Sequence[str] | None = None) -> int:
    """0 once it is let go; 1 where it is not let in, or the broker has gone."""
    parser = argparse.ArgumentParser(prog="python -m llmsys.decentral", description="One model over many machines.")
    commands = parser.add_subparsers(dest="command", required=True)
    _broker(commands.add_parser("broker", help="runs an experiment, or a folder of them, whose providers dial in"))
    _submit(commands.add_parser("submit", help="puts an experiment into a broker's folder"))
    _provider(commands.add_parser("provider", help="offers this machine to a broker"))
    _status(commands.add_parser("status", help="what a broker's job is at, and who does what"))
    probe_command.add(commands.add_parser("probe", help="measures who dials in, and which models they are good for"))
    _ledger(commands.add_parser("ledger", help="what each provider has done over many jobs"))
    _certificate(commands.add_parser("certificate", help="makes what a broker beyond loopback needs"))
    given = parser.parse_args(words)
    try:
        return int(given.run(given))
    except KeyboardInterrupt:
        return 130
    except (Refused, ConnectionError, ValueError, OSError, MissingPackage) as error:
        said = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            said = f"{error.filename}: {error.strerror}"
        print(f"llmsys.decentral: {said}", file=sys.stderr)
        return 1


# --- broker ----------------------------------------------------------------------------------------------------------


def _broker(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--listen", metavar="HOST:PORT", default="127.0.0.1:7077", help="default: %(default)s")
    parser.add_argument("--credentials", metavar="FOLDER", type=Path, required=True, help="see `certificate`")
    parser.add_argument("--queue", metavar="FOLDER", type=Path, help="one job after another; see `submit`")
    parser.add_argument("--until-empty", action="store_true", help="ends when no job waits; else it waits for more")
    parser.add_argument("overrides", nargs="*", help="of the experiment: +exp=decentral_train task.providers=3 ...")
    parser.set_defaults(run=_serve)


def _serve(given: argparse.Namespace) -> int:
    if bool(given.overrides) == bool(given.queue):
        raise ValueError("broker: takes an experiment, +exp=decentral_train ..., or --queue FOLDER")
    credentials.address("--listen", given.listen)
    folder: Path = given.credentials.resolve()
    credentials.there(folder)
    own = {"token_file": folder / credentials.TOKEN}
    if (folder / credentials.CERTIFICATE).exists():
        own |= {"certificate": folder / credentials.CERTIFICATE, "key": folder / credentials.KEY}
    if (folder / credentials.TRUSTED).exists():
        own |= {"trusted_token_file": folder / credentials.TRUSTED}
    for path in own.values():
        path.read_bytes()  # what is missing is said before anything is composed
    set_ = [f"task.{key}={path}" for key, path in own.items()]
    if given.queue:
        from llmsys.decentral.job_queue import Queue

        signal.signal(signal.SIGTERM, _interrupt)
        Queue(given.queue, given.listen, set_, until_empty=given.until_empty).run()
        return 0
    from llmsys.main import main as run

    sys.argv = ["llmsys", *given.overrides, "task.start=none", f"task.listen={given.listen}", "task.faults=[]", *set_]
    run()
    return 0


def _interrupt(*signal: Any) -> None:
    raise KeyboardInterrupt


def _submit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of a `broker --queue`, be it there yet or not")
    parser.add_argument("--name", default="", help="jobs are run in the order of their names; default: as they came")
    parser.add_argument("overrides", nargs="+", help="of the experiment: +exp=decentral_train task.providers=3 ...")
    parser.set_defaults(run=_put)


def _put(given: argparse.Namespace) -> int:
    from llmsys.decentral.job_queue import submit

    print(submit(given.folder, given.overrides, given.name))
    return 0


# --- provider --------------------------------------------------------------------------------------------------------


def _joining(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--join", metavar="HOST:PORT", required=True, help="where the broker listens")
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        type=Path,
        required=True,
        help="with a token of the broker's: token, or trusted-token",
    )
    parser.add_argument("--certificate", metavar="FILE", type=Path, help="the broker's; without one only on loopback")


def _provider(parser: argparse.ArgumentParser) -> None:
    _joining(parser)
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
    parser.set_defaults(run=_provide)


def _provide(given: argparse.Namespace) -> int:
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
    token, own = _credentials(given)
    if given.direct_as and not given.direct:
        raise ValueError(f"--direct-as={given.direct_as}: of what listens at --direct HOST:PORT, which is not given")
    door = Door.at(given.direct, given.direct_as) if given.direct else None
    plane = plane_of(given.plane, given.device)
    plane.warm()
    slow = Slow(up_mbit=given.up_mbit, down_mbit=given.down_mbit, delay_ms=given.delay_ms) if given.capped else None

    def dial(life: str, busy: Callable[[], bool]) -> Line:
        limits.start()
        return Line(given.join, token, machine, life, own, slow, busy, watch.meter, door)

    presence = Presence(dial, given.patience, staying=given.stay)

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


def _credentials(given: argparse.Namespace) -> tuple[str, Credentials | None]:
    credentials.address("--join", given.join)
    token = given.token_file.read_text(encoding="utf-8").strip()
    if given.certificate is None:
        return token, None
    certificate = given.certificate.read_bytes()
    if b"-----BEGIN CERTIFICATE-----" not in certificate:
        raise ValueError(f"--certificate {given.certificate}: is none; it is the broker's {credentials.CERTIFICATE}")
    return token, Credentials(certificate=certificate)


# --- status ----------------------------------------------------------------------------------------------------------


def _status(parser: argparse.ArgumentParser) -> None:
    _joining(parser)
    parser.add_argument("--json", action="store_true", help="one object, and nothing else")
    parser.add_argument(
        "--watch", action="store_true", help="again each second, until the broker ends; over all jobs of a queue"
    )
    parser.set_defaults(run=_show)


def _show(given: argparse.Namespace) -> int:
    token, own = _credentials(given)

    def now() -> Mapping[str, Any]:
        return asyncio.run(asked(given.join, token, own))

    every = view.watched(now) if given.watch else iter([now()])
    if given.json:
        for status in every:
            if status is not None:
                print(json.dumps(status), flush=True)
        return 0
    from rich.console import Console
    from rich.live import Live

    if not given.watch:
        Console().print(view.table(next(every)))
        return 0
    with Live(view.table(next(every)), refresh_per_second=4) as live:
        for status in every:
            live.update(view.table(status))
    return 0


# --- ledger ----------------------------------------------------------------------------------------------------------


def _ledger(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", metavar="FOLDER", type=Path, nargs="+", help="with results, of any depth")
    parser.add_argument("--json", action="store_true", help="one object, and nothing else")
    parser.set_defaults(run=_sum)


def _sum(given: argparse.Namespace) -> int:
    found = ledger.ledger(given.folders)
    if given.json:
        print(json.dumps(found))
    else:
        from llmsys.results import print_lines

        print_lines(*ledger.lines(found))
    return 0


# --- certificate -----------------------------------------------------------------------------------------------------


def _certificate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="for certificate.pem, key.pem, token and trusted-token")
    parser.add_argument("--host", action="append", default=[], help="by which providers dial: a name or an address")
    parser.add_argument("--days", type=int, default=credentials.DAYS, help="default: %(default)s")
    parser.set_defaults(run=_make)


def _make(given: argparse.Namespace) -> int:
    credentials.make(given.folder, given.host, given.days)
    names = f"{credentials.CERTIFICATE} and {credentials.TOKEN}"
    print(f"{given.folder}: give {names} to providers, {credentials.TRUSTED} instead to those that may see what jobs "
          f"keep private; {credentials.KEY} stays here")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
