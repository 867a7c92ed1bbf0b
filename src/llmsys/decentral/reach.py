"""Where providers are reached by their peers, as far as they want to be, and what the broker hands on of that.

A provider that listens draws a key, and tells the broker alone. Each of its peers is handed what that key makes of the
peer's own name, so that none can come in another's; and the certificate that it is to find there. None of this is part
of the broker's state, and so it is in no log and in no status.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import hmac
from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from llmsys.decentral.credentials import address
from llmsys.decentral.stage_work import INPUT, KINDS

BETWEEN = frozenset({*KINDS, "state"} - {INPUT})
"""What providers say to each other."""
PROBE, PROBED = "probe", "probed"
"""To a peer by way of the broker, and its answer: what the way round takes."""
REACH = "reach"
"""Of the frame by which the broker tells where peers are reached; and of what a provider says of itself, first and in
its signs of life."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
LINES = 256
"""More peers than any provider has."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """`address`: host and port. `secret`: of a provider its key; of what a peer is handed, what that has to show.
    `certificate`: PEM, empty on loopback alone. ValueError for what cannot be."""

    address: str
    secret: str = field(repr=False)
    certificate: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if not all(isinstance(each, str) and each.isascii() for each in (self.address, self.secret, self.certificate)):
            raise ValueError("an address, a secret and a certificate are texts, in ASCII")
        host, _ = address("a peer's address", self.address, any_port=False)
        if len(self.address) > 256:
            raise ValueError(f"{self.address[:64]}: and so on, which is no host")
        if not self.certificate and host not in LOOPBACK:
            raise ValueError(f"{self.address}: beyond loopback a certificate is needed")
        if not self.secret or len(self.secret) > 256 or len(self.certificate) > 64 << 10:
            raise ValueError(f"{self.address}: a secret or a certificate that is none")

    @classmethod
    def of_json(cls, data: Any) -> Self:
        if not isinstance(data, Mapping) or set(data) != {"address", "secret", "certificate"}:
            raise ValueError("where it is reached: must be an address, a secret and a certificate")
        return cls(**data)

    def of(self, peer: str) -> Reach:
        """As it is handed to that peer."""
        return Reach(address=self.address, secret=shown(self.secret, peer), certificate=self.certificate)


def shown(key: str, peer: str) -> str:
    """What a peer of that name has to show to whoever has drawn the key."""
    return hmac.new(key.encode(), peer.encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Said:
    """By a provider of its lines: of peers it reaches, ms of a probe there and by way of the broker (None: that took
    too long); why it does not reach others; bytes that came from each."""

    direct: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)
    relayed: Mapping[str, str] = field(default_factory=dict)
    received: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"direct": {name: list(each) for name, each in self.direct.items()}, "relayed": dict(self.relayed),
                "received": dict(self.received)}  # fmt: skip

    @property
    def all(self) -> set[str]:
        """Peers that it says something of."""
        return {*self.direct, *self.relayed, *self.received}

    @classmethod
    def of_json(cls, data: Any) -> Self:
        """ValueError, KeyError or TypeError for what nobody says."""
        direct, relayed, received = (dict(data[key]) for key in ("direct", "relayed", "received"))
        if max(map(len, (direct, relayed, received))) > LINES:
            raise ValueError("more lines than there are peers")
        times = {str(name): (_positive(ms), None if by is None else _positive(by)) for name, (ms, by) in direct.items()}
        why = {str(name): str(each)[:200] for name, each in relayed.items()}
        return cls(direct=times, relayed=why, received={str(n): int(_positive(each)) for n, each in received.items()})


def _positive(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value < 2**53:
        raise ValueError("must be 0 or more, and a number of bytes or of ms")
    return value


class Directory:
    """What the broker knows of all that, by provider. `carried`: bytes that went past the broker, by who sent them, as
    those say who received them."""

    def __init__(self) -> None:
        self.reaches: dict[str, Reach] = {}
        self.said: dict[str, Said] = {}
        self.carried: collections.Counter[str] = collections.Counter()

    def join(self, name: str, reach: Reach | None) -> None:
        """A provider that has dialled, and listens there, or does not."""
        self.said.pop(name, None)
        self.reaches.pop(name, None)
        if reach is not None:
            self.reaches[name] = reach

    def of(self, name: str, others: Collection[str]) -> dict[str, Any] | None:
        """What a provider is told of others; None for one that takes no part."""
        if name not in self.reaches:
            return None
        there = sorted(each for each in others if each != name and each in self.reaches)
        return {each: dataclasses.asdict(self.reaches[each].of(name)) for each in there}

    def hear(self, name: str, data: Any, known: Container[str]) -> None:
        """In a sign of life, of peers that are `known`. ValueError, KeyError or TypeError for what nobody says."""
        said = Said.of_json(data)
        if strangers := {each for each in said.all if each not in known}:
            raise ValueError(f"{min(strangers)[:64]}: nobody of that name has come")
        before = self.said.get(name, Said()).received
        for peer, count in said.received.items():
            self.carried[peer] += max(0, count - before.get(peer, 0))
        self.said[name] = said
