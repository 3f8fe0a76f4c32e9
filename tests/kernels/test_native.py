"""The CPU's compiled kernels: how they come about, and each of them against float64."""

import ctypes
import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mdml_kernels import softmax_margin_loss
from mdml_kernels.native import calls, encoders, episodes, layers, loader, neighbours, prototypes, rows, views
from mdml_kernels.native.neighbours import NeighbourSearch

WIDTHS = st.integers(1, 40)


def test_a_compiler_is_found():
    assert loader.native().kernels is not None, loader.native().reason


@pytest.fixture(scope="module")
def loss_without(tmp_path_factory):
    """The loss of `status` without compiled kernels."""
    return status(tmp_path_factory.mktemp("without"), MDML_NATIVE="0")[0]


def status(tmp_path, before="", **environment):
    """What a fresh process says of its kernels, and a loss by them; before: what it does first."""
    code = before + (
        "import torch; from mdml_kernels import softmax_margin_loss; from mdml_kernels.native.loader import native;"
        "x = torch.arange(24.).view(1, 4, 6).sin(); ood = torch.tensor([[False, True, False, True]]);"
        "print(softmax_margin_loss(x, ood).item(), '|', native().kernels is not None, '|', native().reason)"
    )
    changed = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=changed)
    loss, found, reason = done.stdout.split("|")
    return float(loss), found.strip() == "True", reason.strip()


def test_compiled_once_and_kept(tmp_path, loss_without):
    loss, found, reason = status(tmp_path)
    assert found, reason
    (kept,) = (tmp_path / "cache" / "mdml-kernels").iterdir()
    made = kept.stat().st_mtime_ns
    assert status(tmp_path) == (loss, True, reason)
    assert kept.stat().st_mtime_ns == made
    assert loss_without == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("exit 7", "a-compiler failed: it ended with 7"), ("echo broken > ${@: -1}", "failed"), (None, "is no command")],
)
def test_without_a_compiler_all_works(tmp_path, loss_without, compiler, reason):
    """One that fails, one that writes no library, and none."""
    named = tmp_path / "a-compiler"
    if compiler is not None:
        named.write_text(f'#!/bin/bash\nif [ "$1" = --version ]; then echo 1; else {compiler}; fi\n')
        named.chmod(0o755)
    loss, found, said = status(tmp_path, CXX=str(named))
    assert not found
    assert reason in said
    assert loss == pytest.approx(loss_without)


def test_a_damaged_library_is_compiled_anew(tmp_path):
    """Cut short, as a full disk or a crash leaves it, it would end the process; empty, it would never load."""
    healthy = status(tmp_path)
    (kept,) = (tmp_path / "cache" / "mdml-kernels").iterdir()
    for size in (kept.stat().st_size // 2, 0):
        os.truncate(kept, size)
        assert status(tmp_path) == healthy
        assert [path.stat().st_size > size for path in kept.parent.iterdir()] == [True]


def test_a_compiler_with_arguments(tmp_path):
    """As `ccache g++` is: env stands in for what calls the other."""
    _, found, reason = status(tmp_path, CXX="env c++")
    assert (found, reason) == (True, "compiled by env c++")


def test_a_user_without_a_home(tmp_path, loss_without):
    """Nor an entry among the users, as in a container that was given a number for one."""
    nobody = "import os; os.getuid = lambda: 54321; os.environ.pop('HOME'); os.environ.pop('XDG_CACHE_HOME');"
    loss, found, reason = status(tmp_path, before=nobody)
    assert not found
    assert "set HOME or XDG_CACHE_HOME" in reason
    assert loss == pytest.approx(loss_without)


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file, no folder")
    assert not status(tmp_path)[1]


def test_a_child_process_has_threads_of_its_own():
    """A fork takes no threads along: what waited for those of its parent would wait for ever."""
    code = """
import os, torch
from mdml_kernels.native.threads import shared
done = []
torch.set_num_threads(2)
shared(lambda begin, end: done.append((begin, end)), 8, least=1)
if child := os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
shared(lambda begin, end: done.append((begin, end)), 8, least=1)
os._exit(0 if sorted(done) == [(0, 4), (0, 4), (4, 8), (4, 8)] else 1)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_is_called_after_the_last_line_of_a_script():
    """By a thread that Python waits for, and at exit: no other thread can be started then."""
    code = """
import atexit, threading, time, torch
from mdml_kernels.native.threads import shared
torch.set_num_threads(2)

def call():
    shared(lambda begin, end: print(begin, end), 8, least=1)

def late():
    threading.main_thread().join()
    time.sleep(0.1)
    call()

atexit.register(call)
threading.Thread(target=late).start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert sorted(done.stdout.splitlines()) == ["0 4", "0 4", "4 8", "4 8"], done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block", rows._BLOCK),
        ("short", rows.SHORT),
        ("ball", neighbours._BALL),
        ("most", neighbours.MOST),
        ("episode_layer", ctypes.sizeof(episodes._Layer)),
        ("episode_program", ctypes.sizeof(episodes._Program)),
        ("prototype_program", ctypes.sizeof(prototypes._Program)),
    ],
)
def test_what_is_written_twice_is_the_same(name, value):
    """In Python and in C++: where they differed, a kernel would write beyond what it was given."""
    assert ctypes.c_int64.in_dll(loader.native().kernels, f"mdml_{name}").value == value


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
