"""What must hold for any numbers: invariances of the mathematics, by hypothesis."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mdml_kernels import softmax_log_odds, softmax_margin_loss

FORMS = st.sampled_from(("hinge", "pairwise", "bce"))
# A function-scoped fixture sets the way of the backend, which no example changes.
QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
pytestmark = pytest.mark.usefixtures("cpu_way")


@st.composite
def problems(draw):
    """Logits [E, N, K] of a few repeated values, so that ties are common, and is_ood."""
    size = tuple(draw(st.integers(low, high)) for low, high in ((1, 3), (1, 7), (2, 6)))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    spread = draw(st.sampled_from((1, 3, 30)))
    logits = torch.randint(-spread, spread + 1, size, generator=generator).double() / draw(st.sampled_from((1, 4)))
    return logits, torch.rand(size[:2], generator=generator) < 0.5


def loss_and_gradient(logits, is_ood, form):
    leaf = logits.clone().requires_grad_()
    loss = softmax_margin_loss(leaf, is_ood, margin=0.8, form=form, reduction="none", backend="cpu")
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


@QUICK
@given(problems(), FORMS, st.floats(-50, 50))
def test_a_shift_of_all_logits_of_a_row_changes_nothing(problem, form, shift):
    logits, is_ood = problem
    for a, b in zip(
        loss_and_gradient(logits, is_ood, form), loss_and_gradient(logits + shift, is_ood, form), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@QUICK
@given(problems(), FORMS, st.randoms())
def test_the_order_of_rows_does_not_matter(problem, form, random):
    logits, is_ood = problem
    order = list(range(logits.shape[1]))
    random.shuffle(order)
    loss, gradient = loss_and_gradient(logits, is_ood, form)
    permuted, permuted_gradient = loss_and_gradient(logits[:, order], is_ood[:, order], form)
    torch.testing.assert_close(permuted, loss, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(permuted_gradient, gradient[:, order], rtol=1e-9, atol=1e-11)


@QUICK
@given(problems(), FORMS, st.randoms())
def test_the_order_of_classes_does_not_matter_to_the_value(problem, form, random):
    logits, is_ood = problem
    order = list(range(logits.shape[2]))
    random.shuffle(order)
    loss, _ = loss_and_gradient(logits, is_ood, form)
    torch.testing.assert_close(loss_and_gradient(logits[..., order], is_ood, form)[0], loss, rtol=1e-9, atol=1e-11)


@QUICK
@given(problems(), FORMS)
def test_a_row_without_a_background_has_a_gradient_that_sums_to_zero(problem, form):
    _, gradient = loss_and_gradient(*problem, form)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(gradient.shape[:2]).double(), rtol=0, atol=1e-10)


@QUICK
@given(problems())
def test_a_temperature_is_a_scale(problem):
    logits, _ = problem
    torch.testing.assert_close(softmax_log_odds(logits, temperature=0.5), softmax_log_odds(2 * logits))


@QUICK
@given(problems(), FORMS)
def test_agrees_with_the_definition(problem, form):
    logits, is_ood = problem
    leaf = logits.clone().requires_grad_()
    loss = softmax_margin_loss(leaf, is_ood, margin=0.8, form=form, reduction="none", backend="reference")
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    ours, our_gradient = loss_and_gradient(logits, is_ood, form)
    torch.testing.assert_close(ours, loss.detach(), rtol=1e-9, atol=1e-11)
    if form != "pairwise":  # at a pair that just meets the margin, rounding decides whether it counts
        torch.testing.assert_close(our_gradient, gradient, rtol=1e-9, atol=1e-11)
