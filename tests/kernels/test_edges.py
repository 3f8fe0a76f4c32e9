"""Ties, NaN, empty sides, nothing at all, odd strides and dtypes: every way of the CPU against the definition."""

import pytest
import torch
from mdml_kernels import (
    SoftmaxMarginLoss,
    linear_softmax_confidence,
    one_class_loss,
    softmax_confidence,
    softmax_log_odds,
    softmax_margin_loss,
)

FORMS = ("hinge", "pairwise", "bce")
pytestmark = pytest.mark.usefixtures("cpu_way")


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*size, seed=0):
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.4


def value_and_gradient(backend, logits, is_ood, **options):
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    losses = softmax_margin_loss(leaf, is_ood, margin=0.9, reduction="none", backend=backend, **options)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient


def assert_same(logits, is_ood, rtol=1e-9, atol=1e-11, **options):
    ours = value_and_gradient("cpu", logits, is_ood, **options)
    theirs = value_and_gradient("reference", logits, is_ood, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)
    return ours


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("background", [None, 0.5])
def test_the_first_of_equals_takes_the_gradient(form, background):
    logits = torch.tensor([[[1.0, 2, 2, 2], [3, 3, 0, 0], [0, 1, 0, 1]]], dtype=torch.float64)
    _, gradient = assert_same(logits, torch.tensor([[False, True, False]]), form=form, background=background)
    largest = gradient.abs().argmax(-1)
    assert largest.tolist() == [[1, 0, 1]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", [0, 3, 4])
@pytest.mark.parametrize("n_classes", [5, 70])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_is_never_silently_zero(form, where, n_classes, bad):
    logits, is_ood = normal(3, 6, n_classes), labels(3, 6)
    logits[1, 2, where] = bad
    losses, gradient = value_and_gradient("cpu", logits, is_ood, form=form)
    assert losses.isnan().tolist() == [False, True, False]
    assert gradient[1, 2].isnan().all()
    assert not gradient[[0, 2]].isnan().any()
    assert softmax_confidence(logits).isnan().nonzero().tolist() == [[1, 2]]


def test_a_bad_row_without_a_loss():
    logits = normal(1, 3, 5)
    logits[0, 1, 4] = float("nan")
    leaf = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(softmax_log_odds(leaf).sum(), leaf)
    assert gradient[0, 1].isnan().all()
    assert not gradient[0, [0, 2]].isnan().any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", [True, False])
@pytest.mark.parametrize("n_classes", [5, 70])
def test_an_empty_side(form, side, n_classes):
    is_ood = labels(3, 6)
    is_ood[1] = side
    losses, gradient = assert_same(normal(3, 6, n_classes), is_ood, form=form)
    assert (losses[1] == 0) == (form != "bce")
    assert (gradient[1] == 0).all() == (form != "bce")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(3, 0, 5), (0, 6, 5), (2, 0, 4, 5), (6, 5), (2, 3, 6, 5), (3, 0, 70), (0, 6, 70)])
