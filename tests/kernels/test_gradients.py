"""gradcheck and gradgradcheck in float64 of the definition and of the wiring, over the whole grid of arguments."""

import itertools

import pytest
import torch
from mdml_kernels import linear_softmax_confidence, softmax_log_odds, softmax_margin_loss

FORMS = ("hinge", "pairwise", "bce")
SCALINGS = ("number", "scalar", "episode")
GRID = [
    (form, confidence, background, temperature)
    for form, confidence, background, temperature in itertools.product(
        FORMS, ("max", "mass"), (None, *SCALINGS), SCALINGS
    )
    if background or confidence == "max"
]
SIZES = {"scalar": (), "episode": (2,)}


def double(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_of(background, temperature):
    """Logits [2, 5, 4], and what of temperature and background is a tensor."""
    made = {"logits": double(2, 5, 4, seed=1)}
    if temperature != "number":
        made["temperature"] = double(*SIZES[temperature], seed=2).abs() + 0.5
    if background in SIZES:
        made["background"] = double(*SIZES[background], seed=3)
    return {name: value.requires_grad_() for name, value in made.items()}


def options_of(inputs, background):
    return {
        "temperature": inputs.get("temperature", 0.7),
        "background": inputs.get("background", 0.3 if background == "number" else None),
    }


@pytest.mark.parametrize(("form", "confidence", "background", "temperature"), GRID)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.usefixtures("operators")
def test_margin_loss(form, confidence, background, temperature, backend):
    inputs = inputs_of(background, temperature)
    is_ood = torch.tensor([[True, False, False, True, False], [False, True, False, False, False]])

    def loss(*values):
        made = dict(zip(inputs, values, strict=True))
        return softmax_margin_loss(
            made["logits"],
            is_ood,
            margin=0.9,
            form=form,
            confidence=confidence,
            reduction="none",
            backend=backend,
            **options_of(made, background),
        )

    assert (loss(*inputs.values()) > 0).all(), "a loss of zero would make the check empty"
    ours = backend == "cpu"  # PyTorch's own forward mode is not what is tested
    assert torch.autograd.gradcheck(loss, tuple(inputs.values()), check_forward_ad=ours, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, tuple(inputs.values()), check_fwd_over_rev=ours, fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.usefixtures("operators")
def test_third_derivative(form, backend):
    def gradients(*leaves):
        x, t, b = leaves
        loss = softmax_margin_loss(
            x, x.detach()[..., 0] > 0, margin=0.9, temperature=t, background=b, form=form, backend=backend
        )
        return torch.autograd.grad(loss.square(), leaves, create_graph=True)

    leaves = [value.requires_grad_() for value in (double(1, 5, 3), double(1).abs() + 0.5, double(1, seed=1))]
    assert all(value.abs().max() > 1e-3 for value in gradients(*leaves))
    assert torch.autograd.gradgradcheck(gradients, leaves, fast_mode=True)


@pytest.mark.parametrize("confidence", ["max", "mass"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_log_odds_in_full(confidence, backend):
    inputs = inputs_of("episode", "episode")

    def odds(*values):
        made = dict(zip(inputs, values, strict=True))
        return softmax_log_odds(made["logits"], confidence=confidence, backend=backend, **options_of(made, "episode"))

    values = tuple(inputs.values())
    assert torch.autograd.gradcheck(odds, values, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(odds, values, check_fwd_over_rev=True)


@pytest.mark.parametrize("head", ["linear", "linear without bias", "prototype"])
@pytest.mark.parametrize(("confidence", "background"), [("max", None), ("max", "episode"), ("mass", "scalar")])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_linear_head(head, confidence, background, backend):
    scalings = inputs_of(background, "episode")
    del scalings["logits"]
    inputs = {"z": double(2, 5, 3, seed=4), "head": double(4, 3, seed=5)}
    if head == "linear":
        inputs["bias"] = double(4, seed=6)
    if head == "prototype":
        inputs["scale"] = double(seed=7).abs() + 1
    inputs = {**{name: value.requires_grad_() for name, value in inputs.items()}, **scalings}

    def confidences(*values):
        made = dict(zip(inputs, values, strict=True))
        if head == "prototype":
            given = {"centers": made["head"], "scale": made["scale"]}
        else:
            given = {"weight": made["head"], "bias": made.get("bias")}
        return linear_softmax_confidence(
            made["z"], **given, confidence=confidence, backend=backend, **options_of(made, background)
        )

    values = tuple(inputs.values())
    assert torch.autograd.gradcheck(confidences, values, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(confidences, values, check_fwd_over_rev=True, fast_mode=True)
