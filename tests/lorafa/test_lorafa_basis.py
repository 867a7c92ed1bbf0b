"""A seed is a matrix: the same everywhere and for good, on the scale that learning rates were found on."""

from __future__ import annotations

import pytest
import torch
from adapter_harness import MLP, TARGETS
from torch import Tensor

from llmsys.lorafa import LoRAFAConfig, inject
from llmsys.lorafa.basis import Covariance, draw, fingerprint, weight_svd

PINNED = {
    "orthonormal": "4503b6566fb60cdd a2a764e5ad22aeb7",
    "gaussian": "1f03619707f191fd 3dec1d0d7db87e47",
    "select": "4735245959678387 ae96fe89b167388a",
}
"""Every saved adapter depends on these. If one changes, so must the format of files."""


@pytest.mark.parametrize("init", PINNED)
def test_draws_are_pinned(init: str) -> None:
    """Also of the shape of a large layer; whatever the threads, and wherever torch's own stream stands."""
    threads = torch.get_num_threads()
    try:
        found = []
        for count, seed in ((1, 0), (2, 1)):
            torch.set_num_threads(count)
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            found.append([fingerprint(draw(init, *case)) for case in ((4, 48, 7, "a.b"), (64, 4096, 0, "", 2))])
            assert torch.equal(state, torch.get_rng_state())
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]
    assert f"{found[0][0][:16]} {found[0][1][:16]}" == PINNED[init]


@pytest.mark.parametrize(
    ("init", "atol"),
    [("orthonormal", 0.002), ("select", 0.002), ("gaussian", 0.12), ("weight_svd", 0.002), ("pca", 0.002)],
)
def test_every_a_is_on_the_scale_of_loras_usual_start(init: str, atol: float) -> None:
    """A A^T = I / 3 (kaiming_uniform with a = sqrt(5) has entries of variance 1 / 3N), up to bf16's rounding; of a
    Gaussian A on average only, its spectrum is Marchenko and Pastur's."""
    r, n = 8, 512
    generator = torch.Generator().manual_seed(5)
    if init == "weight_svd":
        a = weight_svd(torch.randn(64, n, generator=generator), r, 0)
    elif init == "pca":
        seen = Covariance(r, n, 0)
        seen.add(torch.randn(100, n, generator=generator))
        a = seen.a()
    else:
        a = draw(init, r, n, 0, "x")
    torch.testing.assert_close(a @ a.T, torch.eye(r) / 3, atol=atol, rtol=0)
    kaiming = torch.nn.init.kaiming_uniform_(torch.empty(r, n), a=5**0.5, generator=generator)
    assert abs((a @ a.T).trace() / (kaiming @ kaiming.T).trace() - 1) < 0.1


def test_layers_seeds_and_epochs_have_matrices_of_their_own() -> None:
    cases = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", 2)]
    assert len({fingerprint(draw("orthonormal", 2, 16, *case)) for case in cases}) == len(cases)


def test_a_is_the_same_in_every_dtype_that_has_bf16s_entries() -> None:
    a = draw("orthonormal", 4, 64, 0, "x")
    assert fingerprint(a) == fingerprint(a.bfloat16()) == fingerprint(a.double())
    assert fingerprint(a) != fingerprint(a * (1 + 2**-20)), "an A from elsewhere is compared in fp32"


def test_pca_finds_the_principal_subspace() -> None:
    """EVA, arXiv 2410.07170: the span of the r largest directions of the inputs' second moments."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q
    x = torch.randn(3, 400, 32, generator=generator) * torch.tensor([9.0, 6, 3, *[0.1] * 29]) @ basis.T
    seen = Covariance(3, 32, 0)
    for batch in x:
        seen.add(batch)
    a = seen.a() * 3**0.5
    torch.testing.assert_close(a @ basis[:, :3] @ basis[:, :3].T @ a.T, torch.eye(3), atol=5e-3, rtol=0)


def test_weight_svd_spans_the_largest_right_singular_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its random probe is drawn on the host: the draws of GPUs, dropout's say, go on as they were."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("the GPUs are seeded"))
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(k, 4, generator=generator)).Q for k in (24, 32))
    a = weight_svd(u @ torch.diag(torch.tensor([8.0, 4, 0.2, 0.1])) @ v.T, 2, 0) * 3**0.5
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(a @ v[:, :2] @ v[:, :2].T @ a.T, torch.eye(2), atol=5e-3, rtol=0)


def gradients(init: str, correction: str) -> tuple[Tensor, Tensor, Tensor]:
    """dB with `correction`, dW of the full layer, and A."""
    model = inject(MLP(), LoRAFAConfig(r=3, alpha=6, targets=TARGETS, init=init, correction=correction))
    rows = torch.randn(40, 16, generator=torch.Generator().manual_seed(2))
    model(rows).square().sum().backward()
    plain = MLP()
    plain(rows).square().sum().backward()
    adapter = model.first.adapters["default"]
    return adapter.B.grad, plain.first.weight.grad, adapter.A


@pytest.mark.parametrize("init", ["gaussian", "orthonormal", "select"])
def test_the_closed_form_is_the_least_squares_solution(init: str) -> None:
    """arXiv 2308.03303v2: of all dB the one whose step s dB A is closest to the full gradient of W."""
    corrected, full, a = gradients(init, "closed_form")
    best = torch.linalg.lstsq(2.0 * a.T, full.T).solution.T
    torch.testing.assert_close(corrected, best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["orthonormal", "select"])
def test_with_orthonormal_rows_the_closed_form_is_a_scalar(init: str) -> None:
    """Which AdamW does not see: 3 / s^2, to the rounding of A's entries."""
    (corrected, _, _), (plain, _, _) = gradients(init, "closed_form"), gradients(init, "none")
    torch.testing.assert_close(corrected, plain * 3 / 2.0**2, rtol=0.01, atol=0.01 * float(plain.abs().max()))


def test_with_a_gaussian_a_it_is_not() -> None:
    (corrected, _, _), (plain, _, _) = gradients("gaussian", "closed_form"), gradients("gaussian", "none")
    cosine = torch.nn.functional.cosine_similarity(corrected.flatten(), plain.flatten(), dim=0)
    assert cosine < 0.99
