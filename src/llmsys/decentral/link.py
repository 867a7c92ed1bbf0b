"""The wire between processes: one stream of frames from each provider to the broker and back, by gRPC. Here is
a provider's end, and what both share; the broker's is `hub`.

Providers dial out and open no port, so that they may be behind home routers; what they send to one another the broker
passes on. Deadlines, flow control and, where there are certificates, TLS are the library's. Without certificates only
loopback is listened on.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc

from llmsys.decentral.fleet import Provider as Machine
from llmsys.decentral.pieces import LAST, PIECE_BYTES, Direction, Joined, Slow, pieces, until
from llmsys.decentral.provider import BEAT, BROKER, Provider
from llmsys.decentral.quota import Meter
from llmsys.decentral.wire import Frame, decode, encode

METHOD = "/llmsys.decentral/Talk"
WELCOME = "welcome"
"""Metadata of a stream whose token is right."""
STATUS = "status"
BEAT_S = 0.5
AGAIN_S = 0.3
"""Between two attempts to dial."""
HELLO_S = 10.0
"""Whoever dials has to say who it is within so long."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
OPTIONS = (
    ("grpc.max_receive_message_length", 2 * PIECE_BYTES),
    ("grpc.max_send_message_length", 2 * PIECE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.so_reuseport", 0),
)


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """PEM: of the broker its certificate and key, of a provider the certificate that it is to find."""

    certificate: bytes
    key: bytes = b""


class Refused(ConnectionError):
    """The broker does not let this provider in; what it says."""


def hello(machine: Machine, life: str) -> bytes:
    """What a provider says first."""
    return encode(
        Frame(kind="hello", sender=machine.name, to=BROKER, body={**dataclasses.asdict(machine), "life": life})
    )


class Line:
    """A provider's stream to the broker, in a thread of its own, which also says twice a second that it is alive: a
    provider that computes is not silent. `slow`: it is made to be so, to try what real lines would do. `busy`: whether
    it has something to do, which a sign of life says as well: where nobody has, and nothing comes, something has gone
    astray. `meter` is told what goes over it, and how long it is open."""

    def __init__(
        self,
        address: str,
        token: str,
        machine: Machine,
        life: str,
        credentials: Credentials | None,
        slow: Slow | None = None,
        busy: Callable[[], bool] = lambda: False,
        meter: Meter | None = None,
    ) -> None:
        self.slow, self.busy, self.meter = slow, busy, meter or Meter()
        self._receiving_s = -math.inf
        self.address, self.token, self.machine, self.life = address, token, machine, life
        self.credentials = credentials
        self.inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.error: ConnectionError | None = None
        self.heard = False
        self._outbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._open = threading.Event()
        self._thread = threading.Thread(target=self._run, name="line", daemon=True)
        self._thread.start()
        self._open.wait()

    def send(self, data: bytes | None) -> None:
        """None: nothing more will be said. Of a line that has ended the inbox says so."""
        with contextlib.suppress(RuntimeError):  # its loop is closed
            self._loop.call_soon_threadsafe(self._outbox.put_nowait, data)

    def close(self) -> None:
        """What has been said is sent before."""
        self.send(None)
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        try:
            asyncio.run(self._talk())
        except grpc.aio.AioRpcError as error:
            refused = error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT)
            self.error = (Refused if refused else ConnectionError)(f"{self.address}: {error.details()}")
        finally:
            self.meter.away()
            self.inbox.put(None)

    async def _talk(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._open.set()
        async with channel_to(self.address, self.credentials) as channel:
            talk = channel.stream_stream(METHOD)
            let_in = asyncio.Event()
            call = talk(self._said(let_in), metadata=(("token", self.token),))
            if WELCOME in dict(await call.initial_metadata()):
                self.meter.here()
                let_in.set()
            joined = Joined()
            slow = self.slow
            down = None if slow is None else Direction(slow.down_mbit, slow.delay_ms / 2e3)
            async for piece in call:
                self.heard = True
                self.meter.nbytes += len(piece)
                self._receiving_s = time.monotonic()
                data = joined.add(piece)
                if down is None:
                    if data is not None:
                        self.inbox.put(data)
                    continue
                through = down.received_at(len(piece), self._loop.time()) + down.delay_s
                if data is not None:
                    self._loop.call_at(through, self.inbox.put, data)

    async def _said(self, let_in: asyncio.Event) -> AsyncIterator[bytes]:
        await let_in.wait()  # what is being said while a broker hangs up would hide why it does
        if self.slow is None:
            async for piece in self._pieces():
                self.meter.nbytes += len(piece)
                yield piece
            return
        up = Direction(self.slow.up_mbit, self.slow.delay_ms / 2e3)
        under_way = asyncio.Queue[tuple[float, bytes | None]]()

        async def carry() -> None:
            async for piece in self._pieces():
                await until(up.busy_until(len(piece), self._loop.time()))
                under_way.put_nowait((self._loop.time() + up.delay_s, piece))
            under_way.put_nowait((0.0, None))

        carrying = asyncio.create_task(carry())
        try:
            while (item := await under_way.get())[1] is not None:
                await until(item[0])
                self.meter.nbytes += len(item[1])
                yield item[1]
        finally:
            carrying.cancel()

    async def _pieces(self) -> AsyncIterator[bytes]:
        """All that is said, and a sign of life where nothing is: a piece is one, too."""
        for piece in pieces(hello(self.machine, self.life)):
            yield piece
        due = time.monotonic() + BEAT_S
        while True:
            try:
                data = await asyncio.wait_for(self._outbox.get(), max(0.0, due - time.monotonic()))
            except TimeoutError:
                due = time.monotonic() + BEAT_S
                busy = self.busy() or not self.inbox.empty() or time.monotonic() < self._receiving_s + BEAT_S
                yield LAST + encode(Frame(kind=BEAT, sender=self.machine.name, to=BROKER, body={"busy": busy}))
                continue
            if data is None:
                return
            for piece in pieces(data):
                yield piece


def channel_to(address: str, credentials: Credentials | None) -> grpc.aio.Channel:
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=OPTIONS)
    own = grpc.ssl_channel_credentials(credentials.certificate)
    return grpc.aio.secure_channel(address, own, options=OPTIONS)


