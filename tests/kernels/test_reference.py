import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mdml_kernels import SoftmaxMarginLoss, one_class_loss, softmax_confidence, softmax_log_odds, softmax_margin_loss
from torch import Tensor

FORMS = ("hinge", "pairwise", "bce")
CONFIDENCES = (("max", None), ("max", 0.3), ("mass", 0.1))
IS_OOD = torch.tensor([[False, True, False, True, False], [True, False, False, False, True]])


def logits(seed: int = 0, k: int = 4) -> Tensor:
    return torch.randn(2, 5, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive_loss(values: Tensor, is_ood: Tensor, form: str, margin: float, temperature: float, b: float | None) -> float:
    """One episode by the formulas as they are written, row by row, with K >= 2 and confidence max."""
    exps = [[float(torch.exp(x / temperature)) for x in row] for row in values]
    s = [
        max(row) / (sum(row) + (0.0 if b is None else float(torch.exp(torch.tensor(b, dtype=torch.float64)))))
        for row in exps
    ]
    inside = [x for x, ood in zip(s, is_ood, strict=True) if not ood]
    outside = [x for x, ood in zip(s, is_ood, strict=True) if ood]
    mean = lambda xs: sum(xs) / len(xs)  # noqa: E731
    log = lambda x: float(torch.log(torch.tensor(x, dtype=torch.float64)))  # noqa: E731
    if form == "hinge":
        return max(0.0, margin - (mean(inside) - mean(outside)))
    if form == "pairwise":
        return mean([max(0.0, margin - (i - j)) for i, j in itertools.product(inside, outside)])
    return mean([-log(x) for x in inside]) + mean([-log(1 - x) for x in outside])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("background", [None, 0.3])
def test_value_is_the_written_formula(form: str, background: float | None) -> None:
    got = softmax_margin_loss(
        logits(), IS_OOD, form=form, margin=0.4, temperature=0.7, background=background, reduction="none"
    )
    expected = [naive_loss(logits()[e], IS_OOD[e], form, 0.4, 0.7, background) for e in range(2)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("confidence", "background"), CONFIDENCES)
@pytest.mark.parametrize("form", FORMS)
def test_first_and_second_derivatives(form: str, confidence: str, background: float | None) -> None:
    values = logits().requires_grad_()
    temperature = torch.tensor([0.6, 1.5], dtype=torch.float64, requires_grad=True)

    def loss(values: Tensor, temperature: Tensor) -> Tensor:
        options = {"form": form, "confidence": confidence, "background": background, "reduction": "none"}
        return softmax_margin_loss(values, IS_OOD, temperature=temperature, **options)

    assert torch.autograd.gradcheck(loss, (values, temperature))
    assert torch.autograd.gradgradcheck(loss, (values, temperature))


def test_mass_is_one_minus_the_backgrounds_probability() -> None:
    values, b = logits(), 0.4
    with_background = torch.cat([values, torch.full((2, 5, 1), b, dtype=torch.float64)], dim=-1)
    expected = 1 - with_background.softmax(-1)[..., -1]
    torch.testing.assert_close(softmax_confidence(values, background=b, confidence="mass"), expected)


@pytest.mark.parametrize("form", ["hinge", "pairwise"])
@pytest.mark.parametrize("all_ood", [True, False])
def test_an_episode_with_one_side_gives_zero_and_no_gradient(form: str, all_ood: bool) -> None:
    values = logits().requires_grad_()
    loss = softmax_margin_loss(values, torch.full((2, 5), all_ood), form=form, reduction="sum")
    assert loss.item() == 0
    assert torch.autograd.grad(loss, values)[0].abs().max() == 0


def test_bce_keeps_the_side_that_exists() -> None:
    loss = softmax_margin_loss(logits(), torch.zeros(2, 5, dtype=torch.bool), form="bce")
    torch.testing.assert_close(loss, one_class_loss(logits()))


@pytest.mark.parametrize("form", FORMS)
def test_nan_reaches_the_loss_and_the_rows_gradient(form: str) -> None:
    values = logits()
    values[0, 2, 1] = torch.nan
    values.requires_grad_()
    losses = softmax_margin_loss(values, IS_OOD, form=form, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), values)
    assert losses[0].isnan()
    assert losses[1].isfinite()
    assert gradient[0, 2].isnan().all()
    assert gradient[1].isfinite().all()


def test_ties_give_the_gradient_to_the_first_maximum() -> None:
    values = torch.tensor([[1.0, 3.0, 3.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(softmax_confidence(values).sum(), values)
    assert gradient[0, 1] > 0 > gradient[0, 2]


def test_log_odds_tell_apart_what_rounds_to_one() -> None:
    values = torch.tensor([[0.0, 40.0], [0.0, 60.0]])
    assert softmax_confidence(values).tolist() == [1.0, 1.0]
    assert softmax_log_odds(values).tolist() == [40.0, 60.0]


def test_half_precision_accumulates_in_float32() -> None:
    values = logits().to(torch.bfloat16)
    loss = softmax_margin_loss(values, IS_OOD)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, softmax_margin_loss(values.float(), IS_OOD))


@settings(max_examples=50, deadline=None)
@given(shift=st.floats(-50, 50), seed=st.integers(0, 10**6), form=st.sampled_from(FORMS))
def test_without_background_a_shift_of_the_logits_changes_nothing(shift: float, seed: int, form: str) -> None:
    values = logits(seed)
    torch.testing.assert_close(
        softmax_margin_loss(values + shift, IS_OOD, form=form), softmax_margin_loss(values, IS_OOD, form=form)
    )


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), form=st.sampled_from(FORMS), order=st.permutations(range(5)))
def test_the_order_of_the_rows_does_not_matter(seed: int, form: str, order: list[int]) -> None:
    values = logits(seed)
    torch.testing.assert_close(
        softmax_margin_loss(values[:, order], IS_OOD[:, order], form=form),
        softmax_margin_loss(values, IS_OOD, form=form),
    )


def test_learned_temperature_gets_a_gradient() -> None:
    loss = SoftmaxMarginLoss(learn_temperature=True, temperature=0.5).double()
    loss(logits(), IS_OOD).backward()
    assert loss.log_temperature is not None
    assert loss.log_temperature.grad.abs() > 0


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (
            {"logits": torch.zeros(2, 5, 4, dtype=torch.int64)},
            TypeError,
            "logits must be a floating point tensor, got torch.int64",
        ),
        ({"logits": torch.zeros(4)}, ValueError, r"logits must be \[..., N, K\]"),
        ({"is_ood": torch.zeros(2, 5)}, TypeError, "is_ood must be a bool"),
        ({"is_ood": torch.zeros(5, dtype=torch.bool)}, ValueError, "is_ood must have the shape"),
        ({"logits": torch.zeros(2, 5, 1)}, ValueError, "K = 1"),
        ({"confidence": "mass"}, ValueError, "background"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature must be a scalar or one per episode"),
        ({"form": "square"}, ValueError, "form must be one of"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        softmax_margin_loss(**({"logits": logits(), "is_ood": IS_OOD} | change))
