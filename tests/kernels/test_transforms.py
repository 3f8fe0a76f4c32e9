"""Every transform of torch.func, and their nestings, give with the CPU backend what they give with the definition.

With those of `test_compile.py` these tests stand for the table in kernels/README.md.
"""

import os

import pytest
import torch
from mdml_kernels import linear_softmax_confidence, one_class_loss, softmax_margin_loss
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree

# The interpreter's test runs this file once more with the Triton backend.
BACKEND = os.environ.get("MDML_TEST_BACKEND", "cpu")
GENERATOR = torch.Generator().manual_seed(0)
BATCH, EPISODES, ROWS, CLASSES = 2, 3, 6, 5


def double(*size):
    return torch.randn(size, generator=GENERATOR, dtype=torch.float64)


X = double(BATCH, EPISODES, ROWS, CLASSES)
T, TB = torch.tensor(0.7, dtype=torch.float64), double(BATCH).abs() + 0.5
B, BB = double(EPISODES), double(BATCH, EPISODES)
OOD, OODB = (torch.rand(size, generator=GENERATOR) < 0.4 for size in ((EPISODES, ROWS), (BATCH, EPISODES, ROWS)))


def loss_of(backend, form, reduction="mean"):
    def loss(x, t=T, b=B, is_ood=OOD):
        return softmax_margin_loss(
            x, is_ood, margin=0.9, temperature=t, background=b, form=form, reduction=reduction, backend=backend
        )

    return loss


def thrice(loss):
    """The gradient of the second derivative along two directions."""

    def second(x):
        along = X[1].to(x.dtype)
        return (grad(lambda y: (grad(loss)(y) * along).sum())(x) * along).sum()

    return grad(second)


def dual(loss):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(X[0], X[1]))).tangent


def twice_by_autograd(loss):
    x = X[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)


def meta(loss, backend):
    """Two inner steps per episode under vmap, then the outer gradient and its Jacobian through them."""
    z, w = X[..., :4], X[0, 0, :4]

    def one(z, w):
        for inner in (loss, lambda y: one_class_loss(y, temperature=T, backend=backend)):
            w = w - 0.5 * grad(lambda w, inner=inner: inner(z @ w))(w)
        return loss(z @ w)

    outer = grad(lambda w: vmap(one, in_dims=(0, None))(z, w).mean())
    return outer(w), jacrev(outer)(w)


TRANSFORMS = {
    "grad": lambda f: grad(f, argnums=(0, 1, 2))(X[0], T, B),
    "vjp": lambda f: vjp(f, X[0])[1](torch.tensor(2.0, dtype=torch.float64)),
    "vmap": lambda f: vmap(f)(X),
    "vmap grad": lambda f: vmap(grad(f))(X),
    "vmap grad, is_ood batched": lambda f: vmap(grad(f, argnums=(0, 1, 2)), (0, None, None, 0))(X, T, B, OODB),
    "vmap grad, only is_ood batched": lambda f: vmap(grad(f, argnums=(0, 1)), (None, None, None, 0))(X[0], T, B, OODB),
    "vmap grad, only scalings batched": lambda f: vmap(grad(f, argnums=(0, 1, 2)), (None, 0, 0))(X[0], TB, BB),
    "vmap vmap grad": lambda f: vmap(vmap(grad(f, argnums=(0, 1)), (0, None)), (None, 0))(X, TB),
    "vmap grad, other dims": lambda f: vmap(grad(f), in_dims=3, out_dims=1)(X.movedim(0, 3)),
    "vmap grad, chunks": lambda f: vmap(grad(f), chunk_size=1)(X),
    "jacrev": lambda f: jacrev(f.each, argnums=(0, 1, 2))(X[0], T, B),
    "jacfwd": lambda f: jacfwd(f.each, argnums=(0, 1, 2))(X[0], T, B),
    "jvp": lambda f: jvp(f, (X[0], T, B), (X[1], T, B)),
    "jvp jvp": lambda f: jvp(lambda y: jvp(f, (y,), (X[1],))[1], (X[0],), (X[1],)),
    "forward mode of autograd": lambda f: dual(f),
    "hessian": lambda f: hessian(f, argnums=(0, 1, 2))(X[0], T, B),
    "vmap hessian": lambda f: vmap(hessian(f))(X),
    "jacrev jacrev": lambda f: jacrev(jacrev(f))(X[0]),
    "jacrev jacfwd": lambda f: jacrev(jacfwd(f))(X[0]),
    "jacfwd jacfwd": lambda f: jacfwd(jacfwd(f))(X[0]),
    "third derivative": lambda f: thrice(f)(X[0]),
    "jvp of the third derivative": lambda f: jvp(thrice(f), (X[0],), (X[1],)),
    "create_graph": lambda f: twice_by_autograd(f),
}


def assert_same(ours, theirs):
    for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", ["hinge", "pairwise", "bce"])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.usefixtures("operators")
def test_transform(name, form):
    def run(backend):
        loss = loss_of(backend, form)
        loss.each = loss_of(backend, form, "none")
        return TRANSFORMS[name](loss)

    theirs = run("reference")
    assert any(leaf.abs().max() > 1e-3 for leaf in pytree.tree_leaves(theirs)), "nothing to compare"
    assert_same(run(BACKEND), theirs)


