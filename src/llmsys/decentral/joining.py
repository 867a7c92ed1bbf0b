"""Words of the commands that dial a broker: where it is, and what it lets in."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmsys.decentral.credentials import CERTIFICATE, address, token_in
from llmsys.decentral.link import Credentials
from llmsys.decentral.reach import LOOPBACK


def add(parser: argparse.ArgumentParser) -> None:
    """To a command's words."""
    parser.add_argument("--join", metavar="HOST:PORT", required=True, help="where the broker listens")
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        type=Path,
        required=True,
        help="with a token of the broker's: token, or trusted-token",
    )
    parser.add_argument("--certificate", metavar="FILE", type=Path, help="the broker's; without one only on loopback")


def credentials(given: argparse.Namespace) -> tuple[str, Credentials | None]:
    """The token, and the certificate, if one was named. ValueError for an address or a certificate that is none, and
    for none beyond loopback, where the token would go in clear text; OSError for a file that cannot be read."""
    host, _ = address("--join", given.join, any_port=False)
    token = token_in(given.token_file)
    if given.certificate is None:
        if host not in LOOPBACK:
            raise ValueError(
                f"--join {given.join}: beyond loopback the broker's {CERTIFICATE} is needed: --certificate FILE"
            )
        return token, None
    certificate = given.certificate.read_bytes()
    if b"-----BEGIN CERTIFICATE-----" not in certificate:
        raise ValueError(f"--certificate {given.certificate}: is none; it is the broker's {CERTIFICATE}")
    return token, Credentials(certificate=certificate)
