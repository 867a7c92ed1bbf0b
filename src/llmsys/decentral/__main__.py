"""`python -m llmsys.decentral provider --join HOST:PORT --token-file FILE ...`: this machine as a provider."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path

from llmsys.decentral.fleet import Provider as Machine
from llmsys.decentral.link import Credentials, Line, Refused, stay
from llmsys.decentral.planes import PLANES, plane_of
from llmsys.decentral.provider import Provider


def main(words: Sequence[str] | None = None) -> int:
    """0 once it is let go; 1 where it is not let in, or the broker has gone."""
    parser = argparse.ArgumentParser(prog="python -m llmsys.decentral", description="One model over many machines.")
    commands = parser.add_subparsers(dest="command", required=True)
    _provider(commands.add_parser("provider", help="offers this machine to a broker"))
    asked = parser.parse_args(words)
    try:
        return _provide(asked)
    except KeyboardInterrupt:
        return 130
    except (Refused, ConnectionError, ValueError, OSError) as error:
        print(f"llmsys.decentral: {error}", file=sys.stderr)
        return 1


def _provider(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--join", metavar="HOST:PORT", required=True, help="where the broker listens")
    parser.add_argument("--token-file", metavar="FILE", type=Path, required=True, help="with the broker's token")
    parser.add_argument("--certificate", metavar="FILE", type=Path, help="the broker's; without one only on loopback")
    parser.add_argument("--name", default=f"provider-{uuid.uuid4().hex[:8]}", help="default: a new one each time")
    parser.add_argument("--plane", choices=sorted(PLANES), default="torch", help="default: %(default)s")
    parser.add_argument(
        "--tflops", type=float, required=True, help="peak; measure what is reached with decentral_profile"
    )
    parser.add_argument("--efficiency", type=float, default=0.5, help="share of the peak; default: %(default)s")
    parser.add_argument("--mem-gib", type=float, required=True, help="that the job may use")
    parser.add_argument("--up-mbit", type=float, default=100.0, help="default: %(default)s")
    parser.add_argument("--down-mbit", type=float, default=100.0, help="default: %(default)s")
    parser.add_argument("--region", default="")
    parser.add_argument("--untrusted", action="store_true", help="it is shown nothing that the job keeps private")
    parser.add_argument("--stdin", action="store_true", help="it ends when its standard input does")
    parser.add_argument(
        "--patience",
        metavar="S",
        type=float,
        default=30.0,
        help="to dial again a broker that has gone; default: %(default)s",
    )


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def _provide(asked: argparse.Namespace) -> int:
    machine = Machine(
        name=asked.name,
        tflops=asked.tflops,
        efficiency=asked.efficiency,
        mem_gib=asked.mem_gib,
        up_mbit=asked.up_mbit,
        down_mbit=asked.down_mbit,
        region=asked.region,
        plane=asked.plane,
        trusted=not asked.untrusted,
    )
    if asked.stdin:
        threading.Thread(target=_end_with_stdin, name="stdin", daemon=True).start()
    token = asked.token_file.read_text(encoding="utf-8").strip()
    own = None if asked.certificate is None else Credentials(certificate=asked.certificate.read_bytes())
    plane = plane_of(asked.plane)
    plane.warm()
    life = uuid.uuid4().hex
    provider = Provider(machine.name, plane)
    stay(provider, lambda: Line(asked.join, token, machine, life, own), asked.patience)
    if provider.why:
        raise ValueError(provider.why)
    return 0


if __name__ == "__main__":
    sys.exit(main())
