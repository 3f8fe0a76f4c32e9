"""The fused path's shortest way on a CPU: whole episodes of an MLP by one compiled kernel."""

from __future__ import annotations

import torch
from mdml_kernels import SoftmaxMarginLoss
from mdml_kernels.native import episodes
from mdml_kernels.native import library as native
from torch import Tensor

from mdml_fast.meta.fused_folding import CROSS, METRIC, Moves
from mdml_fast.meta.fused_layers import Layer, Network
from mdml_fast.meta.settings import EngineSettings, Parameters


class EpisodeKernels:
    """An encoder of Linear and ReLU, a linear head, the hinge loss at confidence `max`.

    Args:
        network: the encoder.
        head: the head.
        given: the parameters that episodes start from.
        own: those that the inner loop writes.
        moves: what it writes of a folded head; None where the head is one of its own.
        settings: the engine's.
    """

    def __init__(
        self,
        network: Network,
        head: Layer,
        given: Parameters,
        own: Parameters,
        moves: Moves | None,
        settings: EngineSettings,
    ) -> None:
        self._names = [*network.layers, head]
        top = _layer(head, given, None)
        if moves:
            bias = None if moves.bias is None else moves.bias.unsqueeze(-2)
            top = top._replace(own=(moves.weight, bias), metric=given[METRIC])
        self._layers = [*(_layer(layer, given, own) for layer in network.layers), top]
        narrow = settings.dtype == torch.bfloat16
        self._inner = episodes.InnerLoop(settings.inner_steps, settings.inner_lr, "max", narrow)
        plain = native.serves(*(layer.weight for layer in self._layers))
        self.serves = plain and (not narrow or episodes.takes_bfloat16(self._layers))

    def adapt(self, support: Tensor, tau: Tensor | None, background: Tensor | None) -> None:
        """The inner loop on support rows [C, n, d]; τ and the background are [C] or None."""
        episodes.adapt(self._layers, self._inner, support, tau, background)

    def gradients(
        self,
        rows: tuple[Tensor, Tensor, Tensor],
        tau: Tensor | None,
        background: Tensor | None,
        margin: float,
        group: int,
    ) -> tuple[Tensor, Parameters, Tensor | None]:
        """Outer losses [C], the gradients [C / group, …] to the layers, and that to the background [C].

        rows are the support [C, n, d], the query [C, q, d] and is_ood [C, q].
        """
        out = episodes.meta_gradients(self._layers, self._inner, *rows, tau, background, margin, group)
        grads = {} if out.cross is None else {CROSS: out.cross}
        for layer, (by_weight, by_bias) in zip(self._names, out.by_layer, strict=True):
            grads[layer.weight] = by_weight
            if layer.bias and by_bias is not None:
                grads[layer.bias] = by_bias
        return out.loss, grads, out.by_background


def make(
    network: Network,
    head: Layer | str,
    loss: SoftmaxMarginLoss,
    given: Parameters,
    own: Parameters,
    moves: Moves | None,
    settings: EngineSettings,
) -> EpisodeKernels | None:
    """The kernels for this computation, where this machine has such."""
    if (
        not isinstance(head, Layer)
        or network.log_scale is not None
        or not {layer.activation for layer in network.layers} <= {"", "relu"}
        or (loss.form, loss.confidence) != ("hinge", "max")
        or loss.log_temperature is not None
    ):
        return None
    kernels = EpisodeKernels(network, head, given, own, moves, settings)
    return kernels if kernels.serves else None


def _layer(layer: Layer, given: Parameters, own: Parameters | None) -> episodes.MlpLayer:
    bias = given[layer.bias].unsqueeze(-2) if layer.bias else None
    mine = (own[layer.weight], own[layer.bias] if layer.bias else None) if own else None
    return episodes.MlpLayer(given[layer.weight], bias, layer.activation == "relu", mine)
