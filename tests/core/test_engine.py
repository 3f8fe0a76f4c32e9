import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from mdml_kernels import SoftmaxMarginLoss
from torch import Tensor, nn

from mdml_fast import MetaEngine, MetaScheduler
from mdml_fast.diagnosis import loop_meta_gradients


def networks(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 8)).to(dtype)
    return encoder, nn.Linear(8, 5).to(dtype)


def episodes(dtype: torch.dtype = torch.float32, n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    is_ood = torch.arange(20) >= 14
    return torch.randn(n, 16, 12, dtype=dtype), torch.randn(n, 20, 12, dtype=dtype), is_ood.expand(n, -1)


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("inner_steps", [0, 1, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_meta_gradients_equal_a_loop_over_episodes(
    first_order: bool, inner_steps: int, dtype: torch.dtype, tolerance: float
) -> None:
    loss = SoftmaxMarginLoss(learn_temperature=True).to(dtype)
    engine = MetaEngine(*networks(dtype), inner_steps, 0.2, loss, first_order)
    out = engine.meta_gradients(*episodes(dtype))
    losses, grads = loop_meta_gradients(engine, *episodes(dtype))
    assert (out.loss - losses).norm() <= tolerance * losses.norm()
    assert out.grads.keys() == grads.keys() == engine.parameters().keys()
    for name, expected in grads.items():
        assert expected.norm() > 0, name
        assert (out.grads[name] - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.parametrize("path", ["fused", "generic"])
@pytest.mark.parametrize("n_directions", [None, 6])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda engine: pickle.loads(pickle.dumps(engine))])
def test_a_copy_is_an_engine_of_its_own(
    path: str, n_directions: int | None, copied: Callable[[MetaEngine], MetaEngine]
) -> None:
    engine = MetaEngine(*networks(), path=path, n_directions=n_directions)
    expected = engine.meta_gradients(*episodes())
    other = copied(engine)
    torch.testing.assert_close(other.meta_gradients(*episodes()), expected, rtol=0, atol=0)
    for param in engine.parameters().values():
        param.data.zero_()
    torch.testing.assert_close(other.meta_gradients(*episodes()), expected, rtol=0, atol=0)


def test_first_and_second_order_differ() -> None:
    first, second = (MetaEngine(*networks(), first_order=order).meta_gradients(*episodes()) for order in (True, False))
    torch.testing.assert_close(first.loss, second.loss)
    name = "encoder.0.weight"
    assert (first.grads[name] - second.grads[name]).norm() > 1e-3 * first.grads[name].norm()


def test_a_decoder_adds_the_reconstruction_error_of_normals() -> None:
    encoder, head = networks()
    support, query, is_ood = episodes()
    decoder = nn.Linear(8, 12)
    plain = MetaEngine(encoder, head, 0).meta_gradients(support, query, is_ood)
    out = MetaEngine(encoder, head, 0, decoder=decoder, reconstruction_weight=2.0).meta_gradients(
        support, query, is_ood
    )
    normal_query = query[:, :14]
    errors = (decoder(encoder(normal_query)) - normal_query).square().mean(dim=(-1, -2))
    torch.testing.assert_close(out.loss, plain.loss + 2 * errors.detach())
    assert out.grads["decoder.weight"].norm() > 0


def test_adapting_lowers_the_one_class_loss() -> None:
    encoder, head = networks()
    support, _, _ = episodes()
    loss = SoftmaxMarginLoss()
    engine = MetaEngine(encoder, head, inner_steps=5, inner_lr=0.2, loss=loss)
    after = loss.one_class(engine.logits(engine.adapt(support), support))
    assert after < loss.one_class(head(encoder(support)))


def test_bfloat16_computes_close_and_keeps_float32_updates() -> None:
    out = MetaEngine(*networks(), dtype=torch.bfloat16).meta_gradients(*episodes())
    exact = MetaEngine(*networks()).meta_gradients(*episodes())
    assert out.grads["head.weight"].dtype == torch.float32
    torch.testing.assert_close(out.loss, exact.loss, rtol=0.05, atol=0.02)
    assert not torch.equal(out.loss, exact.loss)


def test_no_graph_is_left_behind() -> None:
    engine = MetaEngine(*networks())
    out = engine.meta_gradients(*episodes())
    assert not out.loss.requires_grad
    assert not any(value.requires_grad for value in [*out.grads.values(), *engine.adapt(episodes()[0]).values()])


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (nn.BatchNorm1d(8), "running statistics.*LayerNorm"),
        (nn.Dropout(0.1), "dropout.*p=0"),
        (nn.MultiheadAttention(8, 2, dropout=0.1), "dropout=0"),
        (nn.RReLU(), "at random.*LeakyReLU"),
    ],
)
def test_modules_that_mix_episodes_are_refused(module: nn.Module, match: str) -> None:
    with pytest.raises(ValueError, match=f"encoder.1 .*{match}"):
        MetaEngine(nn.Sequential(nn.Linear(12, 8), module), nn.Linear(8, 5))


