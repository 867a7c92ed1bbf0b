"""An iteration's time: what is hidden and what is not, by identities that hold for any buckets."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from llmsys.compress.timeline import Bucket, Round, Timeline, play

SEEDS = range(20)


def buckets(seed: int) -> list[Bucket]:
    """Of one or two rounds each, with times and sizes of all orders."""
    source = random.Random(seed)

    def number() -> float:
        return 10 ** source.uniform(-3, 0)

    return [
        Bucket(
            backward_s=number(),
            rounds=tuple(
                Round(kind="all_reduce", nbytes=number(), before_s=number(), during_s=number())
                for _ in range(source.choice([1, 2]))
            ),
            after_s=number(),
        )
        for _ in range(source.randrange(1, 8))
    ]


def link(beta_s: float, alpha_s: float = 0.0) -> Callable[[str, float], float]:
    return lambda kind, nbytes: alpha_s + beta_s * nbytes


def computed(found: Timeline) -> float:
    return found.forward_s + found.backward_s + found.compress_s + found.decompress_s


def test_two_buckets_by_hand() -> None:
    """The second message waits for the first: device 1 + 2 + 1 + 2 + 1 = 7, link 4..9 and 9..14, then 2 x 1."""
    bucket = Bucket(backward_s=2, rounds=(Round(kind="all_reduce", nbytes=5, before_s=1),), after_s=1)
    found = play(1, [bucket, bucket], link(1))
    assert (found.total_s, found.wire_s, found.exposed_s) == (15, 10, 6)  # decompression of the first is hidden


def test_second_rounds_wait_for_the_last_bucket_and_go_in_order() -> None:
    """First rounds on the link 1..3 and 3..5; second ones asked for at 3 + 1 and 5 + 1, on the link 5..7 and 7..9."""
    rounds = (Round(kind="all_reduce", nbytes=2), Round(kind="all_reduce", nbytes=2, before_s=1))
    bucket = Bucket(backward_s=1, rounds=rounds)
    assert play(0, [bucket, bucket], link(1)).total_s == 9


@pytest.mark.parametrize("seed", SEEDS)
def test_an_instant_link_costs_nothing(seed: int) -> None:
    found = play(1.0, buckets(seed), link(0))
    assert found.total_s == pytest.approx(computed(found))
    assert found.wire_s == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_without_overlap_an_iteration_is_the_sum_of_its_parts_and_with_it_no_more(seed: int) -> None:
    given = buckets(seed)
    alone = play(1.0, given, link(1, 0.01), overlap=False)
    together = play(1.0, given, link(1, 0.01))
    assert alone.total_s == pytest.approx(computed(alone) + alone.wire_s)
    rounding = 1e-12
    assert max(together.device_s, together.wire_s) - rounding <= together.total_s <= alone.total_s + rounding
    assert (together.wire_s, together.device_s) == (alone.wire_s, alone.device_s)


@pytest.mark.parametrize("seed", SEEDS)
def test_more_bandwidth_is_never_slower(seed: int) -> None:
    given = buckets(seed)
    totals = [play(1.0, given, link(beta)).total_s for beta in (0, 0.1, 0.5, 1, 2, 10)]
    assert totals == sorted(totals)
