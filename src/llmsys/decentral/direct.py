"""Lines between providers that can reach each other, past the broker: one to each peer that somebody has something to
say to, dialled while frames still go the way round, measured against it, and used if it is not slower.

What a peer has it acknowledges, frame by frame. When a line breaks, what it had not is said again by way of the
broker: what comes twice does no harm. Only what follows a step's beginning goes past the broker: everybody has the plan
by then, and nothing overtakes it.

    dialler    pieces of frames (`pieces`); metadata: its name, and what it was handed to show (`reach`)
    listener   an empty message for each frame that is here
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Self

import grpc

from llmsys.decentral.door import METHOD, Door, Listening
from llmsys.decentral.link import BEAT_S, WELCOME, Credentials, channel_to
from llmsys.decentral.pieces import Direction, pieces, slowed
from llmsys.decentral.quota import Meter
from llmsys.decentral.reach import PROBE, PROBED, REACH, Reach, Said
from llmsys.decentral.wire import BROKER, Array, Frame, Malformed, decode, encode, header

DIAL_S = 2.0
AGAIN_S, MOST_S = 30.0, 960.0
"""From the end of a line, or of an attempt, to the next one; after each that is no use twice as long, up to so long."""
PROBE_BYTES = 256 << 10
PROBE_S = 10.0
"""A probe that takes longer is not waited for."""
ROUNDS, ROUNDS_S = 5, 0.5
"""So often both ways are tried, unless that takes longer; the best of each counts."""
NOISE, NOISE_MS = 1.25, 5.0
"""A line that takes so much longer is not slower: it spares the broker's."""

log = logging.getLogger(__name__)


class Slower(ConnectionError):
    """A line that is no use."""


@dataclass(kw_only=True)
class _Peer:
    """Somebody to talk to. Frames, each with its epoch: those that are to be sent, and those that are not acknowledged
    yet; a probe, of no epoch, has somebody who waits. `ms`: of a probe, here and by way of the broker."""

    name: str
    reach: Reach
    why: str = "being tried"
    ms: tuple[float, float | None] | None = None
    unsaid: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    unknown: collections.deque[tuple[int, bytes, asyncio.Future[None] | None]] = field(
        default_factory=collections.deque
    )
    keeping: asyncio.Task[None] | None = None

    def say(self, epoch: int, data: bytes, waiting: asyncio.Future[None] | None = None) -> None:
        self.unknown.append((epoch, data, waiting))
        self.unsaid.put_nowait(data)


