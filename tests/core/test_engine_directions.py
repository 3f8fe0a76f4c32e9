"""Parameters stacked by direction, heads that see the support, and a learned background, against a plain loop."""

from collections.abc import Callable

import pytest
import torch
from mdml_kernels import SoftmaxMarginLoss
from pretended_gpu import pretended_gpu
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mdml_fast import MetaEngine
from mdml_fast.diagnosis import loop_meta_gradients
from mdml_fast.meta.encoders import ResidualEncoder
from mdml_fast.meta.heads import PrototypeHead

D = 3
DIRECTION = torch.tensor([2, 0, 0, 2, 0])


def episodes(dtype: torch.dtype = torch.float64, n: int = len(DIRECTION)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    support, query = (torch.randn(n, rows, 6, dtype=dtype, generator=generator) for rows in (12, 15))
    return support, query, torch.rand(n, 15, generator=generator) < 0.4


def linear_engine(dtype: torch.dtype = torch.float64, **settings: object) -> MetaEngine:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).to(dtype)
    loss = SoftmaxMarginLoss(margin=0.9, learn_temperature=True).to(dtype)
    return MetaEngine(encoder, nn.Linear(4, 5).to(dtype), 2, 0.2, loss, **settings)


def prototype_engine(dtype: torch.dtype = torch.float64, inner_steps: int = 2, **settings: object) -> MetaEngine:
    torch.manual_seed(0)
    encoder = ResidualEncoder(6, 10).to(dtype)
    nn.init.normal_(encoder.outer.weight, std=0.1)
    loss = SoftmaxMarginLoss(background=-2.0, confidence="mass", form="bce", learn_background=True).to(dtype)
    return MetaEngine(encoder, PrototypeHead(1.5).to(dtype), inner_steps, 0.1, loss, **settings)


def scatter(engine: MetaEngine) -> None:
    """Give each direction values of its own."""
    for value in (*engine.parameters().values(), *engine.buffers().values()):
        for d in range(D):
            value.data[d] *= 1 + 0.1 * d


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("make", [linear_engine, prototype_engine])
def test_stacked_gradients_equal_a_loop_over_episodes(make: object, first_order: bool) -> None:
    engine = make(n_directions=D, first_order=first_order)
    scatter(engine)
    out = engine.meta_gradients(*episodes(), direction=DIRECTION)
    losses, grads = loop_meta_gradients(engine, *episodes(), DIRECTION)
    torch.testing.assert_close(out.loss, losses, rtol=1e-10, atol=0)
    assert out.grads.keys() == engine.parameters().keys()
    for name, expected in grads.items():
        assert out.grads[name].shape == engine.parameters()[name].shape
        assert expected[0].norm() > 0, name
        assert not out.grads[name][1].any(), "direction 1 has no episode"
        assert (out.grads[name] - expected).norm() <= 1e-10 * expected.norm(), name


@pytest.mark.parametrize("inner_steps", [0, 2])
def test_a_prototype_head_without_directions(inner_steps: int) -> None:
    engine = prototype_engine(inner_steps=inner_steps)
    out = engine.meta_gradients(*episodes())
    losses, grads = loop_meta_gradients(engine, *episodes())
    torch.testing.assert_close(out.loss, losses, rtol=1e-10, atol=0)
    for name, expected in grads.items():
        assert (out.grads[name] - expected).norm() <= 1e-10 * expected.norm(), name
        assert expected.norm() > 0, name


@pytest.mark.parametrize("make", [linear_engine, prototype_engine])
def test_directions_train_as_engines_of_their_own(make: object) -> None:
    """Adam with a rate of its own for some parameters, unequal numbers of episodes, three steps."""

    def optimizer(engine: MetaEngine) -> torch.optim.Adam:
        params = engine.parameters()
        slow = [value for name, value in params.items() if name.startswith("encoder.")]
        fast = [value for name, value in params.items() if not name.startswith("encoder.")]
        return torch.optim.Adam([{"params": slow, "lr": 1e-3}, {"params": fast, "lr": 1e-2}])

    together, alone = make(n_directions=D), [make() for _ in range(D)]
    scatter(together)
    for d, engine in enumerate(alone):
        for name, value in (engine.parameters() | engine.buffers()).items():
            value.data.copy_((together.parameters() | together.buffers())[name][d])
    optimizers = [optimizer(engine) for engine in (together, *alone)]
    direction = torch.tensor([0, 1, 2, 1, 2, 2])
    for step in range(3):
        batch = [tensor.roll(step, 1) for tensor in episodes(n=6)]
        for engine, opt, mine in zip((together, *alone), optimizers, (None, 0, 1, 2), strict=True):
            chosen = slice(None) if mine is None else direction == mine
            grads = engine.meta_gradients(
                *(tensor[chosen] for tensor in batch), direction=direction if mine is None else None
            ).grads
            for name, value in engine.parameters().items():
                value.grad = grads[name]
            opt.step()
    for d, engine in enumerate(alone):
        for name, value in engine.parameters().items():
            torch.testing.assert_close(together.parameters()[name][d], value.detach(), rtol=1e-9, atol=1e-12)


