"""The fused computation for batches of one shape: all memory and all views are made once, then only filled.

Only the products that are needed are taken: no gradient to the rows, none to the head in the inner loop. As long as
all episodes share their weights (before the first inner step) a layer is one large product. No graph is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mdml_kernels import SoftmaxMarginLoss, direct
from mdml_kernels.native import loader
from torch import Tensor

from mdml_fast.meta import on_gpu
from mdml_fast.meta.fused_folding import BIAS, WEIGHT, Folding
from mdml_fast.meta.fused_heads import PROTOTYPES, batched_head
from mdml_fast.meta.fused_layers import BatchedLayer, BatchedNetwork, Buffers, Layer, Network, Weights, group_sums
from mdml_fast.meta.settings import EngineSettings, Parameters


@dataclass(frozen=True)
class Recipe:
    """What is to be computed, whatever the shapes.

    `trained` are the names of all parameters; `folding` is None where the encoder's last layer stays one of its own.
    """

    network: Network
    head: Layer | str
    loss: SoftmaxMarginLoss
    settings: EngineSettings
    trained: list[str]
    folding: Folding | None

    @property
    def takes_support(self) -> bool:
        """Whether the logits depend on the support rows."""
        return self.head == PROTOTYPES

    @property
    def adapted(self) -> list[str]:
        """What the inner loop trains."""
        return [name for name in self.trained if name.startswith("encoder.")]

    def folds(self, values: Parameters, n_support: int, n_query: int, stacked: bool) -> Folding | None:
        """How the last layer and the head are folded in episodes of so many rows; None where that does not pay."""
        steps = self.settings.inner_steps
        if self.folding and self.folding.sizes(values, (n_support, n_query), steps, stacked).fold:
            return self.folding
        return None

    def parts(self, folding: Folding | None) -> tuple[Network, Layer | str]:
        """The encoder and the head, as they are folded."""
        if folding is None:
            return self.network, self.head
        return self.network._replace(layers=self.network.layers[:-1]), folding.layer

    def odds_settings(self, values: Parameters, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """For batched rows [C, …]: 1/T [C], None where it is 1, and the background [C], None where there is none."""
        n_episodes, temperature, background = len(rows), self.loss.fixed_temperature, self.loss.background
        tau = None if temperature == 1 else rows.new_full((n_episodes,), 1 / temperature)
        if "loss.log_temperature" in self.trained:
            tau = values["loss.log_temperature"].neg().exp().to(rows.dtype).expand(n_episodes)
        if "loss.background" in self.trained:
            return tau, values["loss.background"].to(rows.dtype).expand(n_episodes)
        return tau, None if background is None else rows.new_full((n_episodes,), float(background))

    def weights(self, values: Parameters) -> Weights:
        """The values, and beside them what the products compute with."""
        dtype = self.settings.dtype
        networks = [name for name in (*self.trained, WEIGHT, BIAS) if name in values and not name.startswith("loss.")]
        if dtype is None or all(values[name].dtype == dtype for name in networks):
            return Weights(values, values)
        return Weights(values, values | {name: values[name].to(dtype) for name in networks})

    def cast(self, rows: Tensor) -> Tensor:
        """Rows for the products."""
        return (rows if self.settings.dtype is None else rows.to(self.settings.dtype)).contiguous()


class Program:
    """The recipe for C episodes of n support and q query rows.

    Args:
        recipe: what to compute.
        values: parameters and buffers like those to come, [C, …] if stacked, else shared.
        support: rows [C, n, d] like those to come.
        n_query: q.
        stacked: see values.
    """

    def __init__(self, recipe: Recipe, values: Parameters, support: Tensor, n_query: int, stacked: bool) -> None:
        self.recipe = recipe
        self.run: Callable[..., Any] | None = None  # `gradients`, or a CUDA graph of it
        n_episodes, n_support, _ = support.shape
        self.n_episodes, self.n_centers = n_episodes, n_support if recipe.takes_support else 0
        buffers, dtype = Buffers(support.device), support.dtype
        self.by_triton = on_gpu.takes_triton(recipe.network, recipe.head, support.device, dtype)

        folding = None if self.by_triton else recipe.folds(values, n_support, n_query, stacked)
        (network, head), inner = recipe.parts(folding), recipe.adapted
        if folding:
            inner = [name for name in inner if name not in folding.last] + folding.inner
            values = folding.values(values)

        def memory(name: str, *episodes: int) -> Tensor:
            """For a value. Products are fastest with weights [I, O]; kernels want them as they are, [O, I]."""
            shape = (*episodes, *values[name].shape)
            by_kernels = self.by_triton or loader.serves(values[name])
            if name in inner and values[name].ndim - stacked == 2 and not by_kernels:
                *outer, n_out, n_in = shape
                return values[name].new_empty(*outer, n_in, n_out).mT
            return values[name].new_empty(shape)

        self.given = recipe.weights({name: memory(name) for name in values})
        own = {name: memory(name, *(() if stacked else (n_episodes,))) for name in inner}
        self.own = self.given.updated(recipe.weights(own))
        last = self.own if recipe.settings.inner_steps else self.given
        self.start = BatchedNetwork(network, self.given, n_episodes, n_support, buffers)
        self.inner = BatchedNetwork(network, self.own, n_episodes, n_support, buffers)
        self.start_head = batched_head(head, self.given, n_episodes, n_support, buffers, dtype)
        self.inner_head = batched_head(head, self.own, n_episodes, n_support, buffers, dtype)
        self.outer = BatchedNetwork(network, last, n_episodes, self.n_centers + n_query, buffers)
        self.outer_head = batched_head(head, last, n_episodes, n_query, buffers, dtype)
        # The layers of self.inner take over what comes of a step from those of self.start, then from themselves.
        pairs = [
            *zip(self.start.layers, self.inner.layers, strict=True),
            *((layer, layer) for layer in self.inner.layers),
        ]
        self.successor = dict(pairs)
        self.moves = folding.no_moves(values[WEIGHT], n_episodes) if folding else None

    def load(self, values: Parameters) -> None:
        """Take over the values."""
        if self.moves:
            values = self.moves.folding.values(values)
        for side in {id(side): side for side in self.given}.values():
            for name, value in values.items():
                side[name].copy_(value)

    def adapt(self, values: Parameters, support: Tensor) -> Parameters:
        """The encoder after SGD on the one-class loss of support rows [C, n, d]: [C, …], in the program's memory.

        values are those that were loaded.
        """
        self._descend(support)
        moved = self.moves.adapted(values) if self.moves else {}
        return {name: moved[name] if name in moved else self.own.master[name] for name in self.recipe.adapted}

    def gradients(self, support: Tensor, query: Tensor, is_ood: Tensor, group: int) -> tuple[Tensor, Parameters]:
        """Outer losses [C], and the gradients summed over groups of so many episodes, [C / group, …].

        Those of folded layers are the folded one's: see `Folding.gradients`.
        """
        grads: Parameters = {}

        def collect(layer: BatchedLayer, grad: Tensor) -> None:
            by_weight, by_bias = layer.gradients(grad, group, query.dtype)
            grads[layer.layer.weight] = by_weight
            if by_bias is not None:
                assert layer.layer.bias
                grads[layer.layer.bias] = by_bias

        def collect_folded(layer: BatchedLayer, grad: Tensor) -> None:
            assert self.moves
            by_weight, by_bias = layer.gradients(grad, 1, self.moves.weight.dtype)
            found = self.moves.gradients(by_weight, by_bias, self.recipe.settings.inner_steps)
            grads.update({name: group_sums(values, group).to(query.dtype) for name, values in found.items()})

        self._descend(support)
        rows = torch.cat([support, query], 1) if self.n_centers else query
        z = self.outer.forward(self.recipe.cast(rows))
        logits = self.outer_head.logits(z[:, self.n_centers :], z[:, : self.n_centers])
        out = self._margin(logits, is_ood)
        grad_z, grad_centers = self.outer_head.pull(out.logits, collect_folded if self.moves else collect)
        if grad_centers is not None:
            grad_z = torch.cat([grad_centers, grad_z], 1)
        by_scale = self.outer.backward(grad_z, collect)
        if by_scale is not None:
            assert self.recipe.network.log_scale
            grads[self.recipe.network.log_scale] = group_sums(by_scale, group)
        if out.tau is not None:
            tau, _ = self.recipe.odds_settings(self.given.master, query)
            assert tau is not None
            grads["loss.log_temperature"] = group_sums(-tau * out.tau, group)  # τ = exp(-log T)
        if "loss.background" in self.recipe.trained:
            assert out.background is not None
            grads["loss.background"] = group_sums(out.background, group)
        return out.loss, grads

    def _descend(self, support: Tensor) -> None:
        """Fill `own` and `moves` by the inner loop."""
        tau, background = self.recipe.odds_settings(self.given.master, support)
        if self.by_triton and self.recipe.settings.inner_steps:
            on_gpu.adapt(self.recipe, self.given, self.own, support, tau, background)
        else:
            self._by_layers(self.recipe.cast(support), tau, background)

    def _by_layers(self, rows: Tensor, tau: Tensor | None, background: Tensor | None) -> None:
        """`_descend` on rows as the products take them."""
        lr = self.recipe.settings.inner_lr

        def descend(layer: BatchedLayer, grad: Tensor) -> None:
            self.successor[layer].descend(layer, grad, lr)

        def descend_folded(layer: BatchedLayer, grad: Tensor) -> None:
            assert self.moves
            self.moves.descend(*layer.gradients(grad, 1, self.moves.weight.dtype), lr, self.given.master, self.own)

        if self.moves:
            self.moves.clear()
        for step in range(self.recipe.settings.inner_steps):
            network, head = (self.inner, self.inner_head) if step else (self.start, self.start_head)
            z = network.forward(rows)
            logits = head.logits(z, z)
            grad = direct.one_class_gradient_(logits, tau, background, self.recipe.loss.confidence)
            grad_z, grad_centers = head.pull(grad, descend_folded if self.moves else None)
            if grad_centers is not None:
                grad_z.add_(grad_centers)
            by_scale = network.backward(grad_z, descend)
            if by_scale is not None:
                assert network.log_scale is not None
                torch.add(network.log_scale, by_scale, alpha=-lr, out=self.inner.log_scale)

    def _margin(self, logits: Tensor, is_ood: Tensor) -> direct.LossGradients:
        loss = self.recipe.loss
        return direct.margin_gradients(
            logits,
            is_ood,
            *self.recipe.odds_settings(self.given.master, logits),
            margin=loss.margin,
            confidence=loss.confidence,
            form=loss.form,
            backend="cpu" if logits.device.type == "cpu" else "triton",
            needs_tau="loss.log_temperature" in self.recipe.trained,
        )
