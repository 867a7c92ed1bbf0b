"""`python -m llmsys.decentral broker | provider | status | certificate`: a job over machines that people offer."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmsys.decentral import credentials
from llmsys.decentral.direct import Door
from llmsys.decentral.fleet import Provider as Machine
from llmsys.decentral.link import Credentials, Line, Refused, asked
from llmsys.decentral.pieces import Slow
from llmsys.decentral.planes import PLANES, plane_of
from llmsys.decentral.presence import Presence
from llmsys.decentral.provider import Provider
from llmsys.errors import MissingPackage

AGAIN_S = 1.0


def main(words: Sequence[str] | None = None) -> int:
    """0 once it is let go; 1 where it is not let in, or the broker has gone."""
    parser = argparse.ArgumentParser(prog="python -m llmsys.decentral", description="One model over many machines.")
    commands = parser.add_subparsers(dest="command", required=True)
    _broker(commands.add_parser("broker", help="runs an experiment whose providers dial in"))
    _provider(commands.add_parser("provider", help="offers this machine to a broker"))
    _status(commands.add_parser("status", help="what a broker's job is at, and who does what"))
    _certificate(commands.add_parser("certificate", help="makes what a broker beyond loopback needs"))
    given = parser.parse_args(words)
    try:
        return int(given.run(given))
    except KeyboardInterrupt:
        return 130
    except (Refused, ConnectionError, ValueError, OSError, MissingPackage) as error:
        print(f"llmsys.decentral: {error}", file=sys.stderr)
        return 1


# --- broker ----------------------------------------------------------------------------------------------------------


def _broker(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--listen", metavar="HOST:PORT", default="127.0.0.1:7077", help="default: %(default)s")
    parser.add_argument("--credentials", metavar="FOLDER", type=Path, required=True, help="see `certificate`")
    parser.add_argument("overrides", nargs="+", help="of the experiment: +exp=decentral_train task.providers=3 ...")
    parser.set_defaults(run=_serve)


def _serve(given: argparse.Namespace) -> int:
    from llmsys.main import main as run

    folder: Path = given.credentials.resolve()
    own = {"token_file": folder / credentials.TOKEN}
    if (folder / credentials.CERTIFICATE).exists():
        own |= {"certificate": folder / credentials.CERTIFICATE, "key": folder / credentials.KEY}
    for path in own.values():
        path.read_bytes()  # what is missing is said before anything is composed
    set_ = [f"task.{key}={path}" for key, path in own.items()]
    sys.argv = ["llmsys", *given.overrides, "task.start=none", f"task.listen={given.listen}", "task.faults=[]", *set_]
    run()
    return 0


# --- provider --------------------------------------------------------------------------------------------------------


def _joining(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--join", metavar="HOST:PORT", required=True, help="where the broker listens")
    parser.add_argument("--token-file", metavar="FILE", type=Path, required=True, help="with the broker's token")
    parser.add_argument("--certificate", metavar="FILE", type=Path, help="the broker's; without one only on loopback")


def _provider(parser: argparse.ArgumentParser) -> None:
    _joining(parser)
    parser.add_argument("--name", default=f"provider-{uuid.uuid4().hex[:8]}", help="default: a new one each time")
    parser.add_argument("--plane", choices=sorted(PLANES), default="torch", help="default: %(default)s")
    parser.add_argument(
        "--tflops", type=float, required=True, help="peak; measure what is reached with decentral_profile"
    )
    parser.add_argument("--efficiency", type=float, default=0.5, help="share of the peak; default: %(default)s")
    parser.add_argument("--mem-gib", type=float, required=True, help="that the job may use")
    parser.add_argument("--up-mbit", type=float, default=100.0, help="default: %(default)s")
    parser.add_argument("--down-mbit", type=float, default=100.0, help="default: %(default)s")
    parser.add_argument("--capped", action="store_true", help="never use more of the line than that")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="to add to it, for tests; default: %(default)s")
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
    parser.set_defaults(run=_provide)


def _provide(given: argparse.Namespace) -> int:
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
    if given.stdin:
        threading.Thread(target=_end_with_stdin, name="stdin", daemon=True).start()
    token, own = _credentials(given)
    if given.direct_as and not given.direct:
        raise ValueError(f"--direct-as={given.direct_as}: of what listens at --direct HOST:PORT, which is not given")
    door = Door.at(given.direct, given.direct_as) if given.direct else None
    plane = plane_of(given.plane)
    plane.warm()
    slow = Slow(up_mbit=given.up_mbit, down_mbit=given.down_mbit, delay_ms=given.delay_ms) if given.capped else None
    presence = Presence(
        lambda life, busy: Line(given.join, token, machine, life, own, slow, busy, door), given.patience
    )
    for number, what in ((signal.SIGTERM, presence.leave), (signal.SIGINT, presence.leave)):
        signal.signal(number, what)
    if hasattr(signal, "SIGUSR1"):  # Windows has none
        signal.signal(signal.SIGUSR1, presence.pause)
        signal.signal(signal.SIGUSR2, presence.resume)
    presence.run(lambda: Provider(machine.name, plane))
    return 0


def _end_with_stdin() -> None:
    while os.read(0, 4096):  # not by sys.stdin, whose lock an interpreter that ends would wait for
        pass
    os._exit(1)


def _credentials(given: argparse.Namespace) -> tuple[str, Credentials | None]:
    token = given.token_file.read_text(encoding="utf-8").strip()
    return token, None if given.certificate is None else Credentials(certificate=given.certificate.read_bytes())


# --- status ----------------------------------------------------------------------------------------------------------


def _status(parser: argparse.ArgumentParser) -> None:
    _joining(parser)
    parser.add_argument("--json", action="store_true", help="one object, and nothing else")
    parser.add_argument("--watch", action="store_true", help="again each second, until the broker ends")
    parser.set_defaults(run=_show)


def _show(given: argparse.Namespace) -> int:
    token, own = _credentials(given)

    def now() -> Mapping[str, Any]:
        return asyncio.run(asked(given.join, token, own))

    if given.json:
        print(json.dumps(now()), flush=True)
        while given.watch:
            time.sleep(AGAIN_S)
            print(json.dumps(now()), flush=True)
        return 0
    from rich.console import Console
    from rich.live import Live

    if not given.watch:
        Console().print(table(now()))
        return 0
    with Live(table(now()), refresh_per_second=4) as live:
        while True:
            time.sleep(AGAIN_S)
            live.update(table(now()))


def table(status: Mapping[str, Any]) -> Any:
    """A row for each provider, under a line about the job."""
    from rich.table import Table

    loss = "" if status["loss"] is None else f" · loss {status['loss']:.4f}"
    title = (f"step {status['step']} of {status['steps']}{loss} · {status['steps_per_s']:.2f} steps/s · "
             f"epoch {status['epoch']} · {status['phase']}")  # fmt: skip
    made = Table(title=title, title_justify="left")
    for head in ("provider", "does", "plane", "passes", "sent MiB", "past the broker", "silent s"):
        made.add_column(head, justify="left" if head in ("provider", "does", "plane") else "right")
    for name, each in status["providers"].items():
        does = each["role"] if each["stage"] is None else f"stage {each['stage']}"
        silent = "" if each["silent_s"] is None or each["role"] == "gone" else f"{each['silent_s']:.1f}"
        direct = f"{each['direct_mib']:.1f} to {', '.join(each['direct'])}" if each["direct"] else ""
        made.add_row(name, does, each["plane"], str(each["tasks"]), f"{each['sent_mib']:.1f}", direct, silent)
    return made


# --- certificate -----------------------------------------------------------------------------------------------------


def _certificate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="for certificate.pem, key.pem and token")
    parser.add_argument("--host", action="append", default=[], help="by which providers dial: a name or an address")
    parser.add_argument("--days", type=int, default=credentials.DAYS, help="default: %(default)s")
    parser.set_defaults(run=_make)


def _make(given: argparse.Namespace) -> int:
    credentials.make(given.folder, given.host, given.days)
    names = f"{credentials.CERTIFICATE} and {credentials.TOKEN}"
    print(f"{given.folder}: give {names} to providers; {credentials.KEY} stays here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
