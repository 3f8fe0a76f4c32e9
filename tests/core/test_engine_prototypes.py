"""Episodes of a residual encoder and a prototype head by one compiled kernel, against a plain loop in float64."""

import pytest
import torch
from mdml_kernels import SoftmaxMarginLoss
from mdml_kernels.native import loader as native
from torch import Tensor, nn

from mdml_fast import MetaEngine
from mdml_fast.diagnosis import loop_meta_gradients
from mdml_fast.meta.encoders import ResidualEncoder
from mdml_fast.meta.heads import PrototypeHead
from mdml_fast.meta.scheduler import MetaScheduler

D = 3
DIRECTION = torch.tensor([2, 0, 1, 2, 0])

pytestmark = pytest.mark.skipif(native.native().kernels is None, reason="no compiler")


def engine(
    d: int, hidden: int, dtype: torch.dtype = torch.float32, compute: torch.dtype | None = None, **loss: object
) -> MetaEngine:
    """Values far from the identity, others in each direction."""
    settings = {"background": -1.5, "learn_background": True} | loss
    torch.manual_seed(0)
    made = MetaEngine(
        ResidualEncoder(d, hidden),
        PrototypeHead(2.0),
        0,
        loss=SoftmaxMarginLoss(confidence="mass", form="bce", **settings),
        n_directions=D,
        dtype=compute,
        path="fused" if dtype == torch.float32 else "generic",
        compile=False,
    )
    generator = torch.Generator().manual_seed(1)
    for value in (*made.parameters().values(), *made.buffers().values()):
        value.data += 0.4 * (torch.rand(value.shape, generator=generator) - 0.5)
    made.modules.to(dtype)
    return made


def episodes(n: int, q: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    support, query = (torch.randn(len(DIRECTION), rows, d, generator=generator) for rows in (n, q))
    return support, query, torch.rand(len(DIRECTION), q, generator=generator) < 0.4


@pytest.mark.parametrize(
    ("n", "q", "d", "hidden"),
    [(12, 15, 6, 10), (16, 32, 16, 16), (1, 1, 1, 1), (70, 17, 33, 5), (130, 40, 78, 64)],
)
@pytest.mark.parametrize("loss", [{}, {"temperature": 0.7}, {"learn_background": False}], ids=["", "T", "fixed"])
def test_losses_and_gradients_are_those_of_a_loop(n: int, q: int, d: int, hidden: int, loss: dict) -> None:
    fused, exact = engine(d, hidden, **loss), engine(d, hidden, torch.float64, **loss)
    assert fused.shares_threads
    support, query, is_ood = episodes(n, q, d)
    # A side without rows has no loss.
    is_ood[0], is_ood[1] = True, False
    out = fused.meta_gradients(support, query, is_ood, DIRECTION)
    losses, grads = loop_meta_gradients(exact, support.double(), query.double(), is_ood, DIRECTION)
    torch.testing.assert_close(out.loss.double(), losses, rtol=1e-4, atol=1e-5)
    assert out.grads.keys() == grads.keys()
    for name, expected in grads.items():
        assert out.grads[name].shape == expected.shape
        assert (out.grads[name] - expected).norm() <= 2e-5 * expected.norm() + 1e-7, name


def test_it_agrees_with_the_tensor_operations_it_stands_for() -> None:
    fused, plain = engine(9, 20), engine(9, 20)
    plain._path._prototypes = None
    batch = episodes(40, 30, 9)
    one, other = (each.meta_gradients(*batch, DIRECTION) for each in (fused, plain))
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-5, atol=1e-6)
    for name in one.grads:
        torch.testing.assert_close(one.grads[name], other.grads[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("n", "q", "d", "hidden"), [(12, 15, 6, 10), (64, 33, 78, 64)])
def test_bfloat16_products_are_close(n: int, q: int, d: int, hidden: int) -> None:
    rough, exact = engine(d, hidden, compute=torch.bfloat16), engine(d, hidden, torch.float64)
    assert rough.shares_threads
    support, query, is_ood = episodes(n, q, d)
    out = rough.meta_gradients(support, query, is_ood, DIRECTION)
    losses, grads = loop_meta_gradients(exact, support.double(), query.double(), is_ood, DIRECTION)
    assert not torch.equal(out.loss, engine(d, hidden).meta_gradients(support, query, is_ood, DIRECTION).loss)
    # Operands have 8 bits, and squared distances are small differences: as near as tensor operations come.
    torch.testing.assert_close(out.loss.double(), losses, rtol=0.02, atol=0.02)
    rough._path._prototypes = None
    plain = rough.meta_gradients(support, query, is_ood, DIRECTION)
    for name, expected in grads.items():
        assert out.grads[name].dtype == torch.float32
        error, usual = ((found.grads[name] - expected).norm() / expected.norm() for found in (out, plain))
        assert error <= 1.5 * usual + 1e-3, name


def test_bits_depend_neither_on_threads_nor_on_how_rows_lie() -> None:
    made = engine(30, 40)
    support, query, is_ood = episodes(64, 48, 30)
    single = MetaScheduler(made, threads=1).meta_gradients(support, query, is_ood, DIRECTION)
    strided = [torch.cat([rows, rows], -1)[..., :30] for rows in (support, query)]
    for threads, given in ((2, (support, query)), (3, strided)):
        out = MetaScheduler(made, threads=threads).meta_gradients(*given, is_ood, DIRECTION)
        assert torch.equal(out.loss, single.loss)
        assert all(torch.equal(out.grads[name], grad) for name, grad in single.grads.items())


def test_a_row_that_is_not_finite_spoils_its_own_direction_alone() -> None:
    made = engine(8, 12)
    support, query, is_ood = episodes(20, 20, 8)
    clean = made.meta_gradients(support, query, is_ood, DIRECTION)
    query[2, 3] = torch.nan  # the only episode of direction 1
    out = made.meta_gradients(support, query, is_ood, DIRECTION)
    assert out.loss[2].isnan()
    assert torch.equal(out.loss[DIRECTION != 1], clean.loss[DIRECTION != 1])
    for name, grad in out.grads.items():
        assert grad[1].isnan().any(), name
        assert torch.equal(grad[[0, 2]], clean.grads[name][[0, 2]]), name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n_directions": None}, "shared parameters"),
        ({"inner_steps": 1}, "an inner loop"),
        ({"dtype": torch.bfloat16, "encoder": ResidualEncoder(6, 7)}, "an odd width in bfloat16"),
        ({"loss": SoftmaxMarginLoss(background=-1.5, confidence="max")}, "another loss"),
        ({"encoder": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))}, "another encoder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_serve_goes_another_way(change: dict[str, object], reason: str) -> None:
    loss = SoftmaxMarginLoss(background=-1.5, confidence="mass", form="bce")
    settings = {"encoder": ResidualEncoder(6, 8), "inner_steps": 0, "loss": loss, "n_directions": D, "path": "fused"}
    made = MetaEngine(head=PrototypeHead(1.0), **settings | change)
    assert not made.shares_threads, reason
    direction = DIRECTION if made.n_directions else None
    losses, _ = loop_meta_gradients(made, *episodes(12, 15, 6), direction)
    torch.testing.assert_close(made.meta_gradients(*episodes(12, 15, 6), direction).loss, losses, rtol=0.05, atol=0.01)
