"""`train.recompute`: what each block computes again in the backward pass instead of keeping it.

    none      nothing
    mlp       the MLP keeps its input; its first products are computed again, the last one is not
    attn+mlp  attention keeps its input too
    block     the block keeps its input alone, and is computed again whole
    auto      the cheapest of these, block by block, that fits into the device's memory

One word is for all blocks. `mlp:8,none:24` is for the first 8 and the next 24; in T5 the encoder's blocks come first.
`mlp` and `attn+mlp` are cuts within a block, which only the methods `lora` and `lorafa` know how to make.
"""

from __future__ import annotations

import re

POLICIES = ("none", "mlp", "attn+mlp", "block")
"""From the least computed again to the most, each keeping less than the one before it."""
WITHIN = ("mlp", "attn+mlp")


KEY = "train.recompute"


def check(text: str, key: str = KEY) -> None:
    """ValueError for what is neither a policy, nor policies with counts, nor `auto`, which only `KEY` can be."""
    if text != "auto" or key != KEY:
        _runs(text, key)


def named(text: str) -> list[str]:
    """The policies that `text` names; none of `auto`."""
    return [] if text == "auto" else [policy for policy, _ in _runs(text)]


def policies(text: str, blocks: int, key: str = KEY) -> list[str]:
    """The policy of each of a model's `blocks`. ValueError where counts do not add up to them."""
    runs = _runs(text, key)
    if runs[0][1] is None:
        return [runs[0][0]] * blocks
    found = [policy for policy, count in runs for _ in range(count or 0)]
    if len(found) != blocks:
        raise ValueError(f"{key}={text}: counts {len(found)} blocks, and the model has {blocks}")
    return found


def text(policies: list[str]) -> str:
    """The shortest text that stands for these policies."""
    if len(set(policies)) <= 1:
        return policies[0] if policies else "none"
    runs: list[tuple[str, int]] = []
    for policy in policies:
        last = runs.pop() if runs and runs[-1][0] == policy else (policy, 0)
        runs.append((policy, last[1] + 1))
    return ",".join(f"{policy}:{count}" for policy, count in runs)


def _runs(text: str, key: str = KEY) -> list[tuple[str, int | None]]:
    parts = text.split(",")
    found: list[tuple[str, int | None]] = []
    for part in parts:
        policy, _, count = part.partition(":")
        if (
            policy not in POLICIES
            or (len(parts) > 1 and not count)
            or (count and not re.fullmatch("[1-9][0-9]*", count))
        ):
            known = ", ".join((*POLICIES, "auto") if key == KEY else POLICIES)
            raise ValueError(f"{key}={text}: must be one of {known}, or counts such as mlp:8,none:24")
        found.append((policy, int(count) if count else None))
    return found
