"""The hinge kernels: loss, slopes, empty sides, NaN, padding, repeatability."""

import pytest
import torch
from mdml_kernels import reference, triton_hinge

MARGIN = 0.9


def problem(n_rows, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    odds = torch.randn(4, n_rows, generator=generator, dtype=torch.float64).to(dtype)
    is_ood = torch.rand(4, n_rows, generator=generator) > 0.7
    is_ood[:, 0], is_ood[:, -1] = False, True
    is_ood[1] = False
    odds[2] = torch.where(is_ood[2], -30.0, 30.0)  # the margin is met
    return odds, is_ood


def by_torch(odds, is_ood, grad):
    """Losses and slopes by plain operations and autograd, in the odds' dtype."""
    leaf = odds.detach().requires_grad_()
    s = leaf.sigmoid()
    gap = MARGIN - reference._masked_mean(s, ~is_ood) + reference._masked_mean(s, is_ood)
    loss = torch.where((gap > 0) & is_ood.any(1), gap, 0.0)
    return loss.detach(), torch.autograd.grad(loss, leaf, grad)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_rows", [2, 100, 601, 4096, 9000])
def test_loss_and_slope(n_rows, dtype, fenced):
    odds, is_ood = problem(n_rows, dtype)
    loss, weights = triton_hinge.hinge(fenced(odds), is_ood, MARGIN)
    grad = torch.tensor([1.0, 2.0, 3.0, -0.5], dtype=dtype)
    slope = triton_hinge.hinge_slope(fenced(odds), is_ood, weights, grad)

    exact = by_torch(odds.double(), is_ood, grad.double())
    eager = by_torch(odds, is_ood, grad)
    assert exact[0][[0, 3]].min() > 0
    assert loss[[1, 2]].tolist() == [0, 0]
    assert slope[[1, 2]].eq(0).all()
    for ours, plain, truth in zip((loss, slope), eager, exact, strict=True):
        errors = [((value.double() - truth).abs() / truth.abs())[truth != 0].max() for value in (ours, plain)]
        assert errors[0] <= errors[1] + (1e-6 if dtype == torch.float32 else 1e-14)


def test_two_runs_give_the_same_bits():
    odds, is_ood = problem(9000)
    first, second = (triton_hinge.hinge(odds, is_ood, MARGIN) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("row", [0, -1])
def test_a_bad_row_is_the_loss_of_its_episode_alone(row):
    odds, is_ood = problem(600)
    odds[3, row] = torch.nan
    loss, weights = triton_hinge.hinge(odds, is_ood, MARGIN)
    assert loss.isnan().tolist() == [False, False, False, True]
    slope = triton_hinge.hinge_slope(odds, is_ood, weights, torch.ones(4))
    assert slope.isnan().nonzero().tolist() == [[3, row % 600]]


def test_no_rows_and_no_episodes():
    for shape in ((2, 0), (0, 3)):
        loss, weights = triton_hinge.hinge(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), MARGIN)
        assert loss.tolist() == [0.0] * shape[0]
        assert weights.shape == (shape[0], 2)
        assert triton_hinge.hinge_slope(torch.zeros(shape), torch.zeros(shape), weights, loss).shape == shape