BATCH = torch.ones(3, 16, 12), torch.ones(3, 10, 12), torch.arange(10).expand(3, -1) > 6


class _Matrix(nn.Module):
    """A layer that says nothing of the width of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 8))

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.weight


class _Awkward(nn.Module):
    """Draws random numbers, or works in place: on its own rows, on a tensor that it made, or on what it gives."""

    def __init__(self, where: str, linear: nn.Module | None = None) -> None:
        super().__init__()
        self.linear, self.where = linear or nn.Linear(12, 8), where

    def forward(self, rows: Tensor) -> Tensor:
        if self.where == "random":
            return nn.functional.dropout(self.linear(rows), 0.5)
        if self.where == "made":
            made = torch.zeros(rows.shape[0], 8)
            made[:] = self.linear(rows)
            return made
        if self.where == "an entry of its rows":
            rows[..., 0] = 0.0
        elif self.where == "its rows":
            rows.mul_(1.5)
        return self.linear(rows).relu_()


AWKWARD = {
    "random": "encoder.1 draws random numbers",
    "made": "encoder.1 writes into a tensor that its forward made",
    "its rows": "encoder.1 works in place on its rows",
    "an entry of its rows": "encoder.1 works in place on its rows",
}


@pytest.mark.parametrize(("where", "match"), AWKWARD.items())
@pytest.mark.parametrize("n_directions", [None, 2])
def test_a_forward_that_cannot_be_batched_is_refused_with_its_name(
    where: str, match: str, n_directions: int | None
) -> None:
    encoder, plain, linear = nn.Sequential(nn.Identity(), _Awkward(where)), nn.Linear(20, 12), nn.Linear(8, 5)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=match):
        MetaEngine(encoder, linear, n_directions=n_directions)
    if "rows" not in where:  # a head may change the embeddings
        with pytest.raises(ValueError, match=match.replace("encoder.1", "head")):
            MetaEngine(plain, encoder[1], n_directions=n_directions)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("where", "match"), AWKWARD.items())
def test_where_the_width_of_rows_is_unknown_it_is_refused_at_the_first_batch(where: str, match: str) -> None:
    engine = MetaEngine(nn.Sequential(_Awkward(where, _Matrix())), nn.Linear(8, 5))
    support, query, is_ood = (tensor.clone() for tensor in BATCH)
    match = match.replace("encoder.1", "a module" if "rows" in where else "encoder.0")
    with pytest.raises(ValueError, match=match):
        engine.meta_gradients(support, query, is_ood)
    with pytest.raises(ValueError, match=match):
        engine.adapt(support)


class _Told(nn.Module):
    """Remembers what it was called with, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(12, 8), []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, rows: Tensor) -> Tensor:
        self.seen.append(rows)
        self.calls += 1
        return self.linear(rows)


def test_the_trial_leaves_no_trace() -> None:
    encoder = _Told()
    MetaEngine(encoder, nn.Linear(8, 5), n_directions=2)
    with pytest.raises(ValueError, match="head draws random numbers"):
        MetaEngine(encoder, _Awkward("random", nn.Linear(8, 5)))
    assert (encoder.seen, float(encoder.calls)) == ([], 0.0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())
    # Rows of zeros are not what every module wants.
    images = [rows.unsqueeze(2).expand(-1, -1, 3, -1) for rows in BATCH[:2]]
    engine = MetaEngine(nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(40, 8)), nn.Linear(8, 5))
    assert engine.meta_gradients(*images, BATCH[2]).loss.isfinite().all()


def test_a_trial_has_parameters_as_an_episode_has() -> None:
    """What a forward makes like its own weight has a place for every episode, where the weight has."""

    class Made(_Matrix):
        def forward(self, rows: Tensor) -> Tensor:
            made = self.weight.new_zeros(rows.shape[0], 8)
            made[:] = rows @ self.weight
            return made

    class Wide(nn.Sequential):
        def forward(self, rows: Tensor) -> Tensor:
            return self[0](rows) + 0 * self[1](rows)

    MetaEngine(Wide(Made(), nn.Linear(12, 8)), nn.Linear(8, 5), n_directions=3)
    with pytest.raises(ValueError, match=r"encoder\.0 writes into a tensor"):
        MetaEngine(Wide(Made(), nn.Linear(12, 8)), nn.Linear(8, 5))