def test_any_number_of_dims_and_none_of_some(form, size):
    losses, gradient = assert_same(normal(*size), labels(*size[:-1]), form=form)
    assert losses.shape == size[:-2]
    assert gradient.shape == size


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("confidence", ["max", "mass"])
@pytest.mark.parametrize("n_classes", [1, 2, 31, 32, 33, 65])
def test_number_of_classes(form, confidence, n_classes):
    assert_same(normal(2, 6, n_classes), labels(2, 6), form=form, confidence=confidence, background=0.3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_classes", [5, 70])
def test_a_masked_class(form, n_classes):
    logits = normal(2, 6, n_classes)
    logits[..., 1] = -torch.inf
    _, gradient = assert_same(logits, labels(2, 6), form=form)
    assert (gradient[..., 1] == 0).all()


def two_derivatives(loss, *leaves):
    """The first by the leaves, and the second along some direction in reverse and in forward mode."""
    moves = tuple(normal(*leaf.shape, seed=i).to(leaf) for i, leaf in enumerate(leaves))
    every = tuple(range(len(leaves)))
    first = torch.func.grad(loss, every)
    second = torch.func.grad(lambda *at: sum((g * v).sum() for g, v in zip(first(*at), moves, strict=True)), every)
    return first(*leaves), second(*leaves), torch.func.jvp(loss, leaves, moves)[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("backend", "learned"), [("cpu", False), ("cpu", True), ("reference", False)])
@pytest.mark.parametrize(("dtype", "n_classes"), [(torch.float64, 5), (torch.float32, 5), (torch.float32, 70)])
def test_a_masked_class_is_none_in_any_derivative(form, learned, backend, dtype, n_classes):
    rest, is_ood = normal(2, 6, n_classes).to(dtype), labels(2, 6)
    options = {"form": form, "margin": 0.9, "reduction": "sum", "background": 0.3}
    leaves = (rest, torch.tensor(0.7, dtype=dtype)) if learned else (rest,)

    def masked(logits, temperature=0.7):
        barred = torch.full_like(logits[..., :1], -torch.inf)
        both = torch.cat([logits[..., :1], barred, logits[..., 1:]], -1)
        return softmax_margin_loss(both, is_ood, temperature=temperature, backend=backend, **options)

    def without(logits, temperature=0.7):
        return softmax_margin_loss(logits, is_ood, temperature=temperature, backend="reference", **options)

    exact = [leaf.double() for leaf in leaves]
    for a, b in zip(two_derivatives(masked, *leaves), two_derivatives(without, *exact), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6, check_dtype=False)


def test_a_masked_class_of_a_head_is_none_in_any_derivative():
    z, weight, temperature = normal(6, 4), normal(5, 4, seed=1), torch.tensor(0.7).double()
    bias = torch.tensor([0.0, 0, -torch.inf, 0, 0], dtype=torch.float64)
    kept = bias.isfinite()

    def masked(z, temperature):
        return linear_softmax_confidence(z, weight, bias, temperature=temperature, backend="cpu").sum()

    def without(z, temperature):
        return softmax_confidence(z @ weight[kept].T, temperature=temperature, backend="reference").sum()

    for a, b in zip(two_derivatives(masked, z, temperature), two_derivatives(without, z, temperature), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("confidence", "background"), [("max", None), ("max", 0.5), ("mass", 0.5)], ids=["max", "max, background", "mass"]
)
@pytest.mark.parametrize("n_classes", [5, 70])
def test_what_all_logits_share_costs_no_digits(form, confidence, background, n_classes):
    """Float32 holds what is shifted exactly, and so far out only whole steps of 1/128."""
    logits, is_ood, shared = (normal(2, 6, n_classes) * 64).round() / 64, labels(2, 6), -65536.0
    options = {"form": form, "margin": 0.9, "reduction": "sum", "confidence": confidence}

    def shifted(x):
        b = None if background is None else background + shared
        return softmax_margin_loss(x + shared, is_ood, background=b, backend="cpu", **options)

    def plain(x):
        return softmax_margin_loss(x, is_ood, background=background, backend="reference", **options)

    torch.testing.assert_close(shifted(logits.float()).double(), plain(logits), rtol=1e-6, atol=1e-6)
    for a, b in zip(two_derivatives(shifted, logits.float()), two_derivatives(plain, logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("form", FORMS)
def test_odd_strides(form):
    logits = normal(5, 3, 6).permute(1, 2, 0)  # K is the outermost in memory
    assert not logits.is_contiguous()
    assert_same(logits, labels(3, 6), form=form)
    assert_same(normal(3, 12, 10)[:, ::2, 1::2], labels(3, 6), form=form)
    assert_same(normal(1, 6, 5).expand(3, 6, 5), labels(3, 6), form=form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_accumulates_in_float32(form, dtype, rounding):
    logits = normal(3, 6, 5).to(dtype)
    losses, gradient = assert_same(logits, labels(3, 6), form=form, rtol=rounding, atol=rounding / 100)
    assert losses.dtype == torch.float32
    assert gradient.dtype == dtype
    exact, _ = value_and_gradient("reference", logits.double(), labels(3, 6), form=form)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("background", [None, 0.5])
def test_nothing_saturates(background):
    logits = torch.tensor([[[400.0, 0, -50], [-400, 400, 0], [0, 0, 1]]], dtype=torch.float32)
    is_ood = torch.tensor([[True, True, False]])
    losses, gradient = value_and_gradient("cpu", logits, is_ood, form="bce", background=background)
    exact, expected = value_and_gradient("reference", logits.double(), is_ood, form="bce", background=background)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)


def test_the_sides_of_one_keep_their_digits():
    """log S and its derivative where S rounds to 1: PyTorch's logsigmoid has nothing left in the second derivative."""
    logits = torch.tensor([[[25.0, 0, 1]]], requires_grad=True)
    exact = logits.detach().double().requires_grad_()
    for leaf in (logits, exact):
        loss = one_class_loss(leaf)
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (leaf.second,) = torch.autograd.grad(first[..., 0].sum(), leaf)
        leaf.first = first.detach()
    torch.testing.assert_close(logits.first.double(), exact.first, rtol=1e-5, atol=0)
    torch.testing.assert_close(logits.second.double(), exact.second, rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("unscaled", [True, False])
def test_nothing_of_the_callers_is_written_to(form, unscaled):
    logits, is_ood = normal(3, 6, 5).requires_grad_(), labels(3, 6)
    temperature, background = torch.tensor(0.7).double().requires_grad_(), normal(3).requires_grad_()
    if unscaled:  # the CPU then reads the logits where they are
        temperature = 1.0
    leaves = [value for value in (logits, temperature, background) if isinstance(value, torch.Tensor)]
    tensors = [*leaves, is_ood]
    before = [tensor.detach().clone() for tensor in tensors]
    loss = softmax_margin_loss(logits, is_ood, form=form, temperature=temperature, background=background)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    for a, b in zip((*tensors, *first), (*before, *again), strict=True):
        assert torch.equal(a, b)
    assert {tensor._version for tensor in tensors} == {0}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(form, reduction):
    logits, is_ood = normal(3, 6, 5), labels(3, 6)
    losses = softmax_margin_loss(logits, is_ood, form=form, reduction="none")
    torch.testing.assert_close(
        softmax_margin_loss(logits, is_ood, form=form, reduction=reduction), getattr(losses, reduction)()
    )


def test_pairwise_counts_every_pair():
    """Against the definition's N² pairs, with pairs that just meet the margin, which do not count."""
    s = torch.tensor([0.9, 0.65, 0.4, 0.4, 0.15, 0.9], dtype=torch.float64)
    logits = torch.stack([s.log(), (1 - s).log()], dim=-1)[None]
    # For two classes S is the larger of s and 1 - s: 0.9, 0.65, 0.6, 0.6, 0.85, 0.9.
    _, gradient = assert_same(logits, torch.tensor([[False, False, True, True, False, True]]), form="pairwise")
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"form": "hing"}, "form must be one of"),
        ({"confidence": "maks"}, "confidence must be one of"),
        ({"reduction": "avg"}, "reduction must be one of"),
        ({"backend": "gpu"}, "backend must be one of"),
        ({"margin": 1.5}, r"margin must be in \[0, 1\]"),
        ({"confidence": "mass"}, "give background="),
        ({"temperature": 0}, "temperature must be positive"),
        ({"temperature": 1e-40}, "temperature must be at least 1.2e-38"),
        ({"background": "0.5"}, "background must be a number"),
        ({"temperature": torch.tensor(1.0)}, "learn_temperature=True"),
        ({"learn_background": True}, "give background"),
    ],
    ids=str,
)
def test_settings_are_refused_before_there_are_logits(setting, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SoftmaxMarginLoss(**setting)


def test_a_module_shows_its_settings():
    shown = repr(SoftmaxMarginLoss(background=0, temperature=2.0, learn_background=True, reduction="sum"))
    for part in ("margin=0.5", "temperature=2.0", "background=learned", "reduction='sum'", "backend='auto'"):
        assert part in shown
    assert "temperature=learned" in repr(SoftmaxMarginLoss(learn_temperature=True))


@pytest.mark.parametrize("n_classes", [5, 70])
def test_an_infinite_temperature_tells_no_logits_apart(n_classes):
    confidence = softmax_confidence(normal(2, 6, n_classes).float(), temperature=float("inf"))
    torch.testing.assert_close(confidence, torch.full((2, 6), 1 / n_classes))


def test_a_temperature_whose_inverse_is_infinite_is_refused():
    with pytest.raises(ValueError, match=r"temperature must be at least 1\.2e-38, got 1e-40"):
        softmax_confidence(normal(2, 6, 5), temperature=1e-40)


def test_module_is_the_function():
    logits, is_ood = normal(3, 6, 5).float(), labels(3, 6)
    module = SoftmaxMarginLoss(margin=0.7, temperature=2.0, background=0.1, form="bce", learn_temperature=True)
    loss = module(logits, is_ood)
    options = {"temperature": 2.0, "background": 0.1}
    torch.testing.assert_close(loss, softmax_margin_loss(logits, is_ood, margin=0.7, form="bce", **options))
    torch.testing.assert_close(module.one_class(logits), one_class_loss(logits, **options))
    torch.testing.assert_close(module.log_odds(logits), softmax_log_odds(logits, **options))
    loss.backward()
    assert module.log_temperature.grad.abs() > 0
    with pytest.raises(ValueError, match="'triton' cannot serve"):
        SoftmaxMarginLoss(backend="triton").log_odds(logits)


def test_a_learned_background_takes_the_gradient_and_repeats_as_learned():
    logits, is_ood = torch.randn(2, 6, 3), torch.arange(6).expand(2, 6) > 3
    module = SoftmaxMarginLoss(background=-1.0, confidence="mass", form="bce", learn_background=True)
    assert [name for name, _ in module.named_parameters()] == ["background"]
    module(logits, is_ood).backward()
    background = torch.tensor(-1.0, requires_grad=True)
    softmax_margin_loss(logits, is_ood, background=background, confidence="mass", form="bce").backward()
    torch.testing.assert_close(module.background.grad, background.grad)
    assert "background=learned" in repr(module)
    with pytest.raises(ValueError, match="give background"):
        SoftmaxMarginLoss(learn_background=True)
