"""The fused linear head in Triton's interpreter against float64 autograd."""

import pytest
import torch
from mdml_kernels import reference, triton_linear

CONFIDENCES = [("max", False), ("max", True), ("mass", True)]


def make(groups, n, h, k, dtype=torch.float32, with_background=False, with_bias=True):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "z": randn(groups, n, h).to(dtype),
        "weight": (randn(groups, k, h) / h**0.5 * 2).to(dtype),
        "bias": randn(groups, k).to(dtype) if with_bias else None,
        "inv_temperature": torch.rand(groups, n, generator=generator) + 0.5,
        "background": randn(groups, n) if with_background else None,
    }


def by_reference(case, grad, confidence, dtype):
    """Odds and gradients of all inputs that there are, the logits materialised."""
    inputs = {name: value.to(dtype).requires_grad_() for name, value in case.items() if value is not None}
    logits = inputs["z"] @ inputs["weight"].mT
    if "bias" in inputs:
        logits = logits + inputs["bias"].unsqueeze(1)
    log_s, log_not_s = reference.log_confidence(
        logits.flatten(0, 1).unsqueeze(1),
        1 / inputs["inv_temperature"].flatten(),
        inputs["background"].flatten() if "background" in inputs else None,
        confidence,
    )
    odds = (log_s - log_not_s).view(grad.shape)
    grads = torch.autograd.grad(odds, list(inputs.values()), grad.to(dtype))
    return [odds.detach(), *grads]


def by_kernels(case, grad, confidence, fenced=lambda tensor: tensor, **options):
    inputs = [value if value is None else fenced(value) for value in case.values()]
    odds, *saved = triton_linear.linear_odds_forward(*inputs, confidence, **options)
    grads = triton_linear.linear_odds_backward(*inputs, confidence, *saved, fenced(grad), **options)
    return [odds, *(value for value in grads if value is not None)]


def relative_error(value, truth):
    return ((value.double() - truth).abs().max() / truth.abs().max()).item()


def assert_as_good_as_eager(case, confidence, slack, fenced):
    grad = torch.randn(case["z"].shape[:2], generator=torch.Generator().manual_seed(1))
    ours = by_kernels(case, grad, confidence, fenced)
    eager = by_reference(case, grad, confidence, torch.float32)
    truth = by_reference(case, grad, confidence, torch.float64)
    names = ("odds", *(name for name, value in case.items() if value is not None))
    for name, value, plain, exact in zip(names, ours, eager, truth, strict=True):
        assert relative_error(value, exact) <= relative_error(plain, exact) + slack, name


@pytest.mark.parametrize(("confidence", "with_background"), CONFIDENCES)
@pytest.mark.parametrize("shape", [(1, 1, 3, 2), (2, 70, 45, 77), (2, 33, 64, 5)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_float32(shape, confidence, with_background, with_bias, fenced):
    case = make(*shape, with_background=with_background, with_bias=with_bias)
    assert_as_good_as_eager(case, confidence, 1e-6, fenced)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("confidence", ["max", "mass"])
def test_half_precision_operands(dtype, confidence, fenced):
    """The operands are exact; what is rounded to their dtype is the slope before a product, and the result."""
    slack = {torch.bfloat16: 2**-6, torch.float16: 2**-10}[dtype]  # the interpreter cuts bfloat16 off
    assert_as_good_as_eager(make(1, 40, 32, 50, dtype, with_background=True), confidence, slack, fenced)


def test_many_rows_and_few_logits_are_split(fenced):
    """The rows of a small head are shared out among programs, whose sums are then added in a fixed order."""
    case = make(1, 500, 8, 3)
    assert_as_good_as_eager(case, "max", 1e-6, fenced)
    grad = torch.ones(1, 500)
    assert all(
        torch.equal(a, b) for a, b in zip(by_kernels(case, grad, "max"), by_kernels(case, grad, "max"), strict=True)
    )


def test_the_logits_are_never_in_memory(traffic):
    """Everything written: three numbers a row forward, the gradients backward, however many logits there are."""
    case = make(1, 64, 32, 700)
    by_kernels(case, torch.ones(1, 64), "max")
    gradients = sum(case[name].nbytes for name in ("z", "weight", "bias", "inv_temperature"))
    assert traffic.stored() == 64 * 3 * 4 + gradients


def test_no_gradient_of_the_head_where_none_is_wanted():
    case = make(1, 20, 8, 6)
    inputs = list(case.values())
    _, *saved = triton_linear.linear_odds_forward(*inputs, "max")
    grads = triton_linear.linear_odds_backward(*inputs, "max", *saved, torch.ones(1, 20), head=False)
    assert grads[1] is grads[2] is None
    assert grads[0].isfinite().all()


@pytest.mark.parametrize("confidence", ["max", "mass"])
def test_nan_stays_in_its_row_and_fills_it(confidence):
    case = make(1, 20, 8, 40, with_background=True)
    case["z"][0, 3, 1] = torch.nan
    odds, grad_z, _, _, grad_tau, grad_background = by_kernels(case, torch.ones(1, 20), confidence)
    others = [row for row in range(20) if row != 3]
    for value in (odds, grad_z, grad_tau, grad_background):
        assert value[0, 3].isnan().all()
        assert not value[0, others].isnan().any()


def test_no_rows():
    case = make(1, 0, 8, 4)
    odds, grad_z, grad_weight, grad_bias, _ = by_kernels(case, torch.ones(1, 0), "max")
    assert odds.shape == (1, 0)
    assert grad_z.shape == (1, 0, 8)
    assert not grad_weight.any()
    assert not grad_bias.any()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"weight": torch.zeros(1, 4, 7)}, ValueError, "must agree"),
        ({"z": torch.zeros(1, 20, 8, dtype=torch.float64)}, TypeError, "z and weight must be one of"),
        ({"bias": torch.zeros(1, 5)}, ValueError, "bias must be"),
        ({"inv_temperature": torch.zeros(1)}, ValueError, "inv_temperature must be"),
        ({"background": torch.zeros(1, 20, dtype=torch.float64)}, ValueError, "background must be"),
    ],
)
def test_bad_input_is_named(changes, error, words):
    with pytest.raises(error, match=words):
        triton_linear.linear_odds_forward(*{**make(1, 20, 8, 4), **changes}.values(), "max")
