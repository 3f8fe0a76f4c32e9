"""The log-odds of rows on a CPU: passes over chunks that stay in the cache, with the analytic gradient and no graph.

Letters: E episodes, N rows, K logits; τ = 1/T one per episode, b the background logits or None. See `chunks` for the
mathematics. Nothing the size of the logits is allocated but the gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdml_kernels import chunks, pages
from mdml_kernels.native import rows as native
from mdml_kernels.reference import Confidence

# 1 MiB of float32, a second-level cache, for each thread: fewer would pay more for dispatch than it saves (measured).
_CHUNK_ELEMENTS = 1 << 18


def forward(
    logits: Tensor, tau: Tensor, background: Tensor | None, confidence: Confidence
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The odds [E, N]; then to save: peak and total of the sum [E, N], the first largest index [E, N] (mass: empty)."""
    if native.serves_rows(logits, tau):
        top, peak, total, first = native.statistics(logits, tau, confidence)
        against = None if background is None else background[:, None]
        return chunks.odds_of(top, peak, total, against, confidence), peak, total, first
    n_episodes, n_rows, _ = logits.shape
    top, second, largest = (tau.new_empty(n_episodes, n_rows, 1) for _ in range(3))
    first = torch.empty(n_episodes, n_rows if confidence == "max" else 0, 1, dtype=torch.int64, device=logits.device)
    plan = Plan(logits, tau)
    columns = (top, second, largest, first if confidence == "max" else top)
    for chunk, t, top_c, second_c, largest_c, first_c in plan.pieces(logits, tau[:, None, None], *columns):
        x = torch.mul(chunk, t, out=plan.scratch(0, chunk))
        if confidence == "max":
            chunks.first_max(x, top_c, first_c, plan.scratch(1, chunk), plan.descending)
            torch.amax(chunks.drop(x, first_c), -1, keepdim=True, out=second_c)
        else:
            torch.amax(x, -1, keepdim=True, out=top_c)
        torch.amax(torch.softmax(x, -1, out=x), -1, keepdim=True, out=largest_c)
    peak = second if confidence == "max" else top
    odds, total = chunks.finish_odds(top, peak, largest, per_row(background), confidence)
    return odds.squeeze(-1), peak.squeeze(-1), total.squeeze(-1), first.squeeze(-1)


