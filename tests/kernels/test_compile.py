"""torch.compile(fullgraph=True) and autocast give what eager mode gives."""

import copy
import os

import pytest
import torch
from mdml_kernels import SoftmaxMarginLoss, compiled, linear_softmax_confidence, softmax_confidence, softmax_margin_loss
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.library import opcheck

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

# The interpreter's test runs this file once more with the Triton backend.
BACKENDS = ("triton",) if os.environ.get("MDML_TEST_BACKEND") == "triton" else ("auto", "reference")
OURS = BACKENDS[0]
OOD = torch.arange(6).expand(3, 6) % 3 == 0


def normal(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("confidence", ["max", "mass"])
@pytest.mark.parametrize("form", ["hinge", "pairwise", "bce"])
@pytest.mark.parametrize("backend", BACKENDS)
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


class Model(torch.nn.Module):
    """Three layers and the loss."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))
        learned = {"temperature": 0.7, "learn_temperature": True, "background": 0.3, "learn_background": True}
        self.loss = SoftmaxMarginLoss(margin=0.9, **learned, **options)

    def forward(self, rows, is_ood):
        return self.loss(self.layers(rows), is_ood)


def exactly(model):
    """The same in float64, by the definition."""
    exact = copy.deepcopy(model).double()
    exact.loss.backend = "reference"
    return exact


def loss_and_gradients(model, rows, is_ood, parameters_of=None):
    loss = model(rows, is_ood)
    return loss, *torch.autograd.grad(loss, list((parameters_of or model).parameters()))


MODELS = {
    # The default compiler, once for all shapes; others, which are quick, for each, until a size is seen to change.
    "hinge": ({"form": "hinge"}, {"dynamic": True}),
    "bce, mass": ({"form": "bce", "confidence": "mass"}, {"backend": "aot_eager"}),
    "hinge by the definition": ({"form": "hinge", "backend": "reference"}, {"backend": "aot_eager"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_ends_in_the_loss(name):
    options, compiler = MODELS[name]
    model = Model(**options)
    compiled = torch.compile(model, fullgraph=True, **compiler)
    exact = exactly(model)
    # Other values, then other numbers of rows, then of episodes.
    for seed, (episodes, rows) in enumerate([(3, 6), (3, 6), (3, 9), (3, 14), (2, 11)]):
        x = torch.randn(episodes, rows, 4, generator=torch.Generator().manual_seed(seed))
        is_ood = torch.rand(episodes, rows, generator=torch.Generator().manual_seed(seed)) < 0.4
        ours = loss_and_gradients(compiled, x, is_ood, model)
        theirs = loss_and_gradients(exact, x.double(), is_ood)
        # A derivative by a number is a sum of terms of both signs, which may leave little of them.
        least = 0.01 * max(b.abs().max() for b in theirs)
        for name, a, b in zip(["loss", *dict(model.named_parameters())], ours, theirs, strict=True):
            assert b.abs().max() > 1e-4, name
            assert (a.double() - b).abs().max() <= 1e-5 * max(b.abs().max(), least), name


def test_a_compiled_model_under_autocast():
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, exact = normal(3, 6, 4), exactly(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, eager = loss_and_gradients(compiled, x, OOD, model), loss_and_gradients(model, x, OOD)
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-7)
    assert {value.dtype for value in ours} == {torch.float32}
    # Together: in the derivative by a number, a sum of terms of both signs, rounding weighs more.
    ours, theirs = (
        torch.cat([value.flatten().double() for value in values])
        for values in (ours, loss_and_gradients(exact, x.double(), OOD))
    )
    assert 2**-12 < (ours - theirs).norm() / theirs.norm() < 2**-7  # rounded to bfloat16, and no more than that


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", ["weight", "centers"])
def test_head(head, backend):
    def step(z, w):
        return linear_softmax_confidence(z, **{head: w}, background=0.2, backend=backend).square().sum()

    leaves = [normal(3, 6, 4).requires_grad_(), normal(5, 4).requires_grad_()]
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(step(*leaves), leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_compiled_is_one_operator_and_the_definition_none(backend):
    operators = []

    def look(graph, _):
        operators.extend(str(node.target) for node in graph.graph.nodes if "mdml_kernels" in str(node.target))
        return graph

    def step(x):
        loss = softmax_margin_loss(x, OOD, backend=backend)
        return loss + linear_softmax_confidence(x, x[0, :4].detach(), backend=backend).sum()

    x = normal(3, 6, 5).requires_grad_()
    value = torch.compile(step, fullgraph=True, backend=look)(x)
    torch.testing.assert_close(torch.autograd.grad(value, x), torch.autograd.grad(step(x), x))
    assert operators == ([] if backend == "reference" else ["mdml_kernels.row_odds.default"] * 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_and_vmap_around_what_is_compiled_are_refused(backend):
    loss = torch.compile(lambda x: softmax_margin_loss(x, OOD, backend=backend), fullgraph=True, backend="aot_eager")
    x = normal(3, 6, 5).requires_grad_()
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|not have been used in the graph"):
        torch.autograd.grad(first.square().sum(), x)
    with pytest.raises(RuntimeError, match=r"torch\.func\.vmap"):
        vmap(loss)(normal(2, 3, 6, 5))


def test_torch_func_inside():
    def gradients(x):
        return vmap(grad(lambda y: softmax_margin_loss(y, OOD, form="bce")))(x)

    x = normal(2, 3, 6, 5)
    torch.testing.assert_close(torch.compile(gradients, fullgraph=True, backend="aot_eager")(x), gradients(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_forward_mode_around_what_is_compiled_is_refused(backend):
    loss = torch.compile(lambda x: softmax_margin_loss(x, OOD, backend=OURS), fullgraph=True, backend=backend)
    x = normal(3, 6, 5)
    loss(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="a compiled loss has no forward-mode derivative"):
        loss(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_forward_mode_around_the_compiled_definition(backend):
    def loss(x):
        return softmax_margin_loss(x, OOD, backend="reference")

    x = normal(3, 6, 5)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, x)))
    torch.testing.assert_close((found.primal, found.tangent), jvp(loss, (x,), (x,)))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_torch_func_inside_with_a_forced_backend(backend):
    def gradient(x):
        return grad(lambda y: softmax_margin_loss(y, OOD, backend=backend))(x)

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

    for ours, theirs in zip(gradients(OURS), gradients("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-9)


def test_autocast_of_a_head():
    z, w = normal(3, 6, 4).requires_grad_(), normal(5, 4).requires_grad_()

    def gradients(backend):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = linear_softmax_confidence(z, w, backend=backend).square().sum()
        return torch.autograd.grad(loss, (z, w))

    for ours, theirs in zip(gradients(OURS), gradients("reference"), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2**-5, atol=2**-6)


@pytest.mark.parametrize("kind", ["CpuLogOdds", "CpuLinearLogOdds"])
@pytest.mark.parametrize("confidence", ["max", "mass"])
def test_a_compiler_is_told_what_the_operator_does(kind, confidence):
    if kind == "CpuLogOdds":
        given = [normal(2, 7, 5), torch.ones(2), torch.zeros(2)]
    else:
        given = [normal(1, 7, 4), normal(1, 5, 4), normal(1, 5), torch.ones(1, 7), torch.zeros(1, 7)]
    leaves = [value.requires_grad_() for value in given]
    opcheck(compiled._forward, (leaves, [True] * len(leaves), kind, confidence))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_serves_other_rows():
    """As `torch.onnx.export(dynamo=False)` and TensorBoard record a model."""
    layer = torch.nn.Linear(4, 5).requires_grad_(False)

    def call(z, is_ood):
        logits = layer(z)
        return softmax_confidence(logits), softmax_margin_loss(logits, is_ood, background=0.5)

    traced = torch.jit.trace(call, (normal(3, 6, 4), OOD), check_trace=False)
    other, is_ood = normal(3, 9, 4), torch.arange(9).expand(3, 9) % 2 == 0
    torch.testing.assert_close(traced(other, is_ood), call(other, is_ood))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_trace_with_a_forced_backend(backend):
    with pytest.raises(ValueError, match=r"cannot serve torch\.jit\.trace: leave it 'auto'"):
        torch.jit.trace(lambda x: softmax_confidence(x, backend=backend), (normal(3, 6, 5),))