LEAVE = b"leave"
"""Put into a line's inbox: its provider wants to go."""


def provide(provider: Provider, line: Line) -> None:
    """A provider's life: it computes what it is told, until it is told to stop. ConnectionError where the line ends
    before."""
    while not provider.stopped:
        try:
            data = line.inbox.get_nowait()
        except queue.Empty:
            before = provider.counters.flops
            if provider.work():
                line.meter.flops += provider.counters.flops - before
                _flush(provider, line)
                continue
            data = line.inbox.get()
        if data is None:
            if line.error is not None:
                raise line.error
            raise ConnectionError(f"{line.address}: the broker has gone")
        if data is LEAVE:
            provider.say_leave()
        else:
            provider.hear(data)
        _flush(provider, line)
    line.close()


def stay(provider: Provider, dial: Callable[[], Line], patience_s: Callable[[], float]) -> None:
    """As `provide`; when the line ends it is dialled again for so long: a broker that has died is rebuilt."""
    lost_s = -math.inf
    while True:
        line = dial()
        try:
            return provide(provider, line)
        except Refused:
            raise
        except ConnectionError:
            now_s = time.monotonic()
            lost_s = now_s if line.heard else lost_s
            if now_s - lost_s > patience_s():
                raise
        time.sleep(AGAIN_S)


async def asked(address: str, token: str, credentials: Credentials | None) -> Mapping[str, Any]:
    """What a broker says of its job. Refused where the token is not its own, ConnectionError where none answers."""

    async def question() -> AsyncIterator[bytes]:
        for piece in pieces(encode(Frame(kind=STATUS, to=BROKER))):
            yield piece

    joined = Joined()
    try:
        async with channel_to(address, credentials) as channel:
            call = channel.stream_stream(METHOD)(question(), metadata=(("token", token),), timeout=HELLO_S)
            async for piece in call:
                if (data := joined.add(piece)) is not None:
                    return decode(data).body
    except grpc.aio.AioRpcError as error:
        refused = error.code() == grpc.StatusCode.UNAUTHENTICATED
        raise (Refused if refused else ConnectionError)(f"{address}: {error.details()}") from None
    raise ConnectionError(f"{address}: no answer")


def _flush(provider: Provider, line: Line) -> None:
    said, provider.out = provider.out, []
    for frame in said:
        line.send(encode(frame))
