"""One data-parallel iteration in time: wait-free back-propagation with one device and one link (arXiv 2306.08881).

The device does everything that is computed, one thing after another: the forward pass, the backward pass bucket by
bucket, compression as soon as a bucket is there, decompression. The link carries one message after another, in the
order in which they are asked for:

    asked(i)   = when the device has made message i
    sent(i)    = max(asked(i), arrived(i - 1))
    arrived(i) = sent(i) + seconds(i)

What a method does while its message is on the wire (error feedback) takes the device's time as well. Second rounds come
when the last bucket's first has been asked for, in the order of the buckets, each when its first round has arrived;
decompression comes last, each bucket when its last message has arrived. Times are seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Round:
    """A collective over a tensor of `nbytes`. `before_s`: of the device, to make the message; `during_s`: of the
    device, from then on, without waiting for it."""

    kind: str
    nbytes: float
    before_s: float = 0.0
    during_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Gradients that travel together. `backward_s`: from the last bucket's gradients to these; `after_s`: to make the
    mean of what has arrived."""

    backward_s: float
    rounds: tuple[Round, ...]
    after_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """How long an iteration takes, and of what. `wire_s`: of the link, hidden or not."""

    total_s: float
    forward_s: float
    backward_s: float
    compress_s: float
    decompress_s: float
    wire_s: float

    @property
    def device_s(self) -> float:
        """While the device computes."""
        return self.forward_s + self.backward_s + self.compress_s + self.decompress_s

    @property
    def exposed_s(self) -> float:
        """While the device waits for the link."""
        return self.total_s - self.device_s


@dataclass
class _Clock:
    """Until when device and link are busy."""

    seconds: Callable[[str, float], float]
    overlap: bool
    device: float
    link: float = 0.0
    carried: float = 0.0

    def ask(self, message: Round) -> float:
        """When the message that the device makes now will have arrived."""
        self.device += message.before_s
        took = self.seconds(message.kind, message.nbytes)
        self.link = max(self.link, self.device) + took
        self.carried += took
        if not self.overlap:
            self.device = self.link
        self.device += message.during_s
        return self.link


def play(
    forward_s: float, buckets: Sequence[Bucket], seconds: Callable[[str, float], float], *, overlap: bool = True
) -> Timeline:
    """An iteration whose collectives take `seconds(kind, nbytes)` each. Without `overlap` everything waits for
    everything, and the iteration is the sum of its parts."""
    clock = _Clock(seconds, overlap, forward_s)
    arrived = []
    for bucket in buckets:
        clock.device += bucket.backward_s
        arrived.append(clock.ask(bucket.rounds[0]))
    for i, bucket in enumerate(buckets):
        for message in bucket.rounds[1:]:
            clock.device = max(clock.device, arrived[i])
            arrived[i] = clock.ask(message)
    for i, bucket in enumerate(buckets):
        clock.device = max(clock.device, arrived[i]) + bucket.after_s
    return Timeline(
        total_s=clock.device,
        forward_s=forward_s,
        backward_s=sum(bucket.backward_s for bucket in buckets),
        compress_s=sum(message.before_s + message.during_s for bucket in buckets for message in bucket.rounds),
        decompress_s=sum(bucket.after_s for bucket in buckets),
        wire_s=clock.carried,
    )
