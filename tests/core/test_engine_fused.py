"""The fused path against the generic one and a plain loop, for every network, head and loss that it takes."""

import copy

import pytest
import torch
from mdml_kernels import SoftmaxMarginLoss
from mdml_kernels.native import loader as native
from torch import Tensor, nn

from mdml_fast import MetaEngine
from mdml_fast.diagnosis import loop_meta_gradients
from mdml_fast.meta import paths
from mdml_fast.meta.encoders import ResidualEncoder
from mdml_fast.meta.heads import PrototypeHead
from mdml_fast.meta.paths import choose_path

ENCODERS = {
    "relu": lambda: nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)),
    "gelu, three layers": lambda: nn.Sequential(
        nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 7), nn.GELU(approximate="tanh"), nn.Linear(7, 4)
    ),
    "tanh at the end, no bias": lambda: nn.Sequential(nn.Linear(6, 9, bias=False), nn.Linear(9, 4), nn.Tanh()),
    "no bias at the end": lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4, bias=False)),
    "linear": lambda: nn.Linear(6, 4),
    "residual": lambda: residual(),
}
# Logits of a linear head: 2 for an embedding of 4 features are folded into the layer below, 5 are not.
HEADS = {"linear": 5, "narrow": 2, "prototype": None}
LOSSES = {
    "hinge": {"margin": 0.9, "learn_temperature": True},
    "hinge, fixed": {"margin": 0.9, "temperature": 0.7},
    "hinge, background": {"margin": 0.9, "background": -0.5, "learn_background": True},
    "pairwise, background": {"margin": 0.9, "form": "pairwise", "background": -0.5, "learn_background": True},
    "bce": {"form": "bce"},
    "mass": {"form": "bce", "confidence": "mass", "background": -2.0, "learn_background": True},
    "mass, hinge": {"confidence": "mass", "background": -1.0, "temperature": 2.0, "learn_temperature": True},
}


def residual() -> nn.Module:
    encoder = ResidualEncoder(6, 10)
    nn.init.normal_(encoder.outer.weight, std=0.1)
    nn.init.normal_(encoder.log_scale, std=0.1)
    return encoder


def engine(
    encoder: str, head: str, loss: str, inner_steps: int, weights: torch.dtype, **settings: object
) -> MetaEngine:
    torch.manual_seed(0)
    body = ENCODERS[encoder]()
    z = 6 if encoder == "residual" else 4
    top = PrototypeHead(1.5) if head == "prototype" else nn.Linear(z, HEADS[head], bias=encoder != "linear")
    margin = SoftmaxMarginLoss(**LOSSES[loss])
    return MetaEngine(body.to(weights), top.to(weights), inner_steps, 0.1, margin.to(weights), **settings)


def episodes(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    support, query = (torch.randn(n, rows, 6, generator=generator, dtype=dtype) for rows in (12, 15))
    return support, query, torch.rand(n, 15, generator=generator) < 0.4


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, floor: float = 0.01) -> None:
    """Relative to each gradient; one that vanishes (a prototype head does not see a shift of z) to the largest."""
    assert actual.keys() == expected.keys()
    least = floor * max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= tolerance * max(float(value.norm()), least), name


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradients_equal_a_loop_over_episodes(encoder: str, head: str, loss: str) -> None:
    for inner_steps in (0, 3):
        fused = engine(encoder, head, loss, inner_steps, torch.float64, path="fused")
        out = fused.meta_gradients(*episodes(3))
        losses, grads = loop_meta_gradients(fused, *episodes(3))
        torch.testing.assert_close(out.loss, losses, rtol=1e-10, atol=1e-12)
        assert_close(out.grads, grads, 1e-9)
        assert any(value.norm() > 0 for value in grads.values())


