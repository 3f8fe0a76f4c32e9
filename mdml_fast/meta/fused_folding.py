"""An encoder's last layer and a linear head as one layer, where no activation stands between and K is small.

The layer has W [z, I] and b [z], the head V [K, z] and a [K]. Logits of what goes into the layer are ``h Fᵀ + c`` with
F = V W and c = V b + a, and products with F [K, I] are the smaller the smaller K is. The inner loop trains W and b, and
moves F and c by it: a step of W along Vᵀ G is one of F along M G, where M = V Vᵀ and G is the gradient to F. With the
sums of all steps D = -lr Σ G and d = -lr Σ g it arrives at

    W' = W + Vᵀ D    b' = b + Vᵀ d    F' = F + M D    c' = c + M d

and the first-order gradients of an outer loss, from its own G and g at F' and c', are

    by W: Vᵀ G    by b: Vᵀ g    by V: G W'ᵀ + g b'ᵀ = G Wᵀ + g bᵀ + (G Dᵀ + g dᵀ) V    by a: g
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mdml_fast.meta.fused_layers import Layer, Network, Weights
from mdml_fast.meta.settings import Parameters

# Folding has to leave this much fewer products: those that it adds are small ones, and slower.
LEAST_GAIN = 1.5

# F, c and M; among gradients G, g and, where the inner loop took a step, G Dᵀ + g dᵀ.
WEIGHT, BIAS, METRIC, CROSS = "folded.weight", "folded.bias", "folded.metric", "folded.cross"
GRADIENTS = WEIGHT, BIAS, CROSS


class Folding(NamedTuple):
    """The encoder's last layer and the head, which become one."""

    last: Layer
    head: Layer

    @property
    def layer(self) -> Layer:
        """The two as one."""
        return Layer(WEIGHT, BIAS if self.last.bias or self.head.bias else None)

    @property
    def names(self) -> list[str]:
        """Of the parameters of both."""
        return [name for layer in self for name in (layer.weight, layer.bias) if name]

    def values(self, values: Parameters) -> Parameters:
        """The values with F [K, I], c [K] (where there is a bias) and M [K, K] in place of both layers' parameters.

        Of stacked ones they are [C, …].
        """
        head, own = values[self.head.weight], set(self.names)
        others = {name: value for name, value in values.items() if name not in own}
        folded = {WEIGHT: head @ values[self.last.weight], METRIC: head @ head.mT}
        biases = []
        if self.last.bias:
            biases.append((head @ values[self.last.bias].unsqueeze(-1)).squeeze(-1))
        if self.head.bias:
            biases.append(values[self.head.bias])
        return others | folded | ({BIAS: sum(biases[1:], biases[0])} if biases else {})

    @property
    def inner(self) -> list[str]:
        """Names of what the inner loop moves."""
        return [WEIGHT, BIAS] if self.last.bias else [WEIGHT]

    def no_moves(self, folded: Tensor, n_episodes: int) -> Moves:
        """Of so many episodes, by a weight like the folded one."""
        n_logits, n_in = folded.shape[-2:]
        bias = folded.new_zeros(n_episodes, n_logits) if self.last.bias else None
        return Moves(self, folded.new_zeros(n_episodes, n_logits, n_in), bias)

    def sizes(self, values: Parameters, rows: tuple[int, int], n_steps: int, stacked: bool) -> Sizes:
        """Of episodes with so many support and query rows."""
        n_logits, n_embedding = values[self.head.weight].shape[-2:]
        return Sizes(*rows, n_steps, values[self.last.weight].shape[-1], n_embedding, n_logits, stacked)

    def gradients(self, values: Parameters, folded: Parameters) -> Parameters:
        """The gradients to both layers' parameters from G, g and G Dᵀ + g dᵀ by name; all [D, …] if values are stacked.

        They are linear in these, so sums over episodes come to the same.
        """
        values = {name: value.to(folded[WEIGHT].dtype) for name, value in values.items()}
        head, last, by_folded = values[self.head.weight], values[self.last.weight], folded[WEIGHT]
        by_head = by_folded @ last.mT
        if CROSS in folded:
            by_head += folded[CROSS] @ head
        grads = {self.last.weight: head.mT @ by_folded, self.head.weight: by_head}
        if self.last.bias:
            grads[self.last.bias] = (folded[BIAS].unsqueeze(-2) @ head).squeeze(-2)
            by_head += folded[BIAS].unsqueeze(-1) * values[self.last.bias].unsqueeze(-2)
        if self.head.bias:
            grads[self.head.bias] = folded[BIAS]
        return grads


