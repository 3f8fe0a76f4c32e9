"""Modules that are more than their layers: shared parameters, hooks, weights made of others."""

import copy
from collections.abc import Callable

import pytest
import torch
from mdml_kernels import SoftmaxMarginLoss
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from mdml_fast import MetaEngine
from mdml_fast.diagnosis import loop_meta_gradients

Episodes = tuple[Tensor, Tensor, Tensor]


def episodes() -> Episodes:
    generator = torch.Generator().manual_seed(1)
    support, query = (torch.randn(6, n, 8, dtype=torch.float64, generator=generator) for n in (10, 12))
    return support, query, (torch.arange(12) >= 8).expand(6, -1)


class Turned(nn.Module):
    """Another layer's weight, turned, and its own bias."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.bias = layer, nn.Parameter(torch.zeros(8))

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.layer.weight + self.bias


class Shifted(nn.Module):
    """Rows less a mean, a buffer."""

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)

    def forward(self, rows: Tensor) -> Tensor:
        return rows - self.mean


def linear_with(weight: nn.Parameter) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape))
    layer.weight = weight
    return layer


def tied_decoder() -> dict[str, nn.Module]:
    encoder = nn.Linear(8, 8)
    return {"encoder": encoder, "decoder": Turned(encoder), "head": nn.Linear(8, 4)}


def tied_head() -> dict[str, nn.Module]:
    encoder = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))
    return {"encoder": encoder, "head": linear_with(encoder[0].weight)}


def tied_head_and_decoder() -> dict[str, nn.Module]:
    decoder = nn.Linear(8, 8)
    return {"encoder": nn.Linear(8, 8), "decoder": decoder, "head": linear_with(decoder.weight)}


def tied_within() -> dict[str, nn.Module]:
    first = nn.Linear(8, 8)
    return {"encoder": nn.Sequential(first, nn.Tanh(), linear_with(first.weight)), "head": nn.Linear(8, 4)}


def tied_buffer() -> dict[str, nn.Module]:
    shifted = Shifted(torch.randn(8, dtype=torch.float64))  # a change of its dtype would make two of it
    encoder, head = nn.Sequential(shifted, nn.Linear(8, 8)), nn.Sequential(Shifted(shifted.mean), nn.Linear(8, 4))
    head[0].mean = shifted.mean
    return {"encoder": encoder, "head": head}


def by_plain_sgd(modules: nn.ModuleDict, data: Episodes, steps: int, lr: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and first-order gradients of a copy of the modules for each episode, whose parameters move in place."""
    losses, grads = [], []
    for support, query, is_ood in zip(*data, strict=True):
        own = copy.deepcopy(modules)

        def loss(rows: Tensor, flags: Tensor, z: Tensor, one_class: bool, own: nn.ModuleDict = own) -> Tensor:
            logits = own["head"](z)
            value = own["loss"].one_class(logits) if one_class else own["loss"](logits, flags)
            return value + (own["decoder"](z) - rows)[~flags].square().mean() if "decoder" in own else value

        adapted = [value for name, value in own.named_parameters() if name.startswith(("encoder.", "decoder."))]
        normal = torch.zeros(len(support), dtype=torch.bool)
        for _ in range(steps):
            inner = loss(support, normal, own["encoder"](support), one_class=True)
            for value, step in zip(adapted, torch.autograd.grad(inner, adapted), strict=True):
                value.data -= lr * step
        outer = loss(query, is_ood, own["encoder"](query), one_class=False)
        grads.append(torch.autograd.grad(outer, list(own.parameters())))
        losses.append(outer.detach())
    means = [torch.stack(values).mean(0) for values in zip(*grads, strict=True)]
    return torch.stack(losses), dict(zip(dict(modules.named_parameters()), means, strict=True))


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("tied", [tied_decoder, tied_head, tied_head_and_decoder, tied_within, tied_buffer])
def test_what_modules_share_is_one(tied: Callable[[], dict[str, nn.Module]], dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    modules = nn.ModuleDict({**tied(), "loss": SoftmaxMarginLoss(margin=1.0)}).double()
    engine = MetaEngine(**modules, inner_steps=3, inner_lr=0.1, dtype=dtype)
    assert engine.choice.path == "generic"
    tolerance = 1e-10 if dtype is None else 1e-4
    for moved in (0.0, 0.3):
        for value in (*engine.parameters().values(), *engine.buffers().values()):
            value.data += moved
        losses, grads = by_plain_sgd(modules, episodes(), 3, 0.1)
        out = engine.meta_gradients(*episodes())
        assert out.grads.keys() == grads.keys()
        for found, expected in ((out.loss, losses), *((out.grads[name], grads[name]) for name in grads)):
            assert expected.norm() > 0
            assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("n_directions", [None, 3])
@pytest.mark.parametrize("tied", [tied_decoder, tied_head, tied_buffer])
def test_what_modules_share_is_one_in_each_direction_and_order(
    tied: Callable[[], dict[str, nn.Module]], n_directions: int | None, first_order: bool
) -> None:
    torch.manual_seed(0)
    modules = nn.ModuleDict(tied()).double()
    engine = MetaEngine(**modules, inner_steps=2, first_order=first_order, n_directions=n_directions)
    direction = torch.tensor([0, 1, 2, 0, 1, 0]) if n_directions else None
    for value in engine.parameters().values():
        value.data += 0.1 * torch.randn_like(value)
    out = engine.meta_gradients(*episodes(), direction)
    losses, grads = loop_meta_gradients(engine, *episodes(), direction)
    torch.testing.assert_close(out.loss, losses, rtol=1e-10, atol=0)
    for name, expected in grads.items():
        assert (out.grads[name] - expected).norm() <= 1e-10 * expected.norm(), name


def networks() -> tuple[nn.Sequential, nn.Linear]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).double(), nn.Linear(8, 4).double()


