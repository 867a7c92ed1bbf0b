"""What lets providers in and shows them whom they talk to: a token, and a certificate that is its own authority."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from llmsys.errors import MissingPackage

CERTIFICATE, KEY, TOKEN, TRUSTED = "certificate.pem", "key.pem", "token", "trusted-token"
DAYS = 90


def make(folder: Path, hosts: Sequence[str], days: int = DAYS) -> None:
    """Writes `certificate.pem` for these names and addresses, its `key.pem`, a `token` and a `trusted-token`, of those
    who may see what a job keeps private, into `folder`; all but the first are for nobody else to read. FileExistsError
    where one is there, ValueError for no host."""
    if not hosts or not all(hosts):
        raise ValueError("--host: none; it is the name or the address by which providers dial")
    certificate, key = pair(hosts, days)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CERTIFICATE, KEY, TOKEN, TRUSTED):
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name}: is there already; a new one would lock out who has the old")
    _write(folder / KEY, key, 0o600)
    for name in (TOKEN, TRUSTED):
        _write(folder / name, secrets.token_urlsafe(24).encode() + b"\n", 0o600)
    _write(folder / CERTIFICATE, certificate, 0o644)


def files(folder: Path) -> dict[str, Path]:
    """Of what `make` has written there as much as there is, by the task's key. ValueError where there is no token,
    OSError for a file that is missing beside another, or cannot be read."""
    if not (folder / TOKEN).exists():
        raise ValueError(f"--credentials {folder}: has no {TOKEN}; `certificate {folder} --host NAME` makes one")
    found = {"token_file": folder / TOKEN}
    if (folder / CERTIFICATE).exists():
        found |= {"certificate": folder / CERTIFICATE, "key": folder / KEY}
    if (folder / TRUSTED).exists():
        found["trusted_token_file"] = folder / TRUSTED
    for path in found.values():
        path.read_bytes()
    return found


def token_in(file: Path) -> str:
    """What a file of one says. OSError where it cannot be read."""
    return file.read_text(encoding="utf-8").strip()


def address(key: str, text: str, *, any_port: bool = True) -> tuple[str, int]:
    """Host and port, which is 0 where any is meant. ValueError for what is none, and for port 0 unless `any_port`."""
    host, _, port = text.rpartition(":")
    digits = port.isascii() and port.isdigit() and len(port) <= 5
    if not host or not digits or not (0 if any_port else 1) <= int(port) < 2**16:
        raise ValueError(f"{key} {text[:256]}: must be HOST:PORT, e.g. 127.0.0.1:7077")
    return host, int(port)


def pair(hosts: Sequence[str], days: int = DAYS) -> tuple[bytes, bytes]:
    """A certificate for these names and addresses, and its key, as PEM."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID
    except ModuleNotFoundError as error:
        raise MissingPackage(f"certificate: needs {error.name}: pip install 'llmsys[owner]'") from None
    key = ec.generate_private_key(ec.SECP256R1())
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "llmsys.decentral")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(own)
        .issuer_name(own)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # of machines whose clocks are late
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([_name(each) for each in hosts]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return made.public_bytes(serialization.Encoding.PEM), private


def _name(host: str) -> object:
    from cryptography import x509

    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    return x509.DNSName(host)


def _write(path: Path, data: bytes, mode: int) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
