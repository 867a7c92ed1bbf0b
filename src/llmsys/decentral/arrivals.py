"""What comes to a provider for one of its stages, looked at: it is from whoever has the stage that it comes from."""

from __future__ import annotations

from collections.abc import Mapping

from llmsys.decentral.codecs import SCALES
from llmsys.decentral.cut import Stage
from llmsys.decentral.holdings import Place
from llmsys.decentral.stage_work import AHEAD, BACK, INPUT, SHARED, Sent
from llmsys.decentral.wire import Frame


def sent(frame: Frame) -> tuple[Place, Sent]:
    """What it carries, and for which stage."""
    place = (int(frame.body["cutting"]), int(frame.body["stage"]))
    absent = tuple(frame.body.get("absent", ()))
    return place, Sent(to=place[1], kind=frame.kind, step=frame.step, micro_batch=frame.micro_batch,
                       arrays=frame.tensors, absent=absent)  # fmt: skip


def checked(frame: Frame, stage: Stage, peers: Mapping[int, str]) -> None:
    """ValueError where what goes between stages is not from whoever of `peers` has the one that it comes from."""
    if frame.kind == INPUT:
        return  # it is the broker's, which has been looked at
    from_ = {AHEAD: stage.receives, BACK: stage.sends, SHARED: stage.hears}.get(frame.kind)
    for name in (*frame.tensors, *frame.body.get("absent", ())):
        own = name.removesuffix(SCALES)
        if from_ is None:  # a value, of whoever owns the parameter: the first to read it
            senders = {peer for at, peer in peers.items() if at < stage.index}
        else:
            senders = {peers[from_[own]]} if own in from_ and from_[own] in peers else set()
        if frame.sender not in senders:
            raise ValueError(f"{frame.kind} {name}: is not from {frame.sender}")
