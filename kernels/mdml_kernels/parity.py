"""`python -m mdml_kernels.parity`: every backend present against float64, on random problems; exit 1 on a miss.

A problem is drawn at random: form, confidence, temperature and background (number, scalar, one per episode), shape.
What is compared is the losses, the first derivative in everything that has one, and a second derivative along a random
direction. The relative error of a quantity is ``max |a - b| / max |b|``. What a backend is held to, for each form,
confidence and order of derivative, is that its worst error over all problems is at most the worst of plain PyTorch in
the same dtype, plus a tolerance: it must be no worse than what it replaces. (Problem by problem the two differ by luck,
where rounding is magnified: both may win.)
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mdml_kernels import dispatch
from mdml_kernels.functional import linear_softmax_confidence, softmax_margin_loss
from mdml_kernels.reference import Reduction, accumulation_dtype

# In half precision a second derivative is the sum of two terms, each rounded to the inputs' dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
ORDERS = ("value", "first", "second")


@dataclass(frozen=True)
class Problem:
    """One call: a margin loss, or (form ``linear`` or ``prototype``) the confidence under a head of H = 8 features."""

    form: str
    confidence: str
    temperature: str
    background: str | None
    shape: tuple[int, int, int]
    dtype: torch.dtype
    seed: int
    reduction: Reduction = "none"

    def tensors(self) -> dict[str, Tensor]:
        """The differentiable inputs, float64 numbers that the problem's dtype holds exactly, and is_ood."""
        generator = torch.Generator().manual_seed(self.seed)
        n_episodes, n_rows, n_classes = self.shape

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(self.dtype).double()

        made = {"is_ood": torch.rand(n_episodes, n_rows, generator=generator) < 0.3}
        if self.form in ("linear", "prototype"):
            made["z"], made["head"] = normal(n_episodes, n_rows, 8), normal(n_classes, 8) / 2
            if self.form == "linear":
                made["bias"] = normal(n_classes)
        else:
            made["logits"] = normal(*self.shape)
        sizes: dict[str | None, tuple[int, ...]] = {"scalar": (), "episode": (n_episodes,)}
        if self.temperature in sizes:
            made["temperature"] = (normal(*sizes[self.temperature]).abs() + 0.5).to(self.dtype).double()
        if self.background in sizes:
            made["background"] = normal(*sizes[self.background])
        return made

    def call(self, inputs: dict[str, Tensor], backend: str) -> Tensor:
        """The losses [E] (reduced, where the problem says so), or for a head the confidences [E, N]."""
        options: dict[str, Any] = {
            "temperature": inputs.get("temperature", 0.75),
            "background": inputs.get("background", 0.5 if self.background == "number" else None),
            "confidence": self.confidence,
            "backend": backend,
        }
        if self.form == "linear":
            return linear_softmax_confidence(inputs["z"], inputs["head"], inputs["bias"], **options)
        if self.form == "prototype":
            return linear_softmax_confidence(inputs["z"], centers=inputs["head"], scale=2.0, **options)
        form: Any = self.form
        return softmax_margin_loss(
            inputs["logits"], inputs["is_ood"], margin=0.75, form=form, reduction=self.reduction, **options
        )


class Worst(NamedTuple):
    """The worst relative errors of a backend in one kind of problem, by order of derivative, and plain PyTorch's."""

    backend: str
    form: str
    confidence: str
    dtype: torch.dtype
    ours: tuple[float, ...]
    eager: tuple[float, ...]

    @property
    def missed(self) -> bool:
        """Whether an error is larger than plain PyTorch's by more than the tolerance, or NaN."""
        tolerance = TOLERANCE[self.dtype]
        return not all(ours <= eager + tolerance for ours, eager in zip(self.ours, self.eager, strict=True))


