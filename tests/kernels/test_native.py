"""The CPU's compiled kernels, each against float64."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mdml_kernels import softmax_margin_loss
from mdml_kernels.native import calls, encoders, episodes, layers, prototypes, rows, views
from mdml_kernels.native.neighbours import NeighbourSearch

WIDTHS = st.integers(1, 40)


@settings(deadline=None, max_examples=60)
@given(n_episodes=st.integers(1, 3), n=WIDTHS, n_in=WIDTHS, n_out=WIDTHS, shared=st.booleans(), data=st.data())
def test_layers(n_episodes, n, n_in, n_out, shared, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    x, grad = normal(n_episodes, n, n_in), normal(n_episodes, n, n_out)
    own = () if shared else (n_episodes,)
    weight, bias = normal(*own, n_out, n_in), normal(*own, 1, n_out)
    out, pulled = torch.empty_like(grad), torch.empty_like(x)
    layers.forward(x, weight, bias, True, out)
    close(out, (x.double() @ weight.double().mT + bias.double()).relu(), n_in)
    layers.pull(grad, weight, x, pulled)
    close(pulled, (grad.double() @ weight.double()) * (x > 0), n_out)
    new_weight, new_bias = normal(n_episodes, n_out, n_in), normal(n_episodes, 1, n_out)
    layers.step(grad, x, -0.5, (weight, bias), (new_weight, new_bias))
    close(new_weight, weight.double() - 0.5 * grad.double().mT @ x.double(), n)
    close(new_bias, bias.double() - 0.5 * grad.double().sum(1, keepdim=True), n)
    layers.step(grad, x, -0.5, (None, None), (new_weight, None))
    close(new_weight, -0.5 * grad.double().mT @ x.double(), n)


def close(actual, expected, depth):
    """Entries of unit size, of sums of so many products."""
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-6 * (1 + depth))


def test_a_layer_steps_in_place():
    x, grad, weight = torch.randn(2, 7, 5), torch.randn(2, 7, 3), torch.randn(2, 3, 5)
    expected = weight + 0.1 * grad.mT @ x
    layers.step(grad, x, 0.1, (weight, None), (weight, None))
    torch.testing.assert_close(weight, expected)


def test_a_layer_whose_shapes_do_not_fit_is_refused():
    x, grad, weight, bias = (torch.randn(shape) for shape in ((2, 7, 5), (2, 7, 3), (2, 3, 5), (2, 1, 3)))
    for change in (
        {"weight": weight[..., :4]},
        {"weight": weight[:1]},
        {"weight": torch.randn(3, 6)},
        {"bias": bias[:1]},
        {"bias": torch.randn(1, 4)},
        {"rows": x.half()},
        {"rows": torch.randn(2, 8, 5)},
    ):
        given = {"rows": x, "weight": weight, "bias": bias} | change
        with pytest.raises(ValueError, match="must be"):
            layers.forward(**given, rectify=True, out=grad)
    for given in ((grad, weight[:1], None, x), (grad, weight, x[:1], x), (grad[:, :6], weight, None, x)):
        with pytest.raises(ValueError, match="must be"):
            layers.pull(*given)
    for old, new in (
        ((weight[:1], bias), (weight, bias)),
        ((weight, bias[..., :2]), (weight, bias)),
        ((None, None), (weight[:1], None)),
        ((None, None), (weight, bias.squeeze(1))),
    ):
        with pytest.raises(ValueError, match="must be"):
            layers.step(grad, x, 1.0, old, new)
    with pytest.raises(ValueError, match="rows must be"):
        layers.step(grad, x[:1], 1.0, (None, None), (weight, None))


def test_episodes_whose_shapes_do_not_fit_are_refused():
    rows, is_ood, inner = torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.bool), episodes.InnerLoop(1, 0.1, "max")
    first, head = (
        episodes.MlpLayer(torch.randn(6, 4), torch.randn(1, 6), True),
        episodes.MlpLayer(torch.randn(3, 6), None, False),
    )
    given = {"support": rows, "query": rows, "is_ood": is_ood, "tau": None, "background": None}
    for made, change in (
        ([head], {}),
        ([first, first], {}),
        ([first._replace(bias=torch.randn(1, 5)), head], {}),
        ([first, head._replace(weight=torch.randn(3, 3, 6))], {}),
        ([first, head._replace(metric=torch.randn(2, 2))], {}),
        ([first, head], {"query": rows[:1]}),
        ([first, head], {"query": rows.half()}),
        ([first, head], {"is_ood": is_ood[:, :4]}),
        ([first, head], {"tau": torch.ones(1)}),
        ([first, head], {"background": torch.ones(1)}),
    ):
        with pytest.raises(ValueError, match="must be"):
            episodes.meta_gradients(made, inner, **(given | change), margin=0.5, group=1)


def test_encoders_and_views_whose_shapes_do_not_fit_are_refused():
    shapes = {"inner": (2, 6, 4), "bias": (2, 6), "outer": (2, 4, 6), "log_scale": (2, 4)}
    parts, rows = {name: torch.randn(shape) for name, shape in shapes.items()}, torch.randn(2, 5, 4)
    settings = {"variance": torch.ones(2), "tau": None, "background": torch.zeros(2)}
    is_ood = torch.zeros(2, 5, dtype=torch.bool)
    for name in shapes:
        fewer = parts | {name: parts[name][:1]}
        if name != "inner":
            with pytest.raises(ValueError, match=f"{name} must be"):
                encoders.residual_encoders(rows, **fewer)
            with pytest.raises(ValueError, match=f"{name} must be"):
                encoders.pull_back(rows, rows, **fewer)
        with pytest.raises(ValueError, match=f"{name} must be"):
            prototypes.gradients(
                prototypes.ResidualEncoder(**fewer), support=rows, query=rows, is_ood=is_ood, **settings
            )
    whole = prototypes.ResidualEncoder(**parts)
    for change in ({"query": rows[:1]}, {"is_ood": is_ood[:1]}, {"variance": torch.ones(1)}, {"tau": torch.ones(1)}):
        with pytest.raises(ValueError, match="must be"):
            prototypes.gradients(whole, **({"support": rows, "query": rows, "is_ood": is_ood} | settings | change))
    fitted = {"knots": (4, 8), "levels": (4, 8), "mean": (4,), "whitening": (4, 4), "scales": (4,)}
    tensors = {name: torch.rand(shape) for name, shape in fitted.items()}
    for name in fitted:
        with pytest.raises(ValueError, match="must"):
            views.views(rows[0], **tensors | {name: tensors[name][:2]}, clip=3.0)
    with pytest.raises(ValueError, match="references must be"):
        NeighbourSearch(rows[0].half())


@pytest.mark.parametrize("n_classes", [1, 2, 15, 16, 17, 63, 64, 65, 300])
def test_statistics(n_classes):
    """Both ways with a row, on either side of every edge; ties, infinities, numbers far apart."""
    logits = 3 * torch.randn(2, 21, n_classes, generator=torch.Generator().manual_seed(n_classes))
    logits[0, 3] = 1.5  # all the same
    logits[0, 4, : n_classes - 1] = -torch.inf
    logits[0, 5, -1] = 3e4
    logits[0, 6, 0] = torch.nan
    tau = torch.tensor([0.7, 1.3])
    top, peak, total, first = rows.statistics(logits, tau, "max")
    x = logits.double() * tau.double()[:, None, None]
    torch.testing.assert_close(first[0, 7:], x[0, 7:].argmax(-1))
    assert first[0, 3] == 0
    whole = torch.ones(2, 21, dtype=torch.bool)
    whole[0, 6] = False
    assert total[0, 6].isnan()
    torch.testing.assert_close(top[whole], x.amax(-1)[whole].float())
    others = x.scatter(-1, first.unsqueeze(-1), torch.finfo(torch.float32).min).logsumexp(-1)
    log_sum = peak.double() + total.double().log()
    torch.testing.assert_close(log_sum[whole], others[whole], rtol=1e-6, atol=2e-6)
    _, peak, total, _ = rows.statistics(logits, tau, "mass")
    log_all = peak.double() + total.double().log()
    torch.testing.assert_close(log_all[whole], x.logsumexp(-1)[whole], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("size", [(3, 5000, 16), (5, 700, 130)])
def test_threads_change_no_bit(size):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(1))
    is_ood = torch.arange(size[1]).expand(size[:2]) % 3 == 0
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = logits.clone().requires_grad_()
            softmax_margin_loss(leaf, is_ood, form="pairwise", background=0.1).backward()
            hinge = softmax_margin_loss(leaf, is_ood, reduction="none")
            results.append((leaf.grad, hinge.detach()))
    finally:
        torch.set_num_threads(before)
    for grad, hinge in results[1:]:
        assert torch.equal(grad, results[0][0])
        assert torch.equal(hinge, results[0][1])


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("confidence", ["max", "mass"])
def test_adapt_equals_autograd(bfloat16, confidence):
    """Three layers, an odd number of rows, a bias here and there, the weights stacked in one and shared in another."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator) / 3

    n_episodes, n = 3, 13
    weights = [normal(10, 6), normal(n_episodes, 18, 10), normal(4, 18), normal(20, 4)]
    biases = [normal(1, 10), None, normal(1, 4), None]
    owns = [
        (w.new_empty(n_episodes, *w.shape[-2:]), None if b is None else b.new_empty(n_episodes, *b.shape[-2:]))
        for w, b in zip(weights[:-1], biases[:-1], strict=True)
    ]
    made = [
        episodes.MlpLayer(w, b, i in (0, 1), own)
        for i, (w, b, own) in enumerate(zip(weights, biases, [*owns, None], strict=True))
    ]
    support, tau, background = normal(n_episodes, n, 6), torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.1, 0.2, 0.3])
    episodes.adapt(made, episodes.InnerLoop(4, 0.3, confidence, bfloat16), support, tau, background)

    for episode in range(n_episodes):
        params = [
            None if p is None else (p[episode] if p.ndim == 3 else p).double().requires_grad_()
            for pair in zip(weights[:-1], biases[:-1], strict=True)
            for p in pair
        ]
        for _ in range(4):
            z = support[episode].double()
            for i in range(3):
                z = z @ params[2 * i].mT + (0 if params[2 * i + 1] is None else params[2 * i + 1])
                z = z.relu() if i < 2 else z
            x = torch.cat([z @ weights[3].double().mT * tau[episode], background[episode].double().expand(n, 1)], -1)
            p = x.softmax(-1)
            s = p[:, :-1].amax(-1) if confidence == "max" else 1 - p[:, -1]
            given_params = [p for p in params if p is not None]
            steps = iter(torch.autograd.grad(-s.log().mean(), given_params))
            params = [None if p is None else (p - 0.3 * next(steps)).detach().requires_grad_() for p in params]
        actual = [value for own in owns for value in own]
        tolerance = 3e-2 if bfloat16 else 2e-6
        for value, expected in zip(actual, params, strict=True):
            if expected is not None:
                error = (value[episode].double() - expected).norm() / expected.norm()
                assert error < tolerance


