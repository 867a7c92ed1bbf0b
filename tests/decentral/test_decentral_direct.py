"""Lines between providers, past the broker: who may come in, what is measured, and what becomes of frames when one
breaks. Real gRPC on loopback, in one loop; the whole job is in `test_decentral_direct_job`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest

from llmsys.comm.place import listen
from llmsys.decentral import credentials, direct, link
from llmsys.decentral.direct import Direct
from llmsys.decentral.door import Door
from llmsys.decentral.fleet import Provider
from llmsys.decentral.hub import hello_of
from llmsys.decentral.link import WELCOME, Credentials, channel_to
from llmsys.decentral.pieces import Direction, Joined, pieces, slowed
from llmsys.decentral.reach import PROBE, REACH, Directory, Reach, Said, shown
from llmsys.decentral.stage_work import AHEAD
from llmsys.decentral.wire import BROKER, Frame, Malformed, decode, encode, header

LOCAL = Door(host="127.0.0.1", port=0)


def free_port() -> int:
    descriptor, port = listen("127.0.0.1")
    os.close(descriptor)
    return port


def run(test: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.01)


def said(sender: str, to: str, number: int, epoch: int = 1) -> bytes:
    return encode(Frame(kind=AHEAD, epoch=epoch, sender=sender, to=to, micro_batch=number))


class Together:
    """Providers' lines, with a broker that passes frames on at once. `heard` past it, and `relayed` by it: (to, number)
    of each frame."""

    def __init__(self) -> None:
        self.lines: dict[str, Direct] = {}
        self.heard: list[tuple[str, int]] = []
        self.relayed: list[tuple[str, int]] = []
        self.deaf = False  # probes are lost

    def made(self, name: str, door: Door = LOCAL) -> Direct:
        self.lines[name] = Direct(name, door, self._heard, self._relay)
        return self.lines[name]

    def _heard(self, data: bytes) -> None:
        frame = decode(data)
        self.heard.append((frame.to, frame.micro_batch))

    def _relay(self, data: bytes) -> None:
        head = header(data)
        if head["kind"] == AHEAD:
            self.relayed.append((head["to"], head["micro_batch"]))
        elif head["to"] in self.lines and not self.deaf:
            asyncio.get_running_loop().call_soon(self.lines[head["to"]].hear, data)

    def introduce(self, name: str, reaches: dict[str, Reach], epoch: int = 1) -> None:
        """As the broker does with a plan; and a step begins."""
        directory = Directory()
        for each, reach in {name: self.lines[name].reach, **reaches}.items():
            directory.join(each, reach)
        for kind, body in (("plan", {}), (REACH, directory.of(name, [*reaches])), ("begin", {})):
            assert body is not None
            frame = Frame(kind=kind, epoch=epoch, sender=BROKER, to=name, body=body)
            assert self.lines[name].hear(encode(frame)) == (kind == REACH)  # the others are the provider's to hear


@contextlib.asynccontextmanager
async def pair(door: Door = LOCAL) -> AsyncIterator[tuple[Together, Direct, Direct]]:
    own = Together()
    async with own.made("a") as a, own.made("b", door) as b:
        own.introduce("a", {"b": b.reach})
        yield own, a, b


async def up(own: Together, name: str, to: str) -> None:
    own.lines[name].say(to, 1, said(name, to, 0))
    await until(lambda: to in own.lines[name].said()["direct"])


def test_frames_go_by_the_broker_until_a_line_is_up_and_then_past_it() -> None:
    async def test() -> None:
        async with pair() as (own, a, b):
            await up(own, "a", "b")
            assert own.relayed == [("b", 0)]  # the first was not kept waiting
            for number in range(1, 6):
                a.say("b", 1, said("a", "b", number))
            assert a.busy
            await until(lambda: len(own.heard) == 5)
            assert own.heard == [("b", number) for number in range(1, 6)]
            assert len(own.relayed) == 1
            assert b.said()["received"]["a"] > direct.PROBE_BYTES
            ((here_ms, by_broker_ms),) = a.said()["direct"].values()
            assert here_ms > 0
            assert by_broker_ms > 0

    run(test())


def test_what_nothing_may_overtake_goes_by_the_broker() -> None:
    """Before a step has begun in an epoch; and what is still said of another."""

    async def test() -> None:
        async with pair() as (own, a, b):
            await up(own, "a", "b")
            a.say("b", 2, said("a", "b", 1, epoch=2))
            own.introduce("a", {"b": b.reach}, epoch=2)
            a.say("b", 1, said("a", "b", 2))
            a.hear(encode(Frame(kind="plan", epoch=3, sender=BROKER, to="a")))
            a.say("b", 2, said("a", "b", 3, epoch=2))
            own.introduce("a", {"b": b.reach}, epoch=3)
            a.say("b", 3, said("a", "b", 4, epoch=3))  # the line is still the same
            await until(lambda: bool(own.heard))
            assert own.heard == [("b", 4)]
            assert own.relayed == [("b", each) for each in range(4)]

    run(test())


def test_what_a_line_had_not_delivered_when_it_broke_goes_by_the_broker() -> None:
    """All that is not acknowledged, in its order, if it is of this epoch."""

    async def talk(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        await context.send_initial_metadata(((WELCOME, "1"),))
        joined = Joined()
        async for piece in requests:
            if (data := joined.add(piece)) is None:
                continue
            head = header(data)
            if head["micro_batch"] == 4:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "it broke")
            if head["kind"] == PROBE or head["micro_batch"] < 3:
                yield b""

    async def test() -> None:
        own = Together()
        async with own.made("a") as a, own.made("b"), listener(talk) as reach:
            own.introduce("a", {"b": reach})
            await up(own, "a", "b")
            for number in range(1, 6):
                a.say("b", 1, said("a", "b", number))
            await until(lambda: "it broke" in a.said()["relayed"].get("b", ""))
            assert own.relayed == [("b", each) for each in (0, 3, 4, 5)]
            assert not a.busy
            a.say("b", 1, said("a", "b", 6))
            assert own.relayed[-1] == ("b", 6)

    run(test())


@contextlib.asynccontextmanager
async def listener(talk: Callable[..., AsyncIterator[bytes]]) -> AsyncIterator[Reach]:
    """Somebody who listens as a provider does, and does otherwise."""
    server = grpc.aio.server()
    service, method = direct.METHOD[1:].split("/")
    handlers = {method: grpc.stream_stream_rpc_method_handler(talk)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield Reach(address=f"127.0.0.1:{port}", secret="any")
    finally:
        await server.stop(None)


def test_one_that_goes_hangs_up() -> None:
    """What is said to it then is the broker's to know."""

    async def test() -> None:
        own = Together()
        async with own.made("a") as a:
            async with own.made("b") as b:
                own.introduce("a", {"b": b.reach})
                await up(own, "a", "b")
            await until(lambda: a.said()["relayed"] == {"b": "it has hung up"})
            a.say("b", 1, said("a", "b", 1))
            assert own.relayed == [("b", 0), ("b", 1)]

    run(test())


