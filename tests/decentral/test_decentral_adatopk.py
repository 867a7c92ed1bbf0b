"""AdaTopK: the slowest line sends least, and a message is as long as it is planned to be."""

from __future__ import annotations

import pytest
import torch
from decentral_planning import chain, fleet

from llmsys.compress import decode, encode
from llmsys.decentral import adatopk
from llmsys.decentral.cost import Costs, Workload
from llmsys.decentral.plan import Planner


def test_the_slowest_line_sends_its_density_and_a_faster_one_as_much_more() -> None:
    seconds = {(0, 1): 8.0, (1, 2): 2.0, (2, 3): 0.2}
    assert adatopk.densities(seconds, 0.01, 4) == {(0, 1): 0.01, (1, 2): 0.04, (2, 3): pytest.approx(0.4)}
    after = {line: each * adatopk.factor(d, 4) for (line, d), each in zip(
        adatopk.densities(seconds, 0.01, 4).items(), seconds.values(), strict=True)}  # fmt: skip
    assert max(after.values()) == pytest.approx(min(after.values()))


def test_a_line_that_top_k_would_make_slower_is_left_whole() -> None:
    """A value and its place are 8 bytes: half of the elements in fp32, or a quarter in bf16, are as long as all."""
    assert adatopk.densities({(0, 1): 1.0, (1, 2): 0.1}, 0.06, 4) == {(0, 1): 0.06}
    assert adatopk.densities({(0, 1): 1.0}, 0.3, 2) == {}
    with pytest.raises(ValueError, match=r"density=0: must lie in \(0, 1\]"):
        adatopk.densities({(0, 1): 1.0}, 0, 4)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_message_is_as_long_as_planned(dtype: torch.dtype, width: int) -> None:
    x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    payload = encode(x, adatopk.config(0.02))
    assert payload.data.numel() == x.numel() * width * adatopk.factor(0.02, width)
    y = decode(payload, shape=x.shape)
    kept = y != 0
    assert int(kept.sum()) == 80
    assert torch.equal(y[kept], x[kept])
    assert x[kept].abs().min() >= x[~kept].abs().max()


def test_a_plan_behind_thin_lines_is_faster_compressed() -> None:
    own = Costs(chain(3, 20), fleet(3, 5, 20, roomy=2.5), Workload(micro_batches=32))
    planner = Planner(own)
    plain = planner.best(1)
    assert plain is not None
    assert len(plain.pipelines[0].order) > 1
    other, found, kept = adatopk.compressed(planner, plain, 0.05, 4)
    assert kept
    assert found.per_s >= plain.per_s
    (only,) = found.pipelines
    assert only.seconds == pytest.approx(other.costs.slowest_s(only.order, only.cuts))
    assert adatopk.line_seconds(own, plain), "lines without compression are what they were"