class Doubled(nn.Module):
    """Twice what it is given."""

    def forward(self, given: Tensor) -> Tensor:
        return 2 * given


def doubled(module: nn.Module) -> None:
    """Have the module give twice as much."""
    module.register_forward_hook(lambda module, rows, given: 2 * given)


ALTERATIONS: dict[str, Callable[[nn.Sequential, nn.Linear, nn.Module], object]] = {
    "a hook of a layer": lambda encoder, head, loss: doubled(encoder[2]),
    "a hook of the encoder": lambda encoder, head, loss: doubled(encoder),
    "a hook of the head": lambda encoder, head, loss: doubled(head),
    "a hook of the loss": lambda encoder, head, loss: doubled(loss),
    "a hook before a layer": lambda encoder, head, loss: encoder[1].register_forward_pre_hook(
        lambda module, rows: (2 * rows[0],)
    ),
    "a forward of its own": lambda encoder, head, loss: setattr(head, "forward", lambda z: z[:, :4]),
    "a parameter of the Sequential": lambda encoder, head, loss: encoder.register_parameter(
        "own", nn.Parameter(torch.ones(2).double())
    ),
    "a parameter of an activation": lambda encoder, head, loss: encoder[1].register_parameter(
        "own", nn.Parameter(torch.ones(2).double())
    ),
    "a weight made of another": lambda encoder, head, loss: parametrize.register_parametrization(
        encoder[0], "weight", Doubled()
    ),
}


@pytest.mark.parametrize("altered", ALTERATIONS)
def test_a_module_that_was_altered_takes_the_generic_path(altered: str) -> None:
    loss = SoftmaxMarginLoss(margin=1.0)
    engine = MetaEngine(*networks(), 2, 0.3, loss)
    assert engine.choice.path == "fused"
    plain = engine.meta_gradients(*episodes())
    encoder, head = networks()
    ALTERATIONS[altered](encoder, head, loss)
    engine = MetaEngine(encoder, head, 2, 0.3, loss)
    assert engine.choice.path == "generic"
    out = engine.meta_gradients(*episodes())
    losses, grads = loop_meta_gradients(engine, *episodes())
    torch.testing.assert_close(out.loss, losses, rtol=1e-10, atol=0)
    assert out.grads.keys() == grads.keys()
    for name, expected in grads.items():
        assert (out.grads[name] - expected).norm() <= 1e-10 * expected.norm(), name
    assert torch.allclose(out.loss, plain.loss) == altered.startswith("a parameter")


@pytest.mark.parametrize(
    ("alter", "match"),
    [
        (lambda encoder: nn.utils.weight_norm(encoder[0]), r"encoder\.0\.weight was computed from .*: use torch.nn.ut"),
        (lambda encoder: prune.l1_unstructured(encoder[2], "bias", 0.5), r"encoder\.2\.bias was computed from param"),
        (lambda encoder: encoder.register_full_backward_hook(lambda *_: None), "encoder has a backward hook"),
        (lambda encoder: encoder[1].register_full_backward_pre_hook(lambda *_: None), "encoder.1 has a backward hook"),
        (lambda encoder: nn.utils.parametrizations.spectral_norm(encoder[0]), "can't be batched over episodes"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning", "ignore:There is a performance drop")
def test_alterations_that_no_path_could_follow_are_refused(alter: Callable[[nn.Module], object], match: str) -> None:
    encoder, head = networks()
    alter(encoder)
    with pytest.raises(ValueError, match=match):
        MetaEngine(encoder, head).meta_gradients(*episodes())