def test_a_line_that_is_slower_than_the_way_round_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        await context.send_initial_metadata(((WELCOME, "1"),))
        joined = Joined()
        async for piece in requests:
            if joined.add(piece) is not None:
                await asyncio.sleep(0.6)
                yield b""

    async def test() -> None:
        own = Together()
        async with own.made("a") as a, own.made("b"), listener(talk) as reach:
            own.introduce("a", {"b": reach})
            a.say("b", 1, said("a", "b", 0))
            await until(lambda: "by way of the broker" in a.said()["relayed"]["b"])
            monkeypatch.setattr(direct, "PROBE_S", 0.7)  # and where the broker does not answer it is
            own.deaf = True
            own.introduce("a", {})
            own.introduce("a", {"b": reach})
            await up(own, "a", "b")
            assert a.said()["direct"]["b"][1] is None

    run(test())


def test_who_cannot_be_reached_is_told_of_and_talked_to_by_the_broker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A port at which nobody listens, and one at which nobody answers."""
    monkeypatch.setattr(direct, "DIAL_S", 0.5)

    async def test() -> None:
        silent, port = listen("127.0.0.1")
        own = Together()
        async with own.made("a") as a:
            addresses = {"gone": f"127.0.0.1:{free_port()}", "mute": f"127.0.0.1:{port}"}
            own.introduce("a", {name: Reach(address=each, secret="any") for name, each in addresses.items()})
            for name in addresses:
                a.say(name, 1, said("a", name, 0))
            await until(lambda: "being tried" not in a.said()["relayed"].values())
            for name, address in addresses.items():
                a.say(name, 1, said("a", name, 1))
                assert f"{name} at {address}: by way of the broker: {a.said()['relayed'][name]}" in caplog.text
            assert a.said()["relayed"]["mute"] == "no answer within 0.5 s"
            assert own.relayed == [(name, number) for number in (0, 1) for name in addresses]
        os.close(silent)

    run(test())


async def dial(reach: Reach, name: str, token: str, given: Iterable[bytes]) -> tuple[grpc.StatusCode, int]:
    """How a stream of these pieces ends, and how many frames were acknowledged."""

    async def requests() -> AsyncIterator[bytes]:
        for each in given:
            yield each

    own = Credentials(certificate=reach.certificate.encode()) if reach.certificate else None
    async with channel_to(reach.address, own) as channel:
        call = channel.stream_stream(direct.METHOD)(requests(), metadata=(("name", name), ("token", token)))
        count = 0
        try:
            async for _ in call:
                count += 1
        except grpc.aio.AioRpcError as error:
            return error.code(), count
        return grpc.StatusCode.OK, count


def test_who_is_not_let_in(caplog: pytest.LogCaptureFixture) -> None:
    """A stranger; a peer in another's name; one that has shown its own and then speaks as another, to another, or of
    what is the broker's to say; and pieces that are none. Each loses its own line, and others notice nothing."""

    async def test() -> None:
        async with pair() as (own, a, b):
            await up(own, "a", "b")
            key = b.reach.secret
            good = [*pieces(said("c", "b", 1))]
            for name, token in (("c", ""), ("c", "guessed"), ("c", shown(key, "a")), ("c", key), ("", "")):
                assert await dial(b.reach, name, token, good) == (grpc.StatusCode.UNAUTHENTICATED, 0)
            assert b.counters == {"refused": 5, "malformed": 0}
            begin = encode(Frame(kind="begin", epoch=1, sender="c", to="b"))
            wrong = [said("a", "b", 2), said("c", "a", 2), begin, b"no frame", said("c", "b", 2)[:-1]]
            for given in ([*pieces(each)] for each in wrong):
                assert await dial(b.reach, "c", shown(key, "c"), given) == (grpc.StatusCode.INVALID_ARGUMENT, 0)
            assert await dial(b.reach, "c", shown(key, "c"), [*good, b"\2x"]) == (grpc.StatusCode.INVALID_ARGUMENT, 1)
            assert b.counters == {"refused": 5, "malformed": 6}
            assert own.heard == [("b", 1)]
            a.say("b", 1, said("a", "b", 3))
            await until(lambda: own.heard[1:] == [("b", 3)])
            assert not any(secret in caplog.text for secret in (key, shown(key, "a"), shown(key, "c")))

    run(test())


