"""How often a method asks for something: on a GPU each small call costs as much as a large one, and one that needs an
answer waits for all before it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from simulated import Ranks, random_grads
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmsys.compress import bits
from llmsys.compress.config import CompressConfig
from llmsys.compress.methods import sparse
from llmsys.compress.orthogonal import orthonormal_, together_

MANY = {f"w{i}": (17 + i, 5) for i in range(30)}


class Calls(TorchDispatchMode):
    """`found`: operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def step(method: str, world: int) -> Counter[str]:
    """Of all ranks together, in a step of 30 tensors in one bucket."""
    ranks, calls = Ranks(CompressConfig(method=method, density=0.1), world, MANY), Calls()
    grads = random_grads(world, 0, MANY, torch.float32)
    with calls:
        ranks.step(grads)
    return calls.found


def test_what_ranks_have_chosen_is_added_rank_by_rank() -> None:
    """Not tensor by tensor of each, 120 calls on each of the four; once a tensor it is taken from what is kept."""
    assert step("topk", 4)["index_add_"] == 4 * (4 + 30)


def test_signs_of_a_rank_are_looked_up_all_together() -> None:
    """Once a rank to decode them, and once a tensor for what is left of it."""
    assert step("efsign", 4)["index"] == 4 * (4 + 30)


def test_bits_of_many_tensors_are_those_of_each() -> None:
    """Whichever of them a piece of bytes is of, and in which bit of a byte they end."""
    sizes = [1, 8 * bits.AT_ONCE + 3, 7, 16, 8 * bits.AT_ONCE, 9]
    generator = torch.Generator().manual_seed(0)
    shapes = {str(i): (size,) for i, size in enumerate(sizes)}
    grads = [{name: torch.randn(*n, generator=generator) for name, n in shapes.items()} for _ in range(3)]
    found = Ranks(CompressConfig(method="efsign"), 3, shapes).step(grads)[2]
    for name in shapes:
        signs = [torch.where(rank[name] >= 0, 1.0, -1.0) * (rank[name].abs().mean() / 3) for rank in grads]
        torch.testing.assert_close(found[name], signs[0] + signs[1] + signs[2])


@pytest.mark.parametrize("pieces", [1, 7])
def test_a_threshold_is_waited_for_once(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pieces there are: `nonzero` waits for the number of what it finds, `item` and `tolist` for all."""
    monkeypatch.setattr(sparse, "PIECE", 1 << 10)
    x = torch.randn(pieces << 10, generator=torch.Generator().manual_seed(0))
    waited, tolist, calls = [], Tensor.tolist, Calls()
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: waited.append(1) or tolist(tensor))  # type: ignore[func-returns-value]
    with calls:
        assert len(sparse.above(x, 20, torch.Generator().manual_seed(0))) == 20
    assert calls.found["nonzero"] + calls.found["_local_scalar_dense"] + len(waited) == 1


def test_factors_of_one_shape_are_made_orthonormal_in_one_call() -> None:
    """As they would be one by one; also where they are all zero."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 30), (4, 30), (2, 50), (4, 30), (1, 1), (2, 50)]
    factors = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    factors[1].zero_()
    wanted = [rows.clone() for rows in factors]
    for rows in wanted:
        orthonormal_(rows)
    calls = Calls()
    with calls:
        together_(factors)
    assert calls.found["linalg_qr"] == 3
    for found, one in zip(factors, wanted, strict=True):
        torch.testing.assert_close(found, one, rtol=0, atol=1e-12)