def problems(count: int, seed: int, dtype: torch.dtype = torch.float32, largest: int = 600) -> Iterator[Problem]:
    """Random problems; K is 1 now and then (with a background); a tenth or so exceed `cpu_loss.is_small`."""
    rng = random.Random(seed)
    for _ in range(count):
        confidence = rng.choice(("max", "mass"))
        background = rng.choice(("number", "scalar", "episode", *([None] * 2 if confidence == "max" else [])))
        n_classes = rng.choice(
            (rng.randint(1, 8), rng.randint(9, max(9, largest // 9)), rng.randint(largest // 2, largest))
        )
        yield Problem(
            form=rng.choice(("hinge", "pairwise", "bce", "linear", "prototype")),
            confidence=confidence,
            temperature=rng.choice(("number", "scalar", "episode")),
            background=background,
            shape=(
                rng.randint(1, 5),
                rng.choice((rng.randint(1, 40), rng.randint(41, 250))),
                max(n_classes, 1 if background else 2),
            ),
            dtype=dtype,
            seed=rng.randrange(2**31),
        )


def compare(problems: Iterable[Problem], backends: Iterable[str]) -> list[Worst]:
    """The worst errors of every backend in every kind of problem that occurs and that it can serve."""
    found: list[Worst] = []
    for problem in problems:
        exact = _derivatives(problem, torch.float64, "reference")
        eager = _errors(_derivatives(problem, problem.dtype, "reference"), exact)
        for backend in backends:
            if not _serves(backend, problem):
                continue
            kind = (backend, problem.form, problem.confidence, problem.dtype)
            found.append(Worst(*kind, _errors(_derivatives(problem, problem.dtype, backend), exact), eager))
    return worst_of(found)


def worst_of(found: Iterable[Worst]) -> list[Worst]:
    """Of each kind the worst, order by order."""
    worst: dict[tuple[str, str, str, str], Worst] = {}
    for one in found:
        kind = (one.backend, one.form, one.confidence, str(one.dtype))
        before = worst.get(kind, one)
        worst[kind] = one._replace(ours=_worse(before.ours, one.ours), eager=_worse(before.eager, one.eager))
    return [worst[kind] for kind in sorted(worst)]


def _worse(before: tuple[float, ...], after: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(math.nan if math.isnan(a + b) else max(a, b) for a, b in zip(before, after, strict=True))


def present() -> tuple[tuple[str, ...], torch.device]:
    """The backends besides the reference that run on this machine, and the device to run them on."""
    if torch.cuda.is_available() and dispatch.triton_state() == "compiler":
        return ("triton",), torch.device("cuda")
    return ("cpu", "triton") if dispatch.triton_state() == "interpreter" else ("cpu",), torch.device("cpu")


def relative_error(value: Tensor, exact: Tensor, size: float | None = None) -> float:
    """max |value - exact| / size, which is max |exact| where not given; the absolute error where that is zero."""
    if not exact.numel():
        return 0.0
    error = float((value.double() - exact).abs().max())
    size = float(exact.abs().max()) if size is None else size
    return error / size if size > 0 else error


def _serves(backend: str, problem: Problem) -> bool:
    device = present()[1].type
    linear = problem.form in ("linear", "prototype")
    try:
        dispatch.resolve(backend, device, problem.dtype, dispatch.triton_state(), linear=linear)
    except ValueError:
        return False
    return True


def _derivatives(problem: Problem, dtype: torch.dtype, backend: str) -> list[list[Tensor]]:
    """Value, first derivatives, and second derivatives along a direction, each a list of tensors on the CPU."""
    made = {name: value.to(present()[1]) for name, value in problem.tensors().items()}
    labels = made.pop("is_ood")
    leaves = {name: value.to(dtype).requires_grad_() for name, value in made.items()}
    generator = torch.Generator().manual_seed(problem.seed)

    def along(tensors: tuple[Tensor, ...]) -> Tensor:
        """The tensors' product with a random direction, the same for every backend and dtype."""
        total = torch.zeros((), device=labels.device)
        for tensor in tensors:
            direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            wide = tensor.to(accumulation_dtype(tensor))
            total = total + (wide * direction.to(wide)).sum()
        return total

    value = problem.call({**leaves, "is_ood": labels}, backend)
    first = torch.autograd.grad(along((value,)), list(leaves.values()), create_graph=True)
    second = torch.autograd.grad(along(first), list(leaves.values()), materialize_grads=True)
    return [[tensor.detach().cpu() for tensor in tensors] for tensors in ((value,), first, second)]


def _errors(derivatives: list[list[Tensor]], exact: list[list[Tensor]]) -> tuple[float, ...]:
    """By order, the largest relative error among the tensors; NaN if any is.

    A derivative that is a number or one per episode sums a term for every logit, of both signs, which may cancel to
    nothing: its error is relative to the sum of the absolute derivatives in the logits (or embeddings: the first).
    All others are relative to themselves.
    """
    errors = []
    for tensors, truths in zip(derivatives, exact, strict=True):
        total = float(truths[0].abs().sum())
        each = [
            relative_error(tensor, truth, total if index and truth.ndim < 2 else None)
            for index, (tensor, truth) in enumerate(zip(tensors, truths, strict=True))
        ]
        errors.append(math.nan if any(math.isnan(error) for error in each) else max(each))
    return tuple(errors)


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison and print a line per backend; 0 if no backend misses."""
    parser = argparse.ArgumentParser(prog="python -m mdml_kernels.parity", description="Every backend against float64.")
    parser.add_argument("--problems", type=int, default=200, help="how many random problems (200)")
    parser.add_argument("--seed", type=int, default=0, help="what they are drawn from (0)")
    chosen = parser.parse_args(arguments)
    backends, device = present()
    found = compare(problems(chosen.problems, chosen.seed), backends)
    print(
        f"{chosen.problems} random problems in float32 on {device}: worst relative error against float64, ours / eager"
    )
    print(f"{'backend':9}{'form':11}{'confidence':12}" + "".join(f"{order:20}" for order in ORDERS))
    for worst in found:
        pairs = (f"{ours:.1e} / {eager:.1e}" for ours, eager in zip(worst.ours, worst.eager, strict=True))
        cells = "".join(f"{pair:20}" for pair in pairs)
        print(f"{worst.backend:9}{worst.form:11}{worst.confidence:12}{cells}{'MISS' if worst.missed else ''}".rstrip())
    missed = sum(worst.missed for worst in found)
    print(f"{missed} of {len(found)} missed; asked for is no worse than plain PyTorch, plus 1e-6")
    return 1 if missed or not found else 0


if __name__ == "__main__":
    sys.exit(main())
