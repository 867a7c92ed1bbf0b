"""The broker's end of the wire (`link`): it listens, and lets in who has the token."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import hmac
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc

from llmsys.decentral.fleet import Provider as Machine
from llmsys.decentral.link import HELLO_S, METHOD, OPTIONS, STATUS, WELCOME, Credentials
from llmsys.decentral.outbox import Outbox
from llmsys.decentral.pieces import Joined, pieces
from llmsys.decentral.planes import PLANES
from llmsys.decentral.reach import LOOPBACK, REACH, Reach
from llmsys.decentral.wire import BROKER, Frame, Malformed, decode, encode, header

NAME = 64
NUMBERS = ("tflops", "efficiency", "mem_gib", "up_mbit", "down_mbit", "host_gib", "host_gbps", "usd_per_hour", "watts")
"""That a provider says of itself."""
LEAST, MOST = 1e-9, 1e9
"""Of these, where one is not 0: what is computed of them is neither 0 nor infinite."""
GRACE_S = 5.0
"""For what has been said to arrive, when a broker ends."""


class Hub:
    """Listens, and has a queue of frames for each provider that is connected. `joined(machine, life, reach)`,
    `heard(name, data)`, `alive(name)` (a part of something is here), `closed(name)` and, for whoever asks, `status()`
    are called in the loop's own thread. `trusted_token`: where there is one, only who shows it is trusted, whatever
    others say of themselves."""

    def __init__(
        self,
        token: str,
        joined: Callable[[Machine, str, Reach | None], None],
        heard: Callable[[str, bytes], None],
        closed: Callable[[str], None],
        alive: Callable[[str], None] = lambda name: None,
        status: Callable[[], Mapping[str, Any]] = dict,
        trusted_token: str = "",
    ) -> None:
        self.trusted_token = trusted_token
        self.trusted: set[str] = set()  # names of those that have shown it
        self.token, self.joined, self.heard, self.closed = token, joined, heard, closed
        self.alive, self.status = alive, status
        self.queues: dict[str, Outbox] = {}
        self.port = 0
        self.malformed = 0
        self.received: collections.Counter[str] = collections.Counter()  # bytes, by who sent them

    async def listen(self, host: str, port: int, credentials: Credentials | None = None) -> None:
        """ValueError for an address beyond loopback without credentials, OSError for one that cannot be had."""
        if credentials is None and host not in LOOPBACK:
            raise ValueError(f"listen={host}: beyond loopback a certificate is needed; make one with: "
                             "python -m llmsys.decentral certificate")  # fmt: skip
        self._server = grpc.aio.server(options=OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(self._talk)
        service, method = METHOD[1:].split("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        address = f"{host}:{port}"
        try:
            if credentials is None:
                self.port = self._server.add_insecure_port(address)
            else:
                own = grpc.ssl_server_credentials([(credentials.key, credentials.certificate)])
                self.port = self._server.add_secure_port(address, own)
        except RuntimeError as error:
            raise OSError(f"listen={address}: {error}") from None
        await self._server.start()

    async def close(self) -> None:
        """Everybody is told to stop talking."""
        for each in self.queues.values():
            each.put_nowait(None)
        await self._server.stop(grace=GRACE_S)

    def send(self, name: str, data: bytes) -> None:
        """To whoever is connected under this name; to others nothing."""
        if name in self.queues:
            self.queues[name].put_nowait(data)

    async def _talk(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        shown = str(dict(context.invocation_metadata() or ()).get("token", "")).encode()
        trusted = bool(self.trusted_token) and hmac.compare_digest(shown, self.trusted_token.encode())
        if not trusted and not hmac.compare_digest(shown, self.token.encode()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is not this broker's")
        await context.send_initial_metadata(((WELCOME, "1"),))
        try:
            async with asyncio.timeout(HELLO_S):
                first = Joined().add(await anext(requests)) or b""
            if kind_of(first) == STATUS:
                for piece in pieces(encode(Frame(kind=STATUS, sender=BROKER, body=self.status()))):
                    yield piece
                return
            machine, life, reach = hello_of(first)
        except (TimeoutError, StopAsyncIteration, Malformed) as error:
            self.malformed += 1
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no hello: {error}")
            return
        if self.trusted_token and not trusted:
            machine = dataclasses.replace(machine, trusted=False)
            if machine.name in self.trusted:  # or it would be sent what that one is
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, f"the name {machine.name} is a trusted provider's")
        elif trusted and machine.trusted:
            self.trusted.add(machine.name)
        name, own = machine.name, Outbox()
        if (before := self.queues.get(name)) is not None:
            before.put_nowait(None)  # of an earlier life, or of a line that is no more
        self.queues[name] = own
        self.joined(machine, life, reach)
        reading = asyncio.create_task(self._read(name, own, requests))
        try:
            while (data := await own.get()) is not None:
                for piece in pieces(data):
                    yield piece
        finally:
            reading.cancel()
            if self.queues.get(name) is own:
                del self.queues[name]
                self.closed(name)

    async def _read(self, name: str, own: Outbox, requests: AsyncIterator[bytes]) -> None:
        joined = Joined()
        try:
            async for piece in requests:
                if self.queues.get(name) is not own:
                    continue
                self.received[name] += len(piece)
                if (data := joined.add(piece)) is not None:
                    self.heard(name, data)
                else:
                    self.alive(name)
        except Malformed:
            self.malformed += 1  # where frames begin is not known any more: it has to dial again
        except grpc.RpcError:
            pass  # it has hung up
        finally:
            own.put_nowait(None)


def hello_of(data: bytes) -> tuple[Machine, str, Reach | None]:
    """A provider, which of its lives it is, and where its peers reach it, if they may. Malformed for what is none."""
    frame = decode(data)
    if frame.kind != "hello":
        raise Malformed(f"{frame.kind[:40]}: hello comes first")
    given = dict(frame.body)
    life = given.pop("life", "")
    try:
        reach = Reach.of_json(given.pop(REACH)) if REACH in given else None
        machine = _bounded(Machine(**given))
    except (TypeError, ValueError, OverflowError) as error:
        raise Malformed(str(error)) from None
    texts = all(isinstance(each, str) for each in (machine.name, machine.region, machine.plane))
    if not texts or not (machine.name.isascii() and machine.name.isprintable() and len(machine.name) <= NAME):
        raise Malformed(f"a provider's name: must be text of {NAME} characters at most, all in ASCII")
    if machine.plane not in PLANES or type(machine.trusted) is not bool:
        raise Malformed(f"provider {machine.name}: a plane or a region that is none")
    if machine.name != frame.sender or machine.name == BROKER or not isinstance(life, str):
        raise Malformed(f"provider {machine.name}: is not who it says")
    return machine, life, reach


def _bounded(machine: Machine) -> Machine:
    """With numbers that can be computed with, as floats. ValueError for others."""
    found: dict[str, Any] = {}
    for key in NUMBERS:
        value = getattr(machine, key)
        if value is None and key in ("usd_per_hour", "watts"):
            continue
        if type(value) not in (int, float) or not (value == 0 or LEAST <= value <= MOST):
            raise ValueError(f"{key}={value!r:.40}: must be a number from {LEAST:g} to {MOST:g}")
        found[key] = float(value)
    return dataclasses.replace(machine, **found)


def kind_of(data: bytes) -> str:
    """Of a frame, without reading the rest of it. Malformed for what is none."""
    return str(header(data)["kind"])
