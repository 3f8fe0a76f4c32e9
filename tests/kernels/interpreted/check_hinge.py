"""The hinge kernels: loss, slopes, empty sides, NaN, padding, repeatability; and the operator's two derivatives."""

import pytest
import torch
from mdml_kernels import reference, softmax_margin_loss, triton_hinge

MARGIN = 0.9


def problem(n_rows, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    odds = torch.randn(4, n_rows, generator=generator, dtype=torch.float64).to(dtype)
    is_ood = torch.rand(4, n_rows, generator=generator) > 0.7
    is_ood[:, 0], is_ood[:, -1] = False, True
    is_ood[1] = False
    odds[2] = torch.where(is_ood[2], -30.0, 30.0)  # the margin is met
    return odds, is_ood


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_rows", [2, 600, 9000])
def test_loss_and_slope(n_rows, dtype, fenced):
    odds, is_ood = problem(n_rows, dtype)
    loss, weights = triton_hinge.hinge(fenced(odds), is_ood, MARGIN)
    grad = torch.tensor([1.0, 2.0, 3.0, -0.5], dtype=dtype)
    slope = triton_hinge.hinge_slope(fenced(odds), is_ood, weights, grad)

    leaf = odds.double().requires_grad_()
    s = leaf.sigmoid()
    gap = MARGIN - reference._masked_mean(s, ~is_ood) + reference._masked_mean(s, is_ood)
    exact = torch.where((gap > 0) & is_ood.any(1), gap, 0.0)
    (exact_slope,) = torch.autograd.grad(exact, leaf, grad.double())
    assert exact[[0, 3]].min() > 0
    assert loss[[1, 2]].tolist() == [0, 0]
    assert slope[[1, 2]].eq(0).all()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=tolerance, atol=0)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=tolerance, atol=0)


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


@pytest.mark.parametrize("confidence", ["max", "mass"])
def test_operator(confidence):
    """First and second derivatives in logits, temperature and background, against the definition in float64."""
    generator = torch.Generator().manual_seed(1)
    logits, is_ood = torch.randn(3, 20, 6, generator=generator), torch.rand(3, 20, generator=generator) > 0.7
    derivatives = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [logits.to(dtype), torch.tensor([0.7, 1.0, 2.0], dtype=dtype), torch.tensor(0.3, dtype=dtype)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        options = {"temperature": leaves[1], "background": leaves[2], "confidence": confidence, "backend": backend}
        loss = softmax_margin_loss(leaves[0], is_ood, margin=MARGIN, reduction="none", **options)
        first = torch.autograd.grad(loss.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)
        derivatives.append([loss.detach(), *(value.detach() for value in (*first, *second))])
    for ours, exact in zip(*derivatives, strict=True):
        assert (ours.double() - exact).abs().max() <= 1e-5 * exact.abs().max()
