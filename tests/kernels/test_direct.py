"""The losses with their gradients and no graph, against autograd through the definition."""

import pytest
import torch
from mdml_kernels import direct, one_class_loss, softmax_margin_loss

BACKGROUND = {"none": None, "learned": torch.tensor([-0.5, 0.3, 1.0], dtype=torch.float64)}


def problem(n_classes):
    generator = torch.Generator().manual_seed(n_classes)
    logits = 2 * torch.randn(3, 12, n_classes, generator=generator, dtype=torch.float64)
    logits[0, 0] = 1.5  # all equal: the first is the largest
    tau = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    return logits, torch.rand(3, 12, generator=generator) < 0.4, tau


@pytest.mark.parametrize("n_classes", [5, 40])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("confidence", "background"), [("max", "none"), ("max", "learned"), ("mass", "learned")])
def test_one_class_gradient(confidence, background, scaled, n_classes):
    logits, _, tau = problem(n_classes)
    b, tau = BACKGROUND[background], tau if scaled else None
    leaf = logits.clone().requires_grad_()
    temperature = 1.0 if tau is None else 1 / tau
    options = {"temperature": temperature, "background": b, "confidence": confidence, "backend": "reference"}
    one_class_loss(leaf, reduction="sum", **options).backward()
    gradient = direct.one_class_gradient_(logits, tau, b, confidence)
    assert gradient is logits
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("needs_tau", [False, True])
@pytest.mark.parametrize("form", ["hinge", "pairwise", "bce"])
@pytest.mark.parametrize("n_classes", [5, 40])
@pytest.mark.parametrize(("confidence", "background"), [("max", "none"), ("max", "learned"), ("mass", "learned")])
def test_margin_gradients(confidence, background, form, n_classes, needs_tau):
    logits, is_ood, tau = problem(n_classes)
    is_ood[2] = False  # an episode without anomalies
    b = BACKGROUND[background]
    leaves = [logits.clone(), tau.clone(), *([] if b is None else [b.clone()])]
    for leaf in leaves:
        leaf.requires_grad_()
    options = {"margin": 0.9, "confidence": confidence, "form": form}
    expected = softmax_margin_loss(
        leaves[0],
        is_ood,
        temperature=1 / leaves[1],
        background=leaves[2] if b is not None else None,
        reduction="none",
        backend="reference",
        **options,
    )
    expected.sum().backward()
    out = direct.margin_gradients(logits, is_ood, tau, b, **options, backend="cpu", needs_tau=needs_tau)
    torch.testing.assert_close(out.loss, expected.detach(), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(out.logits, leaves[0].grad, rtol=1e-9, atol=1e-14)
    if needs_tau:
        torch.testing.assert_close(out.tau, leaves[1].grad, rtol=1e-9, atol=1e-14)
    else:
        assert out.tau is None
    if b is not None:
        torch.testing.assert_close(out.background, leaves[2].grad, rtol=1e-9, atol=1e-14)


def test_no_temperature_is_one():
    logits, is_ood, _ = problem(5)
    options = {"margin": 0.9, "confidence": "max", "form": "hinge", "backend": "cpu"}
    expected = direct.margin_gradients(logits.clone(), is_ood, torch.ones(3, dtype=torch.float64), None, **options)
    out = direct.margin_gradients(logits, is_ood, None, None, **options)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.logits, expected.logits)


def test_what_is_left_where_s_rounds_to_one():
    logits = torch.tensor([[[30.0, 0.0, 0.0], [30.0, 1.0, 0.0]]])
    exact = direct.one_class_gradient_(logits.double(), None, None, "max")
    torch.testing.assert_close(direct.one_class_gradient_(logits, None, None, "max").double(), exact, rtol=1e-5, atol=0)
    assert exact[0, 0, 0] != 0


@pytest.mark.parametrize("confidence", ["max", "mass"])
def test_what_all_logits_share_costs_no_digits(confidence):
    logits, is_ood, _ = problem(5)
    logits, shared = (logits * 64).round() / 64, -65536.0

    def gradients(logits, background):
        b = torch.full((3,), background, dtype=logits.dtype)
        options = {"margin": 0.9, "confidence": confidence, "form": "hinge", "backend": "cpu"}
        margin = direct.margin_gradients(logits.clone(), is_ood, None, b, **options)
        return margin.logits, margin.background, direct.one_class_gradient_(logits, None, b, confidence)

    exact = gradients(logits.clone(), 0.5)
    for a, b in zip(gradients((logits + shared).float(), 0.5 + shared), exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)


def test_a_nan_stays_in_its_row():
    logits = torch.zeros(1, 2, 4)
    logits[0, 1, 2] = float("nan")
    gradient = direct.one_class_gradient_(logits, None, None, "max")
    assert gradient[0, 0].isfinite().all()
    assert gradient[0, 1].isnan().all()