def test_as_many_episodes_as_directions_need_no_names() -> None:
    engine = prototype_engine(n_directions=D)
    scatter(engine)
    batch = episodes(n=D)
    named = engine.meta_gradients(*batch, direction=torch.arange(D))
    assert torch.equal(engine.meta_gradients(*batch).loss, named.loss)
    with pytest.raises(ValueError, match="5 episodes of 3 directions: give direction="):
        engine.meta_gradients(*episodes())
    with pytest.raises(ValueError, match=r"direction must be int64 \[5\]"):
        engine.meta_gradients(*episodes(), direction=DIRECTION.float())
    with pytest.raises(ValueError, match=r"direction must be a tensor, int64 \[5\], got a list"):
        engine.meta_gradients(*episodes(), direction=DIRECTION.tolist())
    for moved, match in ((-1, "got -1 to 1"), (1, "got 1 to 3")):
        with pytest.raises(ValueError, match=f"direction must be in 0 to 2, {match}"):
            engine.meta_gradients(*episodes(), direction=DIRECTION + moved)
    with pytest.raises(ValueError, match="leave direction out"):
        prototype_engine().meta_gradients(*episodes(), direction=DIRECTION)
    with pytest.raises(ValueError, match="n_directions must be 1 or more"):
        prototype_engine(n_directions=0)


def test_a_gpu_adds_up_each_directions_episodes_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """index_add_ keeps no order there of what is for one place: no call may name a direction twice."""
    direction = torch.tensor([2, 0, 0, 2, 0, 1, 2, 0])
    here = linear_engine(n_directions=D)
    expected = here.meta_gradients(*episodes(n=8), direction=direction).grads
    named = []

    class Watched(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., object], types: object, args: tuple = (), kwargs: object = None
        ):
            if func is Tensor.index_add_:
                named.append(args[2].tolist())
            return func(*args, **(kwargs or {}))

    with pretended_gpu(monkeypatch), Watched():
        there = linear_engine(n_directions=D)
        there.modules.to("cuda")
        batch = [tensor.to("cuda") for tensor in (*episodes(n=8), direction)]
        grads = there.meta_gradients(*batch).grads
        for name, value in expected.items():
            torch.testing.assert_close(grads[name].cpu(), value, rtol=1e-10, atol=0)
    n = len(expected)
    assert named == [[0, 1, 2]] * n + [[0, 2]] * 2 * n + [[0]] * n


def test_the_callers_modules_are_left_alone() -> None:
    head = nn.Linear(4, 5)
    engine = MetaEngine(nn.Linear(6, 4), head, n_directions=D)
    engine.parameters()["head.weight"].data.zero_()
    assert head.weight.shape == (5, 4)
    assert head.weight.norm() > 0


@pytest.mark.parametrize("n_directions", [None, D])
def test_logits_are_distances_to_the_adapted_support(n_directions: int | None) -> None:
    engine = prototype_engine(n_directions=n_directions)
    support, query, _ = episodes(n=D)
    adapted = engine.adapt(support)
    logits = engine.logits(adapted, query, support)
    own = {name.removeprefix("encoder."): value[1] for name, value in adapted.items()}
    z, centers = (torch.func.functional_call(engine.modules["encoder"], own, (rows[1],)) for rows in (query, support))
    torch.testing.assert_close(logits[1], -torch.cdist(z, centers).square() / (2 * 1.5))
    with pytest.raises(ValueError, match="give support="):
        engine.logits(adapted, query)


def test_a_variance_may_be_set_to_any_number() -> None:
    engine = MetaEngine(nn.Linear(6, 4), PrototypeHead(1), n_directions=D)
    engine.buffers()["head.variance"][1] = 0.5
    assert engine.buffers()["head.variance"].tolist() == [1.0, 0.5, 1.0]


def test_zero_steps_adapt_nothing() -> None:
    engine = prototype_engine(inner_steps=0, n_directions=D)
    scatter(engine)
    for name, value in engine.adapt(episodes()[0], DIRECTION).items():
        assert torch.equal(value, engine.parameters()[name][DIRECTION])


def test_the_residual_encoder_starts_as_the_identity() -> None:
    rows = torch.randn(7, 6)
    assert torch.equal(ResidualEncoder(6, 10)(rows), rows)