def backward(
    logits: Tensor,
    tau: Tensor,
    background: Tensor | None,
    saved: tuple[Any, ...],
    grad: Tensor,
    confidence: Confidence,
    needs_tau: bool,
    by_loss: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """grad [E, N] pulled back to the logits [E, N, K] in their dtype, to τ [E] where asked, and to b [E].

    by_loss: a factor for each episode [E], where there is one.
    """
    if native.serves_rows(logits, tau):
        grad_logits = pages.empty_like(logits)
        peak, total, first = (column.contiguous() for column in saved)
        columns = (peak, total, first if confidence == "max" else None)
        slopes = (None if by_loss is None else by_loss.contiguous(), grad.contiguous())
        return grad_logits, *native.gradients(logits, tau, background, slopes, columns, needs_tau, grad_logits)
    if by_loss is not None:
        grad = grad * by_loss[:, None]
    peak, total, first = (column.unsqueeze(-1) for column in saved)
    kept, dropped, poison = chunks.split_background(peak, total, per_row(background), confidence)
    grad = grad.unsqueeze(-1) + poison
    at_first = grad * tau[:, None, None]
    recipe = Recipe(at_first * kept, at_first, first if confidence == "max" else None, drops_first=True)
    grad_logits, grad_tau = pull_back(logits, tau, recipe, needs_tau)
    return grad_logits, grad_tau, None if background is None else -(grad * dropped).sum((1, 2))


@dataclass(frozen=True)
class Recipe:
    """A gradient with respect to logits: at_rest * softmax, but at_first at the index first. Columns [E, N, 1].

    With drops_first the softmax is one over the other entries alone. unscaled: the host knows that τ is 1.
    """

    at_rest: Tensor
    at_first: Tensor
    first: Tensor | None
    drops_first: bool
    unscaled: bool = False


def pull_back(
    logits: Tensor, tau: Tensor, recipe: Recipe, needs_tau: bool, softmax: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The gradient by the recipe, in the logits' dtype, and that of τ [E] where asked, in one pass over the logits.

    A softmax [E, N, K] that is at hand already becomes the gradient, in place.
    """
    grad_logits = pages.empty_like(logits) if softmax is None else softmax
    tau_rows = torch.empty_like(recipe.at_first) if needs_tau else recipe.at_first
    direct = logits.dtype == tau.dtype
    plan = Plan(logits, tau)
    first = recipe.at_first if recipe.first is None else recipe.first
    columns = (recipe.at_rest, recipe.at_first, first, tau_rows)
    for chunk, t, result, rest_c, at_first_c, first_c, tau_c in plan.pieces(
        logits, tau[:, None, None], grad_logits, *columns
    ):
        x = result if direct else plan.scratch(0, chunk)
        if softmax is None:
            untouched = direct and recipe.unscaled and not recipe.drops_first  # dropping writes
            scaled = chunk if untouched else torch.mul(chunk, t, out=x)
            if recipe.first is not None and recipe.drops_first:
                chunks.drop(scaled, first_c)
            torch.softmax(scaled, -1, out=x)
        chunks.weigh(x, None if recipe.first is None else first_c, rest_c, at_first_c)
        if not direct:
            result.copy_(x)
        if needs_tau:
            by_tau = torch.mul(x, chunk, out=plan.scratch(1, chunk)).masked_fill_(chunk == -torch.inf, 0.0)
            torch.sum(by_tau, -1, keepdim=True, out=tau_c)
    return grad_logits, tau_rows.sum((1, 2)) / tau if needs_tau else None


def double_backward(
    logits: Tensor,
    tau: Tensor,
    background: Tensor | None,
    saved: tuple[Any, ...],
    grad: Tensor,
    tangents: tuple[Any, ...],
    confidence: Confidence,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∂(grad · J v)/∂(logits, τ, b) as in `backward`, then J v [E, N]; v are the tangents, None for zero."""
    peak, total, first = (column.unsqueeze(-1) for column in saved)
    kept, dropped, poison = chunks.split_background(peak, total, per_row(background), confidence)
    grad = grad.unsqueeze(-1) + poison
    v_logits, v_tau, v_background = tangents
    per_episode = [(torch.zeros_like(tau) if v is None else v)[:, None, None] for v in (tau, v_tau, v_background)]
    grad_logits = pages.empty_like(logits)
    tau_rows, background_rows, along = (torch.empty_like(total) for _ in range(3))
    plan = Plan(logits, tau)
    everything = (logits, logits if v_logits is None else v_logits, first if confidence == "max" else total)
    results = (grad_logits, tau_rows, background_rows, along)
    for chunk, v_chunk, first_c, t, dt, db, grad_c, kept_c, dropped_c, *result in plan.pieces(
        *everything, *per_episode, grad, kept, dropped, *results
    ):
        x, v = chunk.to(tau.dtype), None if v_logits is None else v_chunk.to(tau.dtype)
        grad_x, grad_moved, *columns = chunks.second_order(
            x, v, first_c if confidence == "max" else None, (t, dt, db, grad_c, kept_c, dropped_c)
        )
        result[0].copy_(grad_x.mul_(t).addcmul_(grad_moved, dt))
        for to, column in zip(result[1:], columns, strict=True):
            to.copy_(column)
    return grad_logits, tau_rows.sum((1, 2)), background_rows.sum((1, 2)), along.squeeze(-1)


class Plan:
    """How logits [E, N, K] are cut: several whole episodes at a time, or rows of one; and two scratch buffers."""

    def __init__(self, logits: Tensor, tau: Tensor) -> None:
        n_episodes, n_rows, n_classes = logits.shape
        elements = _CHUNK_ELEMENTS * torch.get_num_threads()
        self.empty = not n_episodes * n_rows
        self.whole = n_rows * n_classes <= elements
        self.episodes = max(1, min(n_episodes, elements // max(1, n_rows * n_classes))) if self.whole else 1
        self.rows = n_rows if self.whole else max(1, elements // n_classes)
        self.single = self.whole and self.episodes == n_episodes
        self._scratch: dict[int, Tensor] = {}
        self._tau = tau
        self.descending = torch.arange(n_classes, 0, -1, dtype=tau.dtype, device=tau.device)

    def pieces(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The tensors' parts for chunk after chunk; one that has a single row (of several) stays as it is."""
        if self.empty:
            return
        if self.single:
            yield tensors
            return
        for parts in zip(*(torch.split(tensor, self.episodes) for tensor in tensors), strict=True):
            if self.whole:
                yield parts
            else:
                yield from zip(*self._rows_of(parts), strict=True)

    def _rows_of(self, parts: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        n_chunks = -(-max(part.shape[1] for part in parts) // self.rows)
        return [
            tuple(itertools.repeat(part, n_chunks)) if part.shape[1] == 1 else torch.split(part, self.rows, 1)
            for part in parts
        ]

    def scratch(self, which: int, chunk: Tensor) -> Tensor:
        """A buffer shaped like the chunk, in the accumulation dtype; the next chunk overwrites it."""
        if which not in self._scratch:
            self._scratch[which] = self._tau.new_empty(self.episodes * self.rows * chunk.shape[-1])
        return self._scratch[which][: chunk.numel()].view(chunk.shape)


class Kept:
    """What a loss keeps of its forward pass, [E, N, K], for its first backward pass to turn into the gradient."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []

    def put(self, logits: Tensor, values: Tensor) -> None:
        """Keep values made of these logits."""
        self._kept.append((logits, values))

    def take(self, logits: Tensor) -> Tensor | None:
        """What was kept of these very logits, once; a transform may ask for others (`jacrev` does)."""
        of, values = self._kept.pop() if self._kept else (None, None)
        return values if of is not None and of.is_set_to(logits) else None


def per_row(values: Tensor | None) -> Tensor | None:
    """One value per episode [E] as [E, 1, 1], to broadcast against columns [E, N, 1]."""
    return None if values is None else values[:, None, None]