@pytest.mark.parametrize("n_directions", [None, 3])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("encoder", ["relu", "no bias at the end", "residual"])
def test_every_number_equals_the_generic_path(encoder: str, head: str, n_directions: int | None) -> None:
    """19 episodes: two whole groups and a part."""
    loss = "mass" if head == "prototype" else "hinge"
    direction = None if n_directions is None else torch.arange(19) % 3
    support, query, is_ood = episodes(19, torch.float32)
    outcomes = []
    for path in ("fused", "generic"):
        one = engine(encoder, head, loss, 5, torch.float32, n_directions=n_directions, path=path)
        for value in one.parameters().values():
            value.data *= torch.linspace(0.8, 1.2, value.numel()).view(value.shape)
        adapted = one.adapt(support, direction)
        logits = one.logits(adapted, query, support, direction)
        outcomes.append((one.meta_gradients(support, query, is_ood, direction), adapted, logits))
    (fused, adapted, logits), (generic, adapted_too, logits_too) = outcomes
    torch.testing.assert_close(fused.loss, generic.loss, rtol=1e-5, atol=1e-6)
    # With two logits the gradients to their biases cancel, but for a part in a hundred of what they are sums of.
    assert_close(fused.grads, generic.grads, 1e-5, floor=0.1 if head == "narrow" else 0.01)
    assert_close(adapted, adapted_too, 1e-5)
    torch.testing.assert_close(logits, logits_too, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_is_close_and_keeps_float32_weights(head: str) -> None:
    loss = "mass" if head == "prototype" else "hinge, fixed"  # which the compiled kernels take
    exact = engine("relu", head, loss, 3, torch.float32).meta_gradients(*episodes(9, torch.float32))
    for path in ("fused", "generic"):
        rough = engine("relu", head, loss, 3, torch.float32, dtype=torch.bfloat16, path=path)
        out = rough.meta_gradients(*episodes(9, torch.float32))
        assert_close(out.grads, exact.grads, 0.25)  # a ReLU or a margin that switches moves much
        assert all(value.dtype == torch.float32 for value in (*out.grads.values(), out.loss))
        assert not torch.equal(out.loss, exact.loss)


@pytest.mark.parametrize(
    ("widths", "biases"),
    [
        ((5, 7, 3), (True, True)),
        ((16, 9, 1), (True, False)),
        ((33, 70, 35), (False, True)),
        ((8, 6, 2), (False, False)),
    ],
)
@pytest.mark.parametrize("n_directions", [None, 3])
@pytest.mark.parametrize("loss", ["hinge, fixed", "hinge, background"])
def test_folded_layers(
    widths: tuple[int, int, int], biases: tuple[bool, bool], n_directions: int | None, loss: str
) -> None:
    """What the compiled kernels take, of odd widths, against float64 by the generic path."""
    support, query, is_ood = (torch.cat([rows] * 4, 1) for rows in episodes(11, torch.float32))  # many: folding pays
    direction = None if n_directions is None else torch.arange(11) % 3
    outcomes = []
    for path, dtype in (("fused", torch.float32), ("generic", torch.float64)):
        torch.manual_seed(0)
        n_in, n_embedding, n_logits = widths
        last = nn.Linear(n_in, n_embedding, bias=biases[0])
        encoder, head = (
            nn.Sequential(nn.Linear(6, n_in), nn.ReLU(), last),
            nn.Linear(n_embedding, n_logits, bias=biases[1]),
        )
        margin = SoftmaxMarginLoss(**(LOSSES[loss] | ({"background": -0.5} if n_logits == 1 else {})))
        one = MetaEngine(encoder, head, 4, 0.2, margin, n_directions=n_directions, path=path)
        one.modules.to(dtype)
        rows = support.to(dtype), query.to(dtype)
        before = one.meta_gradients(*rows, is_ood, direction)
        for value in one.parameters().values():  # in place, and as a view; nothing may be left of the earlier ones
            value.data = (1.1 * value.data.mT.contiguous()).mT if value.ndim > 1 else value.data
            value.data.add_(0.01)
        after = one.meta_gradients(*rows, is_ood, direction)
        outcomes.append((before, after, one.adapt(rows[0], direction), one))
    (earlier, fused, adapted, one), (exact_earlier, exact, adapted_too, _) = outcomes
    assert list(fused.grads) == list(one.parameters())
    folding = one._path._recipe.folds(one.values(), *support.shape[1:2], query.shape[1], n_directions is not None)
    assert folding
    kernels, programs = one._path._kernels[folding], getattr(one._path._kept, "programs", {}).values()
    assert bool(kernels._shapes) == bool(native.native().kernels)
    assert all(program.moves for program in programs)
    assert bool(programs) != bool(native.native().kernels)
    for actual, expected in ((earlier, exact_earlier), (fused, exact)):
        assert_close({name: value.double() for name, value in actual.grads.items()}, expected.grads, 1e-4)
    assert_close({name: value.double() for name, value in adapted.items()}, adapted_too, 1e-5)


@pytest.mark.parametrize("head", ["linear", "narrow"])
def test_a_direction_without_episodes_has_no_gradient_whatever_its_parameters(head: str) -> None:
    one = engine("relu", head, "hinge, fixed", 2, torch.float32, n_directions=3, path="fused")
    for value in one.parameters().values():
        value.data[2] = torch.nan
    grads = one.meta_gradients(*episodes(4, torch.float32), torch.tensor([0, 1, 0, 1])).grads
    assert all((grad[2] == 0).all() for grad in grads.values())
    assert all(grad[:2].abs().sum() > 0 for grad in grads.values())


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float32, torch.float64),
        (torch.float32, torch.float32, torch.float32, torch.float64),
    ],
)
@pytest.mark.parametrize("n_logits", [2, 5])
def test_dtypes_may_differ(dtypes: tuple[torch.dtype, ...], n_logits: int) -> None:
    """Of encoder, head, products and rows; gradients have their parameters'."""
    encoder, head, products, rows = dtypes
    torch.manual_seed(0)
    one = MetaEngine(
        ENCODERS["relu"]().to(encoder), nn.Linear(4, n_logits).to(head), 2, 0.1, SoftmaxMarginLoss(), dtype=products
    )
    assert one.choice.path == "fused"
    for value in one.parameters().values():
        if value.ndim == 1:  # zeros, in which a wrong dtype would not show
            value.data.normal_()
    given = episodes(3, rows)
    out = one.meta_gradients(*given)
    assert {name: grad.dtype for name, grad in out.grads.items()} == {
        name: value.dtype for name, value in one.parameters().items()
    }
    parts = (copy.deepcopy(one.modules[name]).double() for name in ("encoder", "head"))
    exact = MetaEngine(*parts, 2, 0.1, SoftmaxMarginLoss(), path="generic")
    _, expected = loop_meta_gradients(exact, *(tensor.double() for tensor in given[:2]), given[2])
    rough = torch.bfloat16 in dtypes
    assert_close({name: grad.double() for name, grad in out.grads.items()}, expected, 0.25 if rough else 1e-4)


