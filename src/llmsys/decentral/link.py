"""The wire between processes: one stream of frames from each provider to the broker and back, by gRPC. Here is
a provider's end, and what both share; the broker's is `hub`.

Providers dial out and open no port, so that they may be behind home routers; what they send to one another the broker
passes on, except where they have lines of their own (`direct`). Deadlines, flow control and, where there are
certificates, TLS are the library's. Without certificates only loopback is listened on.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from llmsys.decentral.fleet import Provider as Machine
from llmsys.decentral.outbox import Outbox
from llmsys.decentral.pieces import LAST, PIECE_BYTES, Direction, Joined, Slow, arrived, pieces, slowed
from llmsys.decentral.provider import Provider
from llmsys.decentral.quota import Meter
from llmsys.decentral.reach import BETWEEN, REACH, Reach
from llmsys.decentral.wire import BEAT, BROKER, TASK_S, Frame, decode, encode

if TYPE_CHECKING:
    from llmsys.decentral.direct import Direct
    from llmsys.decentral.door import Door

METHOD = "/llmsys.decentral/Talk"
WELCOME = "welcome"
"""Metadata of a stream whose token is right."""
STATUS = "status"
BEAT_S = 0.5
AGAIN_S = 0.3
"""Between two attempts to dial."""
HELLO_S = 10.0
"""Whoever dials has to say who it is within so long."""
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


def hello(machine: Machine, life: str, reach: Reach | None = None) -> bytes:
    """What a provider says first. `reach`: where its peers do, if they may."""
    body = {**dataclasses.asdict(machine), "life": life}
    body |= {} if reach is None else {REACH: dataclasses.asdict(reach)}
    return encode(Frame(kind="hello", sender=machine.name, to=BROKER, body=body))


class Line:
    """A provider's stream to the broker, in a thread of its own, which also says twice a second that it is alive: a
    provider that computes is not silent. `slow`: it is made to be so, to try what real lines would do. `busy`: whether
    it has something to do, which a sign of life says as well: where nobody has, and nothing comes, something has gone
    astray. `meter` is told what goes over it, and how long it is open. `door`: where it listens for its peers, as long
    as this line is open."""

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
        door: Door | None = None,
    ) -> None:
        self.busy, self.meter, self.door = busy, meter or Meter(), door
        self._direct: Direct | None = None
        self._up = self._down = None
        if slow is not None:
            self._up = Direction(slow.up_mbit, slow.delay_ms / 2e3)
            self._down = Direction(slow.down_mbit, slow.delay_ms / 2e3)
        self._receiving_s, self.began_s = -math.inf, math.inf
        self.address, self.token, self.machine, self.life = address, token, machine, life
        self.credentials = credentials
        self.inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.error: ConnectionError | None = None
        self.heard = False
        self._outbox = Outbox()
        self._open = threading.Event()
        self._thread = threading.Thread(target=self._run, name="line", daemon=True)
        self._thread.start()
        self._open.wait()

    def send(self, data: bytes | None) -> None:
        """None: nothing more will be said. Of a line that has ended the inbox says so."""
        with contextlib.suppress(RuntimeError):  # its loop is closed
            self._loop.call_soon_threadsafe(self._outbox.put_nowait, data)

    def say(self, frame: Frame) -> None:
        """To a peer past the broker, where that is of use."""
        data = encode(frame)
        if self._direct is None or frame.to == BROKER or frame.kind not in BETWEEN:
            self.send(data)
            return
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._direct.say, frame.to, frame.epoch, data)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """A task of its provider, which a sign of life says the age of: one that hangs is as alive as any other."""
        self.began_s = time.monotonic()
        try:
            yield
        finally:
            self.began_s = math.inf

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
        except OSError as error:
            self.error = ConnectionError(str(error))
        finally:
            self.meter.away()
            self.inbox.put(None)

    async def _talk(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._open.set()
        async with contextlib.AsyncExitStack() as stack:
            if self.door is not None:
                from llmsys.decentral.direct import Direct

                relay, ways = self._outbox.put_nowait, (self._up, self._down)
                self._direct = Direct(self.machine.name, self.door, self.inbox.put, relay, *ways, self.meter)
                await stack.enter_async_context(self._direct)
            channel = await stack.enter_async_context(channel_to(self.address, self.credentials))
            let_in = asyncio.Event()
            said = slowed(self._metered(let_in), self._up)
            call = channel.stream_stream(METHOD)(said, metadata=(("token", self.token),))
            if WELCOME in dict(await call.initial_metadata()):
                self.heard = True
                self.meter.here()
                let_in.set()
            joined = Joined()
            async for piece in call:
                self.meter.nbytes += len(piece)
                self._receiving_s = time.monotonic()
                data = joined.add(piece)
                arrived(self._down, len(piece), None if data is None else functools.partial(self._heard, data))

    def _heard(self, data: bytes) -> None:
        if self._direct is None or not self._direct.hear(data):
            self.inbox.put(data)

    async def _metered(self, let_in: asyncio.Event) -> AsyncIterator[bytes]:
        async for piece in self._pieces(let_in):
            self.meter.nbytes += len(piece)
            yield piece

    async def _pieces(self, let_in: asyncio.Event) -> AsyncIterator[bytes]:
        """All that is said, and a sign of life where nothing is: a piece is one, too."""
        await let_in.wait()  # what is being said while a broker hangs up would hide why it does
        direct = self._direct
        for piece in pieces(hello(self.machine, self.life, None if direct is None else direct.reach)):
            yield piece
        due = time.monotonic() + BEAT_S
        while True:
            try:
                data = await asyncio.wait_for(self._outbox.get(), max(0.0, due - time.monotonic()))
            except TimeoutError:
                due = time.monotonic() + BEAT_S
                busy = self.busy() or not self.inbox.empty() or time.monotonic() < self._receiving_s + BEAT_S
                body: dict[str, Any] = {"busy": busy, TASK_S: max(0.0, time.monotonic() - self.began_s)}
                if direct is not None:
                    body |= {"busy": busy or direct.busy, REACH: direct.said()}
                yield LAST + encode(Frame(kind=BEAT, sender=self.machine.name, to=BROKER, body=body))
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
            with line.at_work():
                worked = provider.work()
            if worked:
                line.meter.flops += provider.counters.flops - before
                provider.tell(line.say)
                continue
            data = line.inbox.get()
        if data is None:
            if line.error is not None:
                raise line.error
            raise ConnectionError(f"{line.address}: the broker has gone")
        if data is LEAVE:
            provider.say_leave()
        else:
            with line.at_work():
                provider.hear(data)
        provider.tell(line.say)
    line.close()


def stay(
    provider: Provider,
    dial: Callable[[], Line],
    patience_s: Callable[[], float],
    why: Callable[[str], None] = lambda text: None,
) -> None:
    """As `provide`; when the line ends it is dialled again for so long: a broker that has died is rebuilt. `why` is
    told of each reason once, until it is let in again."""
    lost_s, told = -math.inf, set[str]()
    while True:
        line = dial()
        try:
            return provide(provider, line)
        except Refused:
            raise
        except ConnectionError as error:
            now_s = time.monotonic()
            if line.heard:
                lost_s, told = now_s, set()
            if now_s - lost_s > patience_s():
                raise
            if str(error) not in told:
                told.add(str(error))
                why(str(error))
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
