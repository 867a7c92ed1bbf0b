"""Buckets cover every tensor once and keep their cap; a flat buffer is its tensors, side by side."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmsys.comm.buckets import ALIGNMENT, Flat, buckets

SIZES = [3, 50, 7, 1, 1, 99, 20, 0, 64, 12, 31]


@pytest.mark.parametrize("cap", [1, 10, 64, 100, 10**6])
@pytest.mark.parametrize("first", [None, 5])
def test_buckets_cover_all_in_the_order_of_the_backward_pass(cap: int, first: int | None) -> None:
    found = buckets(SIZES, cap, first_bytes=first)
    assert list(itertools.chain(*found)) == list(reversed(range(len(SIZES))))


@pytest.mark.parametrize("cap", [1, 10, 64, 100])
def test_only_a_tensor_that_is_larger_alone_exceeds_the_cap(cap: int) -> None:
    for bucket in buckets(SIZES, cap):
        assert sum(SIZES[i] for i in bucket) <= cap or sum(SIZES[i] > 0 for i in bucket) == 1


@pytest.mark.parametrize("cap", [10, 64, 100])
def test_no_bucket_is_closed_early(cap: int) -> None:
    """Greedy: the first tensor of the next one did not fit any more."""
    found = buckets(SIZES, cap)
    for bucket, following in itertools.pairwise(found):
        assert sum(SIZES[i] for i in bucket) + SIZES[following[0]] > cap


def test_the_first_bucket_may_be_small() -> None:
    assert buckets([4, 4, 4, 4], 8, first_bytes=4) == [[3], [2, 1], [0]]
    assert buckets([], 8) == []
    with pytest.raises(ValueError, match="positive"):
        buckets([1], 0)


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (), (7,), (2, 3, 4), (0,), (1,)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pack_and_unpack_are_inverse(dtype: torch.dtype) -> None:
    """Also of tensors that are not contiguous."""
    given = tensors(dtype)
    given[0] = given[0].t().contiguous().t()
    flat = Flat(given)
    flat.pack(given)
    taken = [torch.zeros_like(tensor) for tensor in given]
    flat.unpack(taken)
    assert all(torch.equal(a, b) for a, b in zip(given, taken, strict=True))


def test_views_share_the_buffer_s_memory_and_nothing_else_s() -> None:
    """What is done to the buffer is done to each view, and a view is aligned, whatever stands before it."""
    given = tensors()
    flat = Flat(given)
    flat.pack(given)
    flat.buffer.mul_(2)
    for tensor, view in zip(given, flat.views, strict=True):
        assert torch.equal(view, 2 * tensor)
        assert (view.data_ptr() - flat.buffer.data_ptr()) % ALIGNMENT == 0
    assert flat.buffer.is_contiguous()


def test_gaps_stay_zero_so_that_the_sum_over_the_buffer_is_the_sum_over_its_tensors() -> None:
    """Norms and reductions need no mask."""
    given = tensors(torch.float64)
    flat = Flat(given)
    assert flat.pack(given).sum() == pytest.approx(sum(float(tensor.sum()) for tensor in given))
    assert flat.buffer.numel() > sum(tensor.numel() for tensor in given), "there are gaps in this case"


def test_the_sum_of_packed_buffers_is_the_packed_sum() -> None:
    """The property by which a bucket can be all-reduced."""
    one, two = tensors(), [tensor * 3 for tensor in tensors()]
    flat, other = Flat(one), Flat(two)
    total = flat.pack(one) + other.pack(two)
    expected = Flat(one).pack([a + b for a, b in zip(one, two, strict=True)])
    assert torch.equal(total, expected)


def test_it_can_travel_in_another_dtype() -> None:
    given = [torch.tensor([1.0, 1 + 2**-12])]
    flat = Flat(given, dtype=torch.bfloat16)
    flat.pack(given)
    flat.unpack(given)
    assert flat.buffer.element_size() == 2
    assert given[0].tolist() == [1.0, 1.0]


def test_parameters_are_packed_without_a_graph() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    flat = Flat([parameter])
    assert not flat.pack([parameter]).requires_grad
    flat.buffer.fill_(2)
    flat.unpack([parameter])
    assert parameter.tolist() == [2, 2, 2]


def test_mixed_tensors_and_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"float16.*float32"):
        Flat([torch.ones(1), torch.ones(1, dtype=torch.float16)])
    with pytest.raises(ValueError, match="none"):
        Flat([])
    with pytest.raises(AssertionError, match="shapes"):
        Flat([torch.ones(2, 3)]).pack([torch.ones(3)])
