"""The fused path's shortest way on a CPU for prototype heads: whole episodes by one compiled kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from mdml_kernels.native import loader as native
from mdml_kernels.native import prototypes
from torch import Tensor

from mdml_fast.meta.fused_heads import PROTOTYPES
from mdml_fast.meta.settings import Parameters

if TYPE_CHECKING:
    from mdml_fast.meta.fused_program import Recipe


def takes_prototypes(recipe: Recipe) -> bool:
    """Whether it is a residual encoder without an inner loop, and the `bce` loss at confidence `mass`."""
    loss, settings = recipe.loss, recipe.settings
    return (
        recipe.head == PROTOTYPES
        and recipe.network.log_scale is not None
        and (loss.form, loss.confidence) == ("bce", "mass")
        and loss.log_temperature is None
        and settings.inner_steps == 0
        and settings.dtype in (None, torch.float32, torch.bfloat16)
    )


class PrototypeKernels:
    """The kernel for a recipe that `takes_prototypes`."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        inner, outer = recipe.network.layers
        assert recipe.network.log_scale
        assert inner.bias
        self._narrow = recipe.settings.dtype == torch.bfloat16
        self._names = (recipe.network.log_scale, inner.weight, inner.bias, outer.weight)

    def serves(self, values: Parameters, stacked: bool, support: Tensor | None = None) -> bool:
        """Whether it takes such values on this machine, and support rows [C, n, d] where given.

        Each episode has to have parameters of its own.
        """
        encoder, rows = self._encoder(values), () if support is None else (support,)
        if not stacked or not native.serves(*rows, values["head.variance"], *encoder):
            return False
        return not self._narrow or prototypes.takes_bfloat16(encoder, *rows)

    def gradients(
        self, values: Parameters, support: Tensor, query: Tensor, is_ood: Tensor
    ) -> tuple[Tensor, Parameters]:
        """See `GenericPath`; a group is one episode."""
        encoder = self._encoder(values)
        tau, background = self._recipe.odds_settings(values, support)
        loss, by_encoder, by_background = prototypes.gradients(
            encoder, values["head.variance"], support, query, is_ood, tau, background, self._narrow
        )
        grads: Parameters = dict(zip(self._names, by_encoder, strict=True))
        if "loss.background" in self._recipe.trained:
            assert by_background is not None
            grads["loss.background"] = by_background
        return loss, grads

    def _encoder(self, values: Parameters) -> prototypes.ResidualEncoder:
        return prototypes.ResidualEncoder(*(values[name] for name in self._names))