def test_a_part_of_a_call_holds_its_memory(monkeypatch):
    """It goes on where the caller is interrupted, and what it reads and writes must not be another's by then."""
    parts, head = [], episodes.MlpLayer(torch.randn(3, 4), torch.randn(1, 3), False)
    monkeypatch.setattr(calls, "shared", lambda run, n, least: parts.append(run))
    rows, is_ood = [torch.randn(2, 5, 4) for _ in range(2)], torch.zeros(2, 5, dtype=torch.bool)
    inner = episodes.InnerLoop(0, 0.1, "max")
    out = episodes.meta_gradients([head], inner, *rows, is_ood, None, torch.zeros(2), 0.5, 1)
    held = [weakref.ref(tensor) for tensor in (head.weight, head.bias, *rows, is_ood, *out)]
    del head, rows, is_ood, out
    gc.collect()
    assert all(reference() is not None for reference in held)
    parts.clear()
    gc.collect()
    assert all(reference() is None for reference in held)


@settings(deadline=None, max_examples=60)
@given(n_views=st.integers(1, 2), n=st.integers(1, 100), d=WIDTHS, h=WIDTHS, data=st.data())
def test_residual_encoders(n_views, n, d, h, data):
    """Two to a view. Sums in float64 differ by their order in the last bits, which one rounding rarely lets through."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    sizes = [(n_views, n, d), (2 * n_views, h, d), (2 * n_views, h), (2 * n_views, d, h), (2 * n_views, d)]
    x, inner, bias, outer, log_scale = (torch.randn(size, generator=generator) for size in sizes)
    found = encoders.residual_encoders(x, inner, bias, outer, log_scale)
    wide = x.double().repeat(2, 1, 1)
    hidden = (wide @ inner.double().mT + bias.double().unsqueeze(1)).relu()
    expected = hidden @ outer.double().mT + wide * log_scale.double().exp().unsqueeze(1)
    torch.testing.assert_close(found, expected.float(), rtol=1.2e-7, atol=1e-12)
    row = data.draw(st.integers(0, n - 1))
    alone = encoders.residual_encoders(x[:, row : row + 1], inner, bias, outer, log_scale)
    assert torch.equal(found[:, row : row + 1], alone)


@settings(deadline=None, max_examples=60)
@given(n_views=st.integers(1, 2), n=st.integers(1, 100), d=WIDTHS, h=WIDTHS, data=st.data())
def test_pull_back(n_views, n, d, h, data):
    """Its product with the step is the squared distance between what the encoders make of both ends."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    sizes = [(n_views, n, d), (n_views, n, d), (2 * n_views, h, d), (2 * n_views, h), (2 * n_views, d, h)]
    x, steps, inner, bias, outer = (torch.randn(size, generator=generator) for size in sizes)
    steps *= torch.rand(sizes[0], generator=generator) < 0.5  # what does not differ adds nothing
    log_scale = 0.1 * torch.randn(2 * n_views, d, generator=generator)
    weights = encoders.pull_back(x, steps, inner, bias, outer, log_scale)
    ends = (encoders.residual_encoders(rows, inner, bias, outer, log_scale) for rows in (x, x - steps))
    first, second = (end.double() for end in ends)
    added = (weights.double() * steps.double().repeat(2, 1, 1)).sum(-1)
    torch.testing.assert_close(added, (first - second).square().sum(-1), rtol=1e-3, atol=1e-3)
    row = data.draw(st.integers(0, n - 1))
    here = slice(row, row + 1)
    alone = encoders.pull_back(x[:, here], steps[:, here], inner, bias, outer, log_scale)
    assert torch.equal(weights[:, here], alone)
