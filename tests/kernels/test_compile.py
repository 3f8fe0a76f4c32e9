"""torch.compile(fullgraph=True) and autocast give what eager mode gives."""

import pytest
import torch
from mdml_kernels import linear_softmax_confidence, softmax_margin_loss
from torch.autograd import forward_ad
from torch.func import grad, vmap

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

OOD = torch.arange(6).expand(3, 6) % 3 == 0


def normal(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("confidence", ["max", "mass"])
@pytest.mark.parametrize("form", ["hinge", "pairwise", "bce"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_training_step(form, confidence, backend):
    def step(x, t, b):
        return softmax_margin_loss(
            x, OOD, temperature=t, background=b, form=form, confidence=confidence, backend=backend
        )

    leaves = [normal(3, 6, 5), torch.tensor(0.7), normal(3)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss = compiled(*leaves)
    torch.testing.assert_close(loss, step(*leaves))
    ours, theirs = torch.autograd.grad(loss, leaves), torch.autograd.grad(step(*leaves), leaves)
    assert all(gradient.abs().max() > 0 for gradient in theirs)
    torch.testing.assert_close(ours, theirs)


def test_the_default_compiler():
    x = normal(3, 6, 5).requires_grad_()
    loss = torch.compile(lambda x: softmax_margin_loss(x, OOD, form="bce"), fullgraph=True)(x)
    expected = softmax_margin_loss(x, OOD, form="bce")
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))


@pytest.mark.parametrize("head", ["weight", "centers"])
def test_head(head):
    def step(z, w):
        return linear_softmax_confidence(z, **{head: w}, background=0.2).square().sum()

    leaves = [normal(3, 6, 4).requires_grad_(), normal(5, 4).requires_grad_()]
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(step(*leaves), leaves))


def test_torch_func_inside():
    def gradients(x):
        return vmap(grad(lambda y: softmax_margin_loss(y, OOD, form="bce")))(x)

    x = normal(2, 3, 6, 5)
    torch.testing.assert_close(torch.compile(gradients, fullgraph=True, backend="aot_eager")(x), gradients(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_forward_mode_around_what_is_compiled_is_refused(backend):
    loss = torch.compile(lambda x: softmax_margin_loss(x, OOD), fullgraph=True, backend=backend)
    x = normal(3, 6, 5)
    loss(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="a compiled loss has no forward-mode derivative"):
        loss(forward_ad.make_dual(x, x))


def test_torch_func_inside_with_a_forced_backend():
    def gradient(x):
        return grad(lambda y: softmax_margin_loss(y, OOD, backend="cpu"))(x)

    with pytest.raises(Exception, match=r"cannot serve torch\.func inside torch\.compile"):
        torch.compile(gradient, fullgraph=True, backend="aot_eager")(normal(3, 6, 5))


@pytest.mark.usefixtures("cpu_way")
def test_autocast():
    layer = torch.nn.Linear(4, 5)
    z = normal(3, 6, 4)

    def gradients(backend):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = layer(z)
            assert logits.dtype == torch.bfloat16
            loss = softmax_margin_loss(logits, OOD, form="bce", backend=backend)
        assert loss.dtype == torch.float32
        return torch.autograd.grad(loss, layer.parameters())

    for ours, theirs in zip(gradients("cpu"), gradients("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-9)


def test_autocast_of_a_head():
    z, w = normal(3, 6, 4).requires_grad_(), normal(5, 4).requires_grad_()

    def gradients(backend):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = linear_softmax_confidence(z, w, backend=backend).square().sum()
        return torch.autograd.grad(loss, (z, w))

    for ours, theirs in zip(gradients("cpu"), gradients("reference"), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2**-5, atol=2**-6)