@pytest.mark.parametrize("form", ["hinge", "pairwise", "bce"])
@pytest.mark.usefixtures("cpu_way")
def test_meta_gradient(form):
    assert_same(meta(loss_of("cpu", form), "cpu"), meta(loss_of("reference", form), "reference"))


@pytest.mark.parametrize("form", ["hinge", "pairwise", "bce"])
@pytest.mark.usefixtures("cpu_way")
def test_vmap_is_a_loop(form):
    gradient = grad(loss_of("cpu", form), argnums=(0, 1, 2))
    together = vmap(gradient, (0, 0, 0, 0))(X, TB, BB, OODB)
    one_by_one = [gradient(X[i], TB[i], BB[i], OODB[i]) for i in range(BATCH)]
    assert_same(together, tuple(torch.stack(parts) for parts in zip(*one_by_one, strict=True)))


def squares(f):
    return lambda *arguments: f(*arguments).square().sum()


HEADS = {
    "grad": lambda f, x, w, t, b: grad(squares(f), argnums=(0, 1, 2, 3))(x[0], w[0], t[0], b[0]),
    "vmap over z": lambda f, x, w, t, b: vmap(grad(squares(f), argnums=(0, 1)), (0, None))(x, w[0]),
    "vmap over the head": lambda f, x, w, t, b: vmap(grad(squares(f), argnums=(0, 1)), (None, 0))(x[0], w),
    "vmap over both": lambda f, x, w, t, b: vmap(grad(squares(f), argnums=(0, 1)))(x, w),
    "vmap over scalings": lambda f, x, w, t, b: vmap(grad(squares(f), argnums=(1, 2, 3)), (None, None, 0, 0))(
        x[0], w[0], t, b
    ),
    "jacrev": lambda f, x, w, t, b: jacrev(f, argnums=(0, 1, 2, 3))(x[0], w[0], t[0], b[0]),
    "jacfwd": lambda f, x, w, t, b: jacfwd(f, argnums=(0, 1, 2, 3))(x[0], w[0], t[0], b[0]),
    "jvp": lambda f, x, w, t, b: jvp(f, (x[0], w[0]), (x[1], w[1])),
    "hessian": lambda f, x, w, t, b: hessian(squares(f), argnums=(0, 1))(x[0], w[0], t[0], b[0]),
    "third derivative": lambda f, x, w, t, b: thrice(lambda z: squares(f)(z, w[0]))(x[0]),
}


@pytest.mark.parametrize("head", ["weight", "centers"])
@pytest.mark.parametrize("name", HEADS)
def test_head(name, head):
    leaves = (X, double(BATCH, 4, CLASSES), TB, BB)

    def run(backend, dtype):
        x, w, t, b = (leaf.to(dtype) for leaf in leaves)

        def confidence(z, w, t=t[0], b=b[0]):
            return linear_softmax_confidence(z, **{head: w}, temperature=t, background=b, backend=backend)

        return HEADS[name](confidence, x, w, t, b)

    theirs = run("reference", torch.float64)
    if BACKEND == "triton":  # its heads take float32
        for a, b in zip(pytree.tree_leaves(run(BACKEND, torch.float32)), pytree.tree_leaves(theirs), strict=True):
            assert (a.double() - b).abs().max() <= 1e-5 * b.abs().max()
    else:
        assert_same(run(BACKEND, torch.float64), theirs)


OLD = {
    "is_grads_batched": lambda f, x: torch.autograd.grad(f(x), x, torch.eye(EPISODES).to(x), is_grads_batched=True)[0],
    "jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "jacobian forwards": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "hessian": lambda f, x: torch.autograd.functional.hessian(squares(f), x, vectorize=True),
}


@pytest.mark.parametrize("form", ["hinge", "pairwise", "bce", "head"])
@pytest.mark.parametrize("name", OLD)
def test_the_vmap_of_before_torch_func_is_refused_or_right(name, form):
    def f(x, backend=BACKEND):
        if form == "head":
            return linear_softmax_confidence(x, x[0, :4].detach(), backend=backend).mean(-1)
        return softmax_margin_loss(x, OOD, margin=0.9, form=form, reduction="none", backend=backend)

    def theirs(x):
        return f(x, "reference")

    x = X[0].clone().requires_grad_()
    expected = hessian(squares(theirs))(x) if name == "hessian" else jacrev(theirs)(x)
    assert_same(OLD[name](theirs, x), expected)
    if BACKEND == "cpu" and form in ("hinge", "pairwise"):  # few logits go by PyTorch's own operations
        assert_same(OLD[name](f, x), expected)
    with pytest.raises(RuntimeError, match=r"use torch\.func"):
        OLD[name](f, x.float())


@pytest.mark.usefixtures("operators")
def test_the_vmap_of_before_torch_func_is_refused():
    x = X[0].clone().requires_grad_()
    losses = loss_of("cpu", "hinge", "none")(x)
    with pytest.raises(RuntimeError, match=r"use torch\.func"):
        torch.autograd.grad(losses, x, torch.eye(EPISODES, dtype=torch.float64), is_grads_batched=True)