@pytest.mark.parametrize("path", ["fused", "generic"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"support": lambda rows: rows.double()}, "support is torch.float64, and the parameters are torch.float32"),
        ({"query": lambda rows: rows.bfloat16()}, "query is torch.bfloat16"),
        ({"query": lambda rows: rows[:2]}, "query .* must be of the episodes and features of"),
        ({"query": lambda rows: rows[..., :11]}, "query .* must be of the episodes and features of"),
        ({"support": lambda rows: rows[0]}, "support must be .*got"),
        ({"support": lambda rows: rows.tolist()}, "support must be a tensor .*, got a list"),
        ({"query": lambda rows: rows.numpy()}, "query must be a tensor .*, got a ndarray"),
        ({"is_ood": lambda flags: flags.tolist()}, r"is_ood must be a tensor, bool \[3, 10\], got a list"),
        ({"is_ood": lambda flags: flags.long()}, "is_ood must be bool"),
        ({"is_ood": lambda flags: flags[:1]}, "is_ood must be bool"),
        (dict.fromkeys(("support", "query", "is_ood"), lambda rows: rows[:0]), "one episode at least"),
    ],
)
def test_rows_that_do_not_fit_are_refused(path: str, change: dict[str, object], match: str) -> None:
    engine = MetaEngine(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6)), nn.Linear(6, 5), path=path)
    given = dict(zip(("support", "query", "is_ood"), BATCH, strict=True))
    for compute in (engine.meta_gradients, MetaScheduler(engine).meta_gradients):
        with pytest.raises(ValueError, match=match) as caught:
            compute(**given | {name: how(given[name]) for name, how in change.items()})
        assert "\n" not in str(caught.value)


def test_a_loss_without_an_inner_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss must be a SoftmaxMarginLoss.*got a CrossEntropyLoss"):
        MetaEngine(*networks(), loss=nn.CrossEntropyLoss())


@pytest.mark.parametrize("path", ["fused", "generic"])
def test_rows_elsewhere_are_refused(path: str) -> None:
    engine = MetaEngine(*networks(), path=path)
    support, query, is_ood = episodes()
    adapted = engine.adapt(support)
    for call in (
        lambda: engine.adapt(support.to("meta")),
        lambda: engine.logits(adapted, query.to("meta")),
        lambda: engine.meta_gradients(support, query, is_ood.to("meta")),
    ):
        with pytest.raises(ValueError, match=r"(support|rows|is_ood) is on meta, and the .* on cpu: move one"):
            call()


def test_rows_are_of_one_dtype_whatever_computes() -> None:
    support, query, is_ood = episodes()
    engine = MetaEngine(*networks(), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"query is torch.float64, and the other rows are torch.float32"):
        engine.meta_gradients(support, query.double(), is_ood)


@pytest.mark.parametrize("path", ["fused", "generic"])
@pytest.mark.parametrize("n_directions", [None, 6])
def test_logits_are_of_the_episodes_that_were_adapted(path: str, n_directions: int | None) -> None:
    engine = MetaEngine(*networks(), path=path, n_directions=n_directions)
    support, query, _ = episodes()
    adapted = engine.adapt(support)
    first = {name: value[:1] for name, value in adapted.items()}
    expanded = {name: value.expand(6, *value.shape[1:]) for name, value in first.items()}
    if n_directions is None:
        torch.testing.assert_close(engine.logits(expanded, query)[:1], engine.logits(first, query[:1]))
    narrow = {name: value[..., :3] for name, value in adapted.items()}
    without = {name: value for name, value in adapted.items() if name != "encoder.2.bias"}
    for wrong, match in (
        (first, r"adapted encoder.0.weight must be \[6, 24, 12\], got \[1, 24, 12\]: give rows of the episodes"),
        (narrow, r"adapted encoder.0.weight must be \[6, 24, 12\], got \[6, 24, 3\]"),
        (without, r"adapted lacks encoder.2.bias: give what adapt\(\) returned, whole"),
        ({}, "adapted lacks encoder.0.weight"),
    ):
        with pytest.raises(ValueError, match=match):
            engine.logits(wrong, query)


@pytest.mark.parametrize("module", ["encoder", "head"])
def test_parameters_that_shall_not_be_trained_are_refused(module: str) -> None:
    modules = dict(zip(("encoder", "head"), networks(), strict=True))
    modules[module].requires_grad_(False)
    with pytest.raises(
        ValueError, match=rf"{module}\..*weight has requires_grad=False, but all parameters are trained"
    ):
        MetaEngine(**modules)


def test_the_fused_path_knows_how_wide_rows_are() -> None:
    engine = MetaEngine(nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 6)), nn.Linear(6, 5), path="fused")
    with pytest.raises(ValueError, match="the 13 features of the encoder"):
        engine.meta_gradients(*BATCH)
    with pytest.raises(ValueError, match="the 13 features of the encoder"):
        engine.logits(engine.adapt(torch.ones(3, 16, 13)), BATCH[1])


def test_a_forward_may_change_what_it_made() -> None:
    assert MetaEngine(_Awkward("nowhere else"), nn.Linear(8, 5)).meta_gradients(*BATCH).loss.isfinite().all()


def test_modules_that_work_in_place_are_refused() -> None:
    with pytest.raises(ValueError, match=r"encoder.1 works in place.*inplace=False"):
        MetaEngine(nn.Sequential(nn.Linear(12, 8), nn.ReLU(inplace=True)), nn.Linear(8, 5))
