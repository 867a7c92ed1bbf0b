"""`python -m llmsys.decentral COMMAND`: jobs over machines that people offer."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmsys.decentral import credentials, joining, ledger, probe_command, provider_command, view
from llmsys.decentral.link import Refused, asked
from llmsys.errors import MissingPackage


def main(words: Sequence[str] | None = None) -> int:
    """0 once it is let go; 1 where it is not let in, or the broker has gone."""
    parser = argparse.ArgumentParser(prog="python -m llmsys.decentral", description="One model over many machines.")
    commands = parser.add_subparsers(dest="command", required=True)
    _broker(commands.add_parser("broker", help="runs an experiment, or a folder of them, whose providers dial in"))
    _submit(commands.add_parser("submit", help="puts an experiment into a broker's folder"))
    provider_command.add(commands.add_parser("provider", help="offers this machine to a broker"))
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
    own = credentials.files(given.credentials.resolve())  # what is missing is said before anything is composed
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


# --- status ----------------------------------------------------------------------------------------------------------


def _status(parser: argparse.ArgumentParser) -> None:
    joining.add(parser)
    parser.add_argument("--json", action="store_true", help="one object, and nothing else")
    parser.add_argument(
        "--watch", action="store_true", help="again each second, until the broker ends; over all jobs of a queue"
    )
    parser.set_defaults(run=_show)


def _show(given: argparse.Namespace) -> int:
    token, own = joining.credentials(given)

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