def test_biases_of_another_dtype_are_no_weights() -> None:
    one = engine("relu", "linear", "hinge, fixed", 2, torch.float32, path="fused")
    for name, value in one.parameters().items():
        value.data = value.data.double() if name.endswith("bias") else value.data
    with pytest.raises(RuntimeError, match="dtype"):  # torch's own: products of both there are none
        one.meta_gradients(*episodes(3, torch.float32))


@pytest.mark.parametrize(
    ("encoder", "head", "match"),
    [
        ((6, 9, 8, 4), 4, "encoder.0 gives 9 features, and encoder.2 takes 8"),
        ((6, 9, 10, 4), 4, "encoder.0 gives 9 features, and encoder.2 takes 10"),
        ((6, 9, 9, 4), 5, "encoder.2 gives 4 features, and head takes 5"),
    ],
)
@pytest.mark.parametrize("n_directions", [None, 2])
def test_layers_that_do_not_fit_are_refused(
    encoder: tuple[int, ...], head: int, match: str, n_directions: int | None
) -> None:
    a, b, c, d = encoder
    with pytest.raises(ValueError, match=match):
        MetaEngine(
            nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(c, d)), nn.Linear(head, 3), n_directions=n_directions
        )


@pytest.mark.parametrize("encoder", ["relu", "gelu, three layers"])
def test_weights_may_lie_in_any_order(encoder: str) -> None:
    one = engine(encoder, "linear", "hinge, fixed", 2, torch.float32, path="fused")
    support, query, _ = episodes(3, torch.float32)
    adapted = one.adapt(support)
    expected = one.logits(adapted, query)
    turned = {name: value.mT.contiguous().mT if value.ndim == 3 else value for name, value in adapted.items()}
    torch.testing.assert_close(one.logits(turned, query), expected)
    head = one.parameters()["head.weight"]
    head.data = head.data.T.contiguous().T
    torch.testing.assert_close(one.logits(adapted, query), expected)


def test_results_are_not_overwritten_by_the_next_call() -> None:
    fused = engine("relu", "linear", "hinge", 2, torch.float32, path="fused")
    support, query, is_ood = episodes(9, torch.float32)
    adapted = fused.adapt(support)
    logits = fused.logits(adapted, query)
    out = fused.meta_gradients(support, query, is_ood)
    kept = [value.clone() for value in (*adapted.values(), logits, out.loss, *out.grads.values())]
    fused.meta_gradients(2 * support, query + 1, ~is_ood)
    fused.logits(fused.adapt(support - 1), query)
    for value, before in zip((*adapted.values(), logits, out.loss, *out.grads.values()), kept, strict=True):
        assert torch.equal(value, before)


