"""Where a provider listens for its peers (`direct`), and what it takes from them there."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import hmac
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Self

import grpc

from llmsys.decentral import credentials
from llmsys.decentral.link import OPTIONS, WELCOME, Credentials
from llmsys.decentral.pieces import Direction, Joined, arrived, slowed
from llmsys.decentral.quota import Meter
from llmsys.decentral.reach import BETWEEN, LOOPBACK, PROBE, Reach, shown
from llmsys.decentral.wire import Malformed, header

METHOD = "/llmsys.decentral/Direct"
GRACE_S = 1.0
"""For peers to hear that it hangs up."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Door:
    """Where a provider listens for its peers: port 0 is any that is free. `known`: the address by which they dial,
    where that is another."""

    host: str
    port: int
    known: str = ""
    credentials: Credentials | None = None

    @classmethod
    def at(cls, address: str, known: str = "") -> Self:
        """Beyond loopback with a certificate that is made now. ValueError for an address that is none, or that nobody
        could dial; MissingPackage where no certificate can be made."""
        host, port = credentials.address("--direct", address)
        dialled = credentials.address("--direct-as", known, any_port=False)[0] if known else host
        if dialled in ("0.0.0.0", "[::]"):
            raise ValueError(
                f"--direct {address}: nobody can dial that; say by which address with --direct-as HOST:PORT"
            )
        own = None
        if not {host, dialled} <= {*LOOPBACK}:
            certificate, key = credentials.pair([dialled.strip("[]")])
            own = Credentials(certificate=certificate, key=key)
        return cls(host=host, port=port, known=known, credentials=own)


class Listening:
    """At `door`, as provider `name`: `heard(data)` takes what peers say. Whoever shows what it was handed for its name
    (`reach.shown`) is let in. `up`, `down`, `meter` as of `direct.Direct`."""

    def __init__(
        self,
        name: str,
        door: Door,
        heard: Callable[[bytes], None],
        up: Direction | None,
        down: Direction | None,
        meter: Meter,
    ) -> None:
        self.name, self.door, self.heard, self.up, self.down, self.meter = name, door, heard, up, down, meter
        self.key = secrets.token_hex(32)
        self.reach: Reach
        self.received: collections.Counter[str] = collections.Counter()
        self.received_s = -math.inf
        self.counters = {"refused": 0, "malformed": 0}
        self._open: set[asyncio.Queue[bytes | None]] = set()

    async def start(self) -> None:
        """OSError where it cannot listen."""
        door = self.door
        self._server = grpc.aio.server(options=(*OPTIONS, ("grpc.http2.max_ping_strikes", 0)))
        handler = grpc.stream_stream_rpc_method_handler(self._listen)
        service, method = METHOD[1:].split("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        address, own = f"{door.host}:{door.port}", door.credentials
        try:
            if own is None:
                port = self._server.add_insecure_port(address)
            else:
                server = grpc.ssl_server_credentials([(own.key, own.certificate)])
                port = self._server.add_secure_port(address, server)
        except RuntimeError as error:
            raise OSError(f"--direct {address}: {error}") from None
        certificate = "" if own is None else own.certificate.decode()
        self.reach = Reach(address=door.known or f"{door.host}:{port}", secret=self.key, certificate=certificate)
        await self._server.start()

    async def close(self) -> None:
        """Peers hear that it hangs up."""
        for each in self._open:
            each.put_nowait(None)
        await self._server.stop(grace=GRACE_S)

    async def _listen(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        given = dict(context.invocation_metadata() or ())
        name = str(given.get("name", ""))
        if not hmac.compare_digest(str(given.get("token", "")).encode(), shown(self.key, name).encode()):
            self.counters["refused"] += 1
            log.warning("refused somebody who says to be %.40r", name)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "it does not let this provider in")
        await context.send_initial_metadata(((WELCOME, "1"),))
        here = asyncio.Queue[bytes | None]()
        wrong: list[Malformed] = []

        async def read() -> None:
            try:
                await self._read(name, requests, here)
            except Malformed as error:
                wrong.append(error)
            finally:
                here.put_nowait(None)

        async def acknowledgements() -> AsyncIterator[bytes]:
            while (each := await here.get()) is not None:
                yield each

        reading = asyncio.create_task(read())
        self._open.add(here)
        try:
            async for each in slowed(acknowledgements(), self.up):
                yield each
        finally:
            self._open.discard(here)
            reading.cancel()
        for error in wrong:
            self.counters["malformed"] += 1
            log.warning("%s: %s", name, error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def _read(self, name: str, requests: AsyncIterator[bytes], here: asyncio.Queue[bytes | None]) -> None:
        """Malformed for what that peer does not say."""

        def come(kind: str, data: bytes) -> None:
            if kind != PROBE:
                self.heard(data)
            here.put_nowait(b"")

        joined = Joined()
        with contextlib.suppress(grpc.RpcError):  # it has hung up
            async for piece in requests:
                self.received[name] += len(piece)
                self.meter.nbytes += len(piece)
                self.received_s = time.monotonic()
                if (data := joined.add(piece)) is not None:
                    kind = self._checked(name, data)
                arrived(self.down, len(piece), None if data is None else functools.partial(come, kind, data))

    def _checked(self, name: str, data: bytes) -> str:
        """The kind of what a peer says, in its own name, to this one."""
        head = header(data)
        if head["sender"] != name or head["to"] != self.name:
            raise Malformed(f"a frame of {head['sender'][:40]} to {head['to'][:40]}, from {name}")
        if head["kind"] not in (*BETWEEN, PROBE):
            raise Malformed(f"{head['kind'][:40]}: is not a peer's to say")
        return str(head["kind"])
