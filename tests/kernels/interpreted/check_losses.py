"""The public loss over the Triton kernels: every combination of arguments, and what the whole of it moves in memory."""

import dataclasses
import itertools

import pytest
import torch
from mdml_kernels import compiled, parity, softmax_margin_loss
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

FORMS = ("hinge", "pairwise", "bce")
REDUCTIONS = ("mean", "sum", "none")
TEMPERATURES = ("number", "scalar", "episode")
BACKGROUNDS = {"max": (None, "number", "scalar", "episode"), "mass": ("number", "scalar", "episode")}


def with_a_loss(**settings):
    """The first problem whose every episode has a loss: both sides are there, and the margin is missed."""
    for seed in itertools.count():
        problem = parity.Problem(**settings, dtype=torch.float32, seed=seed)
        if (problem.call(problem.tensors(), "reference") > 0).all() and both_sides(problem.tensors()["is_ood"]):
            return problem
    raise AssertionError


def both_sides(is_ood):
    return (is_ood.any(1) & ~is_ood.all(1)).all()


# A reduction sees the losses alone, so that it goes round the other factors, instead of three times as many problems.
@pytest.mark.parametrize(("n_classes", "first_reduction"), [(5, 0), (19, 1)])
@pytest.mark.parametrize("confidence", ["max", "mass"])
@pytest.mark.parametrize("form", FORMS)
def test_value_and_derivatives(form, confidence, n_classes, first_reduction):
    """Up to the second order along a random direction: no further from float64 than plain PyTorch in float32 + 1e-6."""
    kinds = itertools.product(enumerate(TEMPERATURES), enumerate(BACKGROUNDS[confidence]))
    problems = []
    for (t, temperature), (b, background) in kinds:
        problem = with_a_loss(
            form=form,
            confidence=confidence,
            temperature=temperature,
            background=background,
            shape=(2, 7, n_classes),
        )
        problems.append(dataclasses.replace(problem, reduction=REDUCTIONS[(t + b + first_reduction) % 3]))
    (worst,) = parity.compare(problems, ("triton",))
    assert not worst.missed, worst


@pytest.mark.parametrize("confidence", ["max", "mass"])
def test_a_compiler_is_told_what_the_operator_saves(confidence, monkeypatch):
    monkeypatch.undo()  # no poison in tensors without memory
    given = [torch.randn(2, 7, 5), torch.ones(2), torch.ones(2)]
    made = compiled._forward(given, [True] * 3, "TritonLogOdds", confidence)
    told = compiled._forward([value.to("meta") for value in given], [True] * 3, "TritonLogOdds", confidence)
    assert [(value.shape, value.dtype) for value in told] == [(value.shape, value.dtype) for value in made]


class OfTensors(TorchDispatchMode):
    """Bytes that the operations of PyTorch between the launches read and write."""

    moved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.is_view or function.name() in ("aten::empty.memory_format", "aten::fill_.Scalar"):  # the poison
            return result
        for value in tree_leaves((args, result)):
            if isinstance(value, torch.Tensor):
                self.moved += min(value.nbytes, value.untyped_storage().nbytes())  # an expanded one is read once
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("confidence", ["max", "mass"])
def test_traffic_of_a_whole_loss(confidence, dtype, traffic, monkeypatch):
    """At most 1.05 times the least, over all kernels and all operations between: 2 episodes of 64 rows, K = 512.

    The least is logits and labels once forward; logits once and their gradient once backward. With `max` the backward
    pass also looks at each row's largest again, which is then at hand.
    """
    run = GridExecutor.__call__

    def launch(self, *args, **kwargs):
        with _disable_current_modes():  # the interpreter's own copies of what a kernel gets
            return run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    logits = torch.randn(2, 64, 512).to(dtype).requires_grad_()
    is_ood = torch.arange(128).view(2, 64) % 3 == 0
    options = {"margin": 1.0, "background": 0.5, "confidence": confidence, "backend": "triton"}
    with OfTensors() as tensors:
        loss = softmax_margin_loss(logits, is_ood, **options)
        forward = traffic.loaded() + traffic.stored() + tensors.moved
        loss.backward()
    backward = traffic.loaded() + traffic.stored() + tensors.moved - forward
    assert logits.grad.abs().sum(2).min() > 0
    of_the_largest = 128 * logits.element_size() if confidence == "max" else 0
    assert traffic.loaded(logits) == 2 * logits.nbytes + of_the_largest
    assert traffic.stored(logits.grad) == logits.nbytes
    least_forward, least_backward = logits.nbytes + is_ood.nbytes, 2 * logits.nbytes
    assert forward <= 1.05 * least_forward
    assert backward <= 1.05 * least_backward