def test_a_confident_inner_loop_keeps_its_digits() -> None:
    """Where S rounds to 1 the gradient is what is left of 1 - S."""
    exact, fused = (engine("linear", "linear", "hinge", 1, dtype) for dtype in (torch.float64, torch.float32))
    for one in (exact, fused):
        one.parameters()["head.weight"].data *= 20
        assert one.choice.path == "fused"
    support = episodes(2)[0]
    move = {name: value - exact.parameters()[name] for name, value in exact.adapt(support).items()}
    close = {name: value.double() - fused.parameters()[name] for name, value in fused.adapt(support.float()).items()}
    for name, value in move.items():
        assert value.norm() > 1e-3
        assert (close[name] - value).norm() < 1e-4 * value.norm()


@pytest.mark.parametrize(
    ("settings", "modules", "match"),
    [
        ({"first_order": False}, {}, "second order"),
        ({"decoder": nn.Linear(4, 6)}, {}, "decoder"),
        (
            {},
            {"encoder": nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4))},
            r"encoder \(Sequential\) is no Sequential of",
        ),
        ({}, {"encoder": nn.Sequential(nn.Linear(6, 4), nn.SiLU())}, "encoder"),
        ({}, {"head": nn.Sequential(nn.Linear(4, 5))}, "head"),
        ({"dtype": torch.float16}, {}, "float16 on cpu"),
        ({"loss": SoftmaxMarginLoss(backend="reference")}, {}, "backend 'auto'"),
    ],
)
def test_what_the_fused_path_cannot_do_is_refused_or_left_to_the_generic_one(
    settings: dict[str, object], modules: dict[str, nn.Module], match: str
) -> None:
    arguments = {"encoder": nn.Linear(6, 4), "head": nn.Linear(4, 5)} | modules | settings
    with pytest.raises(ValueError, match=match) as caught:
        MetaEngine(**arguments, path="fused")
    assert "\n" not in str(caught.value)
    assert MetaEngine(**arguments).choice.path == "generic"


@pytest.mark.parametrize("path", ["fused", "generic"])
def test_what_the_loss_refuses_of_logits_every_path_does(path: str) -> None:
    support, query, is_ood = episodes(3, torch.float32)

    def compute(head: nn.Module, n_support: int, **loss: object) -> Tensor:
        engine = MetaEngine(nn.Linear(6, 4), head, loss=SoftmaxMarginLoss(**loss), path=path)
        return engine.meta_gradients(support[:, :n_support], query, is_ood).loss

    for head, n_support in ((nn.Linear(4, 1), 9), (PrototypeHead(), 1)):
        with pytest.raises(ValueError, match=r"K = 1.*give background="):
            compute(head, n_support)
        assert compute(head, n_support, background=0.5).isfinite().all()
    with pytest.raises(ValueError, match=r"'mass' is .*give background"):
        compute(nn.Linear(4, 5), 9, confidence="mass")
    with pytest.raises(ValueError, match="confidence must be one of"):
        compute(nn.Linear(4, 5), 9, confidence="mean")


def test_the_choice_of_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = MetaEngine(nn.Linear(6, 4), nn.Linear(4, 5)).modules
    monkeypatch.setattr(paths, "triton_state", lambda: "compiler")
    assert choose_path(modules, "cpu", torch.float32, True).path == "fused"
    assert choose_path(modules, "cuda", torch.bfloat16, True).path == "fused"
    assert choose_path(modules, "mps", torch.float32, True) == ("generic", "float32 on mps has only the generic path")
    assert choose_path(modules, "cpu", torch.float32, True, "generic") == ("generic", "asked for")
    with pytest.raises(ValueError, match="path must be one of 'auto', 'generic', 'fused', got 'fast'"):
        choose_path(modules, "cpu", torch.float32, True, "fast")
    monkeypatch.setattr(paths, "triton_state", lambda: None)
    assert choose_path(modules, "cpu", torch.float32, True).path == "fused"
    path, reason = choose_path(modules, "cuda", torch.float32, True)
    assert (path, "Triton" in reason) == ("generic", True)