def test_beyond_loopback_a_peer_proves_by_its_certificate_who_it_is() -> None:
    """Whoever listens at its address with another is told nothing, the secret least of all."""
    port = free_port()
    door = Door.at(f"0.0.0.0:{port}", f"127.0.0.1:{port}")

    async def test() -> None:
        async with pair(door) as (own, a, b):
            await up(own, "a", "b")
            a.say("b", 1, said("a", "b", 1))
            await until(lambda: own.heard == [("b", 1)])
            certificate, _ = credentials.pair(["127.0.0.1"])
            own.introduce("a", {"b": dataclasses.replace(b.reach, certificate=certificate.decode())})
            a.say("b", 1, said("a", "b", 2))
            await until(lambda: a.said()["relayed"].get("b", "being tried") != "being tried")
            assert own.relayed == [("b", 0), ("b", 2)]
            assert b.counters["refused"] == 0

    run(test())


def test_all_lines_of_a_provider_share_what_its_line_carries() -> None:
    """Two streams of 40 KB over 800 kbit/s: 0.8 s, and not 0.4."""

    async def stream() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield bytes(4000)

    async def test() -> None:
        way, loop = Direction(0.8, 0.0), asyncio.get_running_loop()
        begun = loop.time()

        async def drained() -> int:
            return sum([len(each) async for each in slowed(stream(), way)])

        assert await asyncio.gather(drained(), drained()) == [40_000, 40_000]
        assert loop.time() - begun > 0.6

    run(test())


