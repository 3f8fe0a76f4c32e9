"""The fused path's shortest way on a CPU: whole episodes of an MLP by one compiled kernel, nothing copied first."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

import torch
from mdml_kernels.native import episodes
from mdml_kernels.native import loader as native
from torch import Tensor

from mdml_fast.meta.fused_folding import CROSS, METRIC, Folding
from mdml_fast.meta.fused_layers import Layer, group_sums
from mdml_fast.meta.settings import Parameters

if TYPE_CHECKING:
    from mdml_fast.meta.fused_program import Recipe


def takes_kernels(recipe: Recipe) -> bool:
    """Whether it is an encoder of Linear and ReLU, a linear head, and the hinge loss at confidence `max`."""
    loss = recipe.loss
    return (
        isinstance(recipe.head, Layer)
        and recipe.network.log_scale is None
        and {layer.activation for layer in recipe.network.layers} <= {"", "relu"}
        and (loss.form, loss.confidence) == ("hinge", "max")
        and loss.log_temperature is None
        and recipe.settings.dtype in (None, torch.float32, torch.bfloat16)
    )


class EpisodeKernels:
    """The kernels for a recipe.

    Args:
        recipe: one that `takes_kernels`.
        folding: of the last layer and the head; None where they stay two.

    Attributes:
        name: of all gradients to the layers in one tensor.
    """

    def __init__(self, recipe: Recipe, folding: Folding | None) -> None:
        self._recipe, self._folding = recipe, folding
        self.name = "episodes, folded" if folding else "episodes"
        network, head = recipe.parts(folding)
        assert isinstance(head, Layer)
        self._layers = [*network.layers, head]
        settings = recipe.settings
        narrow = settings.dtype == torch.bfloat16
        self._inner = episodes.InnerLoop(settings.inner_steps, settings.inner_lr, "max", narrow)
        self._kept: tuple[Parameters, list[episodes.MlpLayer]] = {}, []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._lock = threading.Lock()

    def layers(self, values: Parameters, rows: Tensor, stacked: bool) -> list[episodes.MlpLayer] | None:
        """The layers as they start; None where these kernels don't serve such values and rows on this machine.

        The batches of a step come with the same shared values, from which the layers are worked out once. Values are
        [C, …] if stacked.
        """
        if not native.serves(rows):
            return None
        with self._lock:
            of, layers = self._kept
            if stacked or of is not values:
                layers = self._started(values)
            if not stacked:
                self._kept = values, layers
        given = [value for layer in layers for value in layer[:2] if value is not None]
        served = native.serves(*given) and (not self._inner.bfloat16 or episodes.takes_bfloat16(layers))
        return layers if served else None

    def adapt(self, given: list[episodes.MlpLayer], values: Parameters, support: Tensor, stacked: bool) -> Parameters:
        """The encoder after the inner loop on support rows [C, n, d]: [C, …] by name; given: their `layers`."""
        n = len(support)
        names = [name for layer in self._layers[:-1] for name in layer.names]
        own = {name: values[name].new_empty(n, *values[name].shape[stacked:]) for name in names}
        owns: list[tuple[Tensor, Tensor | None] | None] = [
            (own[layer.weight], own[layer.bias] if layer.bias else None) for layer in self._layers[:-1]
        ]
        moves = None
        if self._folding:
            moves = self._folding.no_moves(given[-1].weight, n)
        owns.append((moves.weight, moves.bias) if moves else None)
        layers = [layer._replace(own=own) for layer, own in zip(given, owns, strict=True)]
        episodes.adapt(layers, self._inner, support, *self._recipe.odds_settings(values, support))
        return own | (moves.adapted(values) if moves else {})

    def gradients(
        self, given: list[episodes.MlpLayer], values: Parameters, rows: tuple[Tensor, Tensor, Tensor], group: int
    ) -> tuple[Tensor, Parameters]:
        """See `Program.gradients`, for `parted`; rows are the support [C, n, d], the query [C, q, d], is_ood [C, q]."""
        loss = self._recipe.loss
        tau, background = self._recipe.odds_settings(values, rows[0])
        out = episodes.meta_gradients(given, self._inner, *rows, tau, background, loss.margin, group)
        grads = {self.name: out.by_layer}
        if "loss.background" in self._recipe.trained:
            assert out.by_background is not None
            grads["loss.background"] = group_sums(out.by_background, group)
        return out.loss, grads

    def parted(self, grads: Tensor) -> Parameters:
        """The gradients that `gradients` gave in one tensor [P], or [D, P], each by its name."""
        parts = torch.split(grads, [math.prod(shape) for shape in self._shapes.values()], -1)
        return {
            name: part.view(*grads.shape[:-1], *shape).clone(memory_format=torch.contiguous_format)
            for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)
        }

    def _started(self, values: Parameters) -> list[episodes.MlpLayer]:
        given = self._folding.values(values) if self._folding else values
        layers = [_layer(layer, given) for layer in self._layers]
        if self._folding:
            layers[-1] = layers[-1]._replace(metric=given[METRIC], fixed_bias=self._folding.last.bias is None)
        names = [name for layer in self._layers for name in layer.names]
        self._shapes = dict(zip([*names, CROSS], episodes.gradient_shapes(layers, self._inner), strict=False))
        return layers


def _layer(layer: Layer, given: Parameters) -> episodes.MlpLayer:
    bias = given[layer.bias].contiguous().unsqueeze(-2) if layer.bias else None
    return episodes.MlpLayer(given[layer.weight].contiguous(), bias, layer.activation == "relu")