class Direct:
    """The lines of one provider, in the loop of its line to the broker, whose `meter` counts their bytes, too:
    `heard(data)` takes what peers say,
    `relay(data)` what goes by way of the broker. `up` and `down` are those of that line, where it is slow: all share
    them."""

    def __init__(
        self,
        name: str,
        door: Door,
        heard: Callable[[bytes], None],
        relay: Callable[[bytes], None],
        up: Direction | None = None,
        down: Direction | None = None,
        meter: Meter | None = None,
    ) -> None:
        self.meter, self._job = meter or Meter(), ""
        self.name, self.relay, self.up = name, relay, up
        self._listening = Listening(name, door, heard, up, down, self.meter)
        self._peers: dict[str, _Peer] = {}
        self._epoch, self._begun = 0, False
        self._alone = asyncio.Lock()  # or probes would be in each other's way
        self._count, self._round = 0, (0, asyncio.Future[None]())

    async def __aenter__(self) -> Self:
        """Listens. OSError where it cannot."""
        await self._listening.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        for peer in self._peers.values():
            self._forget(peer)
        await self._listening.close()

    @property
    def reach(self) -> Reach:
        """Where its peers reach it."""
        return self._listening.reach

    @property
    def counters(self) -> dict[str, int]:
        return self._listening.counters

    # --- what is said ---

    def say(self, to: str, epoch: int, data: bytes) -> None:
        """Past the broker, where there is a line that is of use; the first word to somebody has it dialled."""
        peer = self._peers.get(to)
        if peer is None or epoch != self._epoch or not self._begun:
            self.relay(data)
            return
        if peer.keeping is None:
            peer.keeping = asyncio.create_task(self._keep(peer))
        if peer.ms is None:
            self.relay(data)
        else:
            peer.say(epoch, data)

    def hear(self, data: bytes) -> bool:
        """From the broker: whether it was for here, and not for the provider. What is no frame is not."""
        try:
            head = header(data)
            kind, about = head["kind"], head["sender"]
            if kind == "plan" or (kind == "begin" and head["epoch"] == self._epoch):
                self._begun = kind == "begin"
            if kind == REACH and about == BROKER:
                self._introduced(decode(data))
            elif kind == PROBE:
                self._tell(PROBED, about, head["epoch"], int(head["body"]["number"]))
            elif kind == PROBED:
                number, waiting = self._round
                if head["body"]["number"] == number and not waiting.done():
                    waiting.set_result(None)
            else:
                return False
        except (Malformed, ValueError, KeyError, TypeError) as error:
            self.counters["malformed"] += 1
            log.warning("from the broker: %s", error)
        return True

    def _introduced(self, frame: Frame) -> None:
        """Those who are new, or listen elsewhere; the lines of others stay as they are."""
        self._epoch, self._job = frame.epoch, frame.job
        told = {str(name): Reach.of_json(each) for name, each in frame.body.items()}
        for name, peer in [*self._peers.items()]:
            if told.get(name) != peer.reach:
                self._forget(self._peers.pop(name))
        self._peers |= {name: _Peer(name=name, reach=each) for name, each in told.items() if name not in self._peers}

    @property
    def busy(self) -> bool:
        """Whether something is on its way, or has just come."""
        return (
            any(peer.unknown for peer in self._peers.values()) or time.monotonic() < self._listening.received_s + BEAT_S
        )

    def said(self) -> dict[str, Any]:
        tried = [peer for peer in self._peers.values() if peer.keeping is not None]
        return Said(
            direct={peer.name: peer.ms for peer in tried if peer.ms is not None},
            relayed={peer.name: peer.why for peer in tried if peer.ms is None},
            received=self._listening.received,
        ).to_json()

    def _tell(self, kind: str, to: str, epoch: int, number: int, nbytes: int = 0) -> None:
        tensors = {"": Array.of_bytes(os.urandom(nbytes))} if nbytes else {}
        body = {"number": number}
        said = Frame(kind=kind, job=self._job, epoch=epoch, sender=self.name, to=to, body=body, tensors=tensors)
        self.relay(encode(said))

    # --- to a peer ---

    async def _keep(self, peer: _Peer) -> None:
        again_s = AGAIN_S / 2
        while True:
            try:
                await self._dial(peer)
                peer.why = "it has hung up"
            except (grpc.aio.AioRpcError, ConnectionError, TimeoutError, Malformed) as error:
                said = error.details() if isinstance(error, grpc.aio.AioRpcError) else error
                peer.why = str(said or type(error).__name__)
                log.warning("%s at %s: by way of the broker: %s", peer.name, peer.reach.address, peer.why)
            again_s = min(MOST_S, 2 * again_s) if peer.ms is None else AGAIN_S
            self._broken(peer)
            await asyncio.sleep(again_s)

    async def _dial(self, peer: _Peer) -> None:
        """Returns when it hangs up, raises where the line ends otherwise."""
        reach = peer.reach
        own = Credentials(certificate=reach.certificate.encode()) if reach.certificate else None
        async with contextlib.AsyncExitStack() as stack:
            channel = await stack.enter_async_context(channel_to(reach.address, own))
            shown_ = (("name", self.name), ("token", reach.secret))
            call = channel.stream_stream(METHOD)(slowed(self._pieces(peer), self.up), metadata=shown_)
            try:
                async with asyncio.timeout(DIAL_S):
                    welcome = WELCOME in dict(await call.initial_metadata() or ())
            except TimeoutError:
                raise TimeoutError(f"no answer within {DIAL_S:g} s") from None
            if not welcome:
                raise ConnectionError(await call.details() or "it does not let this provider in")
            reading = asyncio.create_task(self._acknowledged(call, peer))
            stack.callback(reading.cancel)
            measuring = asyncio.create_task(self._measured(peer))
            stack.callback(measuring.cancel)
            await asyncio.wait({reading, measuring}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                peer.ms = await measuring
                log.info(
                    "%s at %s: a probe takes %.3g ms, by way of the broker %.3g", peer.name, reach.address, *peer.ms
                )
            await reading

    async def _pieces(self, peer: _Peer) -> AsyncIterator[bytes]:
        while True:
            for piece in pieces(await peer.unsaid.get()):
                self.meter.nbytes += len(piece)
                yield piece

    async def _acknowledged(self, call: Any, peer: _Peer) -> None:
        async for _ in call:
            if not peer.unknown:
                raise Malformed("it acknowledges what it was not sent")
            waiting = peer.unknown.popleft()[-1]
            if waiting is not None and not waiting.done():
                waiting.set_result(None)

    async def _measured(self, peer: _Peer) -> tuple[float, float | None]:
        """ms of a probe and its acknowledgement, here and by way of the broker, whose answer may fail to come. Slower,
        or TimeoutError, for a line that is no use."""
        here = by_broker = math.inf
        async with self._alone:
            begun_s = time.monotonic()
            for _ in range(ROUNDS):
                here = min(here, await self._took(lambda waiting: self._probe(peer, waiting)))
                by_broker = min(by_broker, await self._took(lambda waiting: self._probe_round(peer, waiting)))
                if time.monotonic() > begun_s + ROUNDS_S:
                    break
        if here == math.inf:
            raise TimeoutError(f"a probe of {PROBE_BYTES >> 10} KiB takes more than {PROBE_S:g} s")
        if here > NOISE * by_broker + NOISE_MS:
            raise Slower(f"a probe takes {here:.3g} ms, by way of the broker {by_broker:.3g}")
        return here, None if by_broker == math.inf else by_broker

    async def _took(self, probe: Callable[[asyncio.Future[None]], None]) -> float:
        """ms; infinity where it takes too long."""
        waiting = asyncio.get_running_loop().create_future()
        begun_s = time.monotonic()
        probe(waiting)
        try:
            async with asyncio.timeout(PROBE_S):
                await waiting
        except TimeoutError:
            return math.inf
        return (time.monotonic() - begun_s) * 1e3

    def _probe(self, peer: _Peer, waiting: asyncio.Future[None]) -> None:
        tensors = {"": Array.of_bytes(os.urandom(PROBE_BYTES))}
        peer.say(-1, encode(Frame(kind=PROBE, sender=self.name, to=peer.name, tensors=tensors)), waiting)

    def _probe_round(self, peer: _Peer, waiting: asyncio.Future[None]) -> None:
        self._count += 1
        self._round = (self._count, waiting)
        self._tell(PROBE, peer.name, self._epoch, self._count, PROBE_BYTES)

    def _broken(self, peer: _Peer) -> None:
        """What is not known to have arrived goes by way of the broker, if it is of this epoch."""
        left = [data for epoch, data, _ in peer.unknown if epoch == self._epoch]
        peer.ms, peer.unsaid = None, asyncio.Queue()
        peer.unknown.clear()
        for data in left:
            self.relay(data)

    def _forget(self, peer: _Peer) -> None:
        if peer.keeping is not None:
            peer.keeping.cancel()
        self._broken(peer)