class Moves(NamedTuple):
    """What the inner loops of C episodes moved: D [C, K, I], and d [C, K] where the last layer has a bias."""

    folding: Folding
    weight: Tensor
    bias: Tensor | None

    def clear(self) -> None:
        """Nothing has moved."""
        self.weight.zero_()
        if self.bias is not None:
            self.bias.zero_()

    def descend(self, by_weight: Tensor, by_bias: Tensor | None, lr: float, given: Parameters, own: Weights) -> None:
        """Take a step against G [C, K, I] and g [C, K]; own F and c become those that are given, moved."""
        self.weight.add_(by_weight, alpha=-lr)
        metric, weight = given[METRIC], own.master[WEIGHT]
        torch.baddbmm(given[WEIGHT], metric.expand(len(weight), *metric.shape[-2:]), self.weight, out=weight)
        if self.bias is not None:
            assert by_bias is not None
            self.bias.add_(by_bias, alpha=-lr)
            steps = (self.bias.unsqueeze(-2) @ metric).squeeze(-2)  # M is symmetric
            torch.add(given[BIAS], steps, out=own.master[BIAS])
        if own.compute is not own.master:
            for name in self.folding.inner:
                own.compute[name].copy_(own.master[name])

    def adapted(self, values: Parameters) -> Parameters:
        """W' [C, z, I] and b' [C, z], by name."""
        last, turned = self.folding.last, values[self.folding.head.weight].mT
        adapted = {last.weight: values[last.weight] + turned @ self.weight}
        if self.bias is not None:
            assert last.bias
            adapted[last.bias] = values[last.bias] + (turned @ self.bias.unsqueeze(-1)).squeeze(-1)
        return adapted

    def gradients(self, by_weight: Tensor, by_bias: Tensor | None, n_steps: int) -> Parameters:
        """G [C, K, I], g [C, K] and, after some steps, G Dᵀ + g dᵀ [C, K, K]: by name, as `Folding.gradients` wants."""
        grads = {WEIGHT: by_weight}
        if by_bias is not None:
            grads[BIAS] = by_bias
        if n_steps:
            cross = grads[CROSS] = torch.bmm(by_weight, self.weight.mT)
            if self.bias is not None:
                cross.baddbmm_(grads[BIAS].unsqueeze(-1), self.bias.unsqueeze(-2))
        return grads


class Sizes(NamedTuple):
    """What the products of an episode depend on.

    Attributes:
        n_support: rows of the inner loop.
        n_query: rows of the outer loss.
        n_steps: of the inner loop.
        n_in: I.
        n_embedding: z.
        n_logits: K.
        stacked: whether each episode has parameters of its own.
    """

    n_support: int
    n_query: int
    n_steps: int
    n_in: int
    n_embedding: int
    n_logits: int
    stacked: bool

    @property
    def apart(self) -> int:
        """Multiplications in the products of both layers: forward, and backward to rows and weights."""
        inner, outer = self.n_support * self.n_steps, self.n_query
        last = 3 * (inner + outer) * self.n_in * self.n_embedding
        return last + (2 * inner + 3 * outer) * self.n_embedding * self.n_logits

    @property
    def folded(self) -> int:
        """Those of the folded layer, and of M D in each step and G Dᵀ."""
        rows, square = self.n_support * self.n_steps + self.n_query, self.n_logits**2
        products = 3 * rows * self.n_in * self.n_logits + (self.n_steps + bool(self.n_steps)) * square * self.n_in
        own = self.n_logits * self.n_embedding * self.n_in + square * self.n_embedding  # V W and V Vᵀ
        return products + self.stacked * own

    @property
    def fold(self) -> bool:
        """Whether folding pays."""
        return self.folded * LEAST_GAIN <= self.apart


def read_folding(network: Network, head: Layer | str, modules: nn.ModuleDict) -> Folding | None:
    """How to fold the encoder's last layer and the head; None where that is impossible."""
    last = network.layers[-1]
    if len(network.layers) < 2 or network.log_scale or last.activation or not isinstance(head, Layer):
        return None
    folding = Folding(last, head)
    dtypes = {modules.get_parameter(name).dtype for name in folding.names}
    return folding if dtypes in ({torch.float32}, {torch.float64}) else None
