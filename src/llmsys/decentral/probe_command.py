"""`python -m llmsys.decentral probe`: what providers that dial in are good for, before a job is begun."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from llmsys.decentral import credentials
from llmsys.decentral.link import Credentials
from llmsys.files import write_atomic

MODELS = "llama_6m,llama_85m,gpt2,llama2_7b"


def add(parser: argparse.ArgumentParser) -> None:
    """Its words."""
    parser.add_argument("--listen", metavar="HOST:PORT", default="127.0.0.1:7077", help="default: %(default)s")
    parser.add_argument("--credentials", metavar="FOLDER", type=Path, required=True, help="see `certificate`")
    parser.add_argument("--providers", type=int, default=2, help="how many to wait for; default: %(default)s")
    parser.add_argument("--wait", metavar="S", type=float, default=60.0, help="at most; default: %(default)s")
    parser.add_argument("--models", default=MODELS, help="names of conf/model; default: %(default)s")
    parser.add_argument("--rows", type=int, default=1, help="sequences of a micro-batch; default: %(default)s")
    parser.add_argument("--length", type=int, default=512, help="tokens of one in training; default: %(default)s")
    parser.add_argument("--fleet", metavar="FILE", type=Path, help="to write what was measured to, for task.fleet")
    parser.add_argument("--json", action="store_true", help="one object, and nothing else")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """The exit code. ValueError for models that are not known, ConnectionError where nobody comes."""
    from llmsys import compose, schema
    from llmsys.decentral import probe_report
    from llmsys.decentral.probe import Probe

    host, port = credentials.address("--listen", given.listen)
    if given.fleet is not None and not given.fleet.resolve().parent.is_dir():
        raise ValueError(f"--fleet {given.fleet}: there is no such folder")
    if given.rows < 1 or given.length < 1 or given.providers < 1:
        raise ValueError("--rows, --length, --providers: must be 1 or more")
    known = sorted(path.stem for path in (compose.CONF / "model").glob("*.yaml"))
    names = [name.strip() for name in given.models.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ValueError(f"--models {name}: must be of {', '.join(known)}")
    words = ["+exp=decentral_plan", f"train.length={given.length}", f"train.micro_batch={given.rows}"]
    models = [schema.build(compose.compose([*words, f"model={name}"])).model for name in names]
    files, own = credentials.files(given.credentials), None
    token = credentials.token_in(files["token_file"])
    trusted = credentials.token_in(files["trusted_token_file"]) if "trusted_token_file" in files else ""
    if "certificate" in files:
        own = Credentials(certificate=files["certificate"].read_bytes(), key=files["key"].read_bytes())

    def said(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    async def measured() -> list[Any]:
        probe = Probe(token, given.rows, said, trusted)
        return await probe.run(host, port, given.providers, given.wait, own, lambda p: said(f"listens on {host}:{p}"))

    found = asyncio.run(measured())
    predicted = [each for model in models for each in probe_report.predictions(found, model, given.rows, given.length)]
    if given.fleet is not None:
        write_atomic(given.fleet, probe_report.fleet_text(found))
    if given.json:
        print(json.dumps(probe_report.plain(found, predicted)))
        return 0
    from rich.console import Console

    Console().print(*probe_report.tables(found, predicted))
    return 0
