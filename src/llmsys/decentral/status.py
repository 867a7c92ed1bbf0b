"""What a broker says of its job to whoever asks: plain JSON."""

from __future__ import annotations

from typing import Any

from llmsys.decentral import queued
from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.reach import Said


def status(own: Coordinator, now: float) -> dict[str, Any]:
    """The job, and of each provider what it does, what it has done, and how long it has been silent. `loss`: of the
    last step; None before it, and where nothing is trained. `direct`: peers that it talks to past the broker, with the
    ms of a probe there and by way of the broker; `direct_mib`: what it sent there, as these say; `relayed`: peers that
    it does not reach so, and why. `queue`: of which the job is one, or None."""
    state = own.state
    order = own.owners if state.plan is not None else []
    pool = {state.providers[p].name for p in state.plan.spares} if state.plan is not None else set()
    last, given = own.updates.get(state.step), own.accounts.to_json()

    def said(name: str) -> Said:
        return own.directory.said.get(name, Said()) if name in state.present else Said()

    def role(name: str) -> str:
        if name not in state.present:  # of those that have gone the plan may still speak
            return "gone"
        return "stage" if name in order else "pool" if name in pool else "there"

    return {
        "step": state.step,
        "steps": own.training.steps,
        "epoch": state.epoch,
        "phase": state.phase if state.plan is not None else "waiting for providers",
        "loss": last.loss if last is not None and last.losses else None,
        "steps_per_s": state.step / now if now > 0 else 0.0,
        "steps_again": own.again,
        "astray": own.restarts.astray,
        "counters": dict(own.counters),
        "refusals": list(own.refusals),
        "checks": {**own.checks.counts(), "found": own.checks.verdicts[-10:]},
        "queue": queued.state(),
        "providers": {
            each.name: {
                "stage": order.index(each.name) if each.name in order else None,
                "role": role(each.name),
                "plane": each.plane,
                **given[each.name],
                "checked": own.checks.checked[each.name],
                "direct": {peer: list(ms) for peer, ms in said(each.name).direct.items()},
                "direct_mib": own.directory.carried[each.name] / 2**20,
                "relayed": dict(said(each.name).relayed),
                "silent_s": max(0.0, now - state.heard_s[each.name]) if each.name in state.heard_s else None,
            }
            for each in state.providers
        },
    }