@pytest.mark.parametrize(
    ("reach", "why"),
    [
        ({"address": "203.0.113.7:7", "secret": "s", "certificate": ""}, "beyond loopback a certificate is needed"),
        ({"address": "127.0.0.1", "secret": "s", "certificate": ""}, "must be HOST:PORT"),
        ({"address": "127.0.0.1:7", "secret": "", "certificate": ""}, "a secret or a certificate that is none"),
        ({"address": "127.0.0.1:7", "secret": 7, "certificate": ""}, "are texts"),
        (["127.0.0.1:7"], "must be an address, a secret and a certificate"),
    ],
)
def test_an_address_that_is_none_is_no_hello(reach: object, why: str) -> None:
    machine = Provider(name="p", tflops=1, mem_gib=1, up_mbit=1, down_mbit=1)
    good = decode(link.hello(machine, "life", Reach(address="127.0.0.1:7", secret="s")))
    assert hello_of(encode(good))[2] == Reach(address="127.0.0.1:7", secret="s")
    with pytest.raises(Malformed, match=why):
        hello_of(encode(dataclasses.replace(good, body={**good.body, REACH: reach})))


def test_what_providers_say_of_their_lines_is_checked_and_added_up() -> None:
    own = Directory()
    for life in ((5, 9), (2, 3)):
        own.join("p", None)
        for received in life:
            own.hear("p", Said(received={"q": received}).to_json(), {"p", "q", "r"})
    assert own.carried == {"q": 9 + 3}
    good = Said(direct={"q": (1.0, None)}, relayed={"r": "why"}, received={"q": 1})
    own.hear("p", good.to_json(), {"p", "q", "r"})
    assert own.said["p"] == good
    many = dict.fromkeys(map(str, range(999)), 1)
    for key, wrong in (("received", {"q": -1}), ("received", {"q": "1"}), ("direct", {"q": [float("inf"), 1]}),
                       ("direct", {"q": 1}), ("relayed", 7), ("received", many), ("received", {"q": 10**400}),
                       ("received", {"z": 1})):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            own.hear("p", {**good.to_json(), key: wrong}, {"p", "q", "r"})
    assert own.said["p"] == good
    with pytest.raises(KeyError):
        own.hear("p", {}, {"p", "q", "r"})


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--direct", "here"], "--direct here: must be HOST:PORT"),
        (["--direct", "0.0.0.0:7"], "--direct 0.0.0.0:7: nobody can dial that; say by which address with --direct-as"),
        (
            ["--direct-as", "home.example.org:7"],
            "--direct-as home.example.org:7: of what listens at --direct HOST:PORT",
        ),
        (["--direct", "0.0.0.0:7", "--direct-as", "home.example.org:0"], "--direct-as home.example.org:0: must be"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, words: list[str], line: str) -> None:
    token = tmp_path / "token"
    token.write_text("any")
    command = [
        sys.executable,
        "-m",
        "llmsys.decentral",
        "provider",
        "--join",
        "127.0.0.1:1",
        "--token-file",
        str(token),
    ]
    done = subprocess.run(
        [*command, "--tflops", "1", "--mem-gib", "1", *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    (said_,) = done.stderr.strip().splitlines()
    assert line in said_
