"""The fused path: an MLP and a linear or prototype head for many episodes at once, by analytic gradients in place."""

from __future__ import annotations

import functools
import itertools
import threading

import torch
from mdml_kernels import SoftmaxMarginLoss, checks
from mdml_kernels.native.episodes import MlpLayer
from torch import Tensor, nn

from mdml_fast.meta.fused_episodes import EpisodeKernels, takes_kernels
from mdml_fast.meta.fused_folding import GRADIENTS, Folding, read_folding
from mdml_fast.meta.fused_heads import batched_head, read_head
from mdml_fast.meta.fused_layers import BatchedNetwork, Buffers, Layer, read_encoder
from mdml_fast.meta.fused_program import Program, Recipe
from mdml_fast.meta.fused_prototypes import PrototypeKernels, takes_prototypes
from mdml_fast.meta.on_gpu import Replayed
from mdml_fast.meta.settings import EngineSettings, Parameters

# Programs kept for each thread: a training run has one shape, and another for what is left over.
KEPT_PROGRAMS = 4


class FusedPath:
    """As `GenericPath`, for what `paths.choose_path` lets through.

    Raises:
        ValueError: a layer takes another width than the one before it gives, or the loss can't take so few logits.
    """

    def __init__(self, modules: nn.ModuleDict, settings: EngineSettings) -> None:
        network, head, loss = read_encoder(modules["encoder"]), read_head(modules["head"]), modules["loss"]
        assert network is not None
        assert head is not None
        assert isinstance(loss, SoftmaxMarginLoss)
        _check_widths((*network.layers, head) if isinstance(head, Layer) else network.layers, modules)
        if isinstance(head, Layer):
            _check_loss(loss, modules.get_parameter(head.weight).shape[-2])
        trained = [name for name, _ in modules.named_parameters()]
        self._recipe = Recipe(network, head, loss, settings, trained, read_folding(network, head, modules))
        self.takes_support = self._recipe.takes_support
        self.n_features: int | None = modules.get_parameter(network.layers[0].weight).shape[-1]
        self._kernels: dict[Folding | None, EpisodeKernels] = {}
        if takes_kernels(self._recipe):
            self._kernels = {folding: EpisodeKernels(self._recipe, folding) for folding in (None, self._recipe.folding)}
        self._prototypes = PrototypeKernels(self._recipe) if takes_prototypes(self._recipe) else None
        self._kept = threading.local()

    def adapt(self, values: Parameters, support: Tensor, stacked: bool) -> Parameters:
        """See `GenericPath`."""
        self._check_centers(support)
        kernels, layers = self._serving(values, support, 0, stacked)
        if kernels and layers and self._recipe.settings.inner_steps:
            return kernels.adapt(layers, values, support, stacked)
        if self._recipe.settings.inner_steps:
            adapted = self._program(values, support, 0, stacked).adapt(values, support)
        else:
            shared = {name: values[name] for name in self._recipe.adapted}
            adapted = shared if stacked else {name: v.expand(len(support), *v.shape) for name, v in shared.items()}
        return {name: value.clone(memory_format=torch.contiguous_format) for name, value in adapted.items()}

    def logits(
        self, adapted: Parameters, values: Parameters, rows: Tensor, support: Tensor | None, stacked: bool
    ) -> Tensor:
        """See `GenericPath`."""
        del stacked  # layers see by its shape whether a weight is shared
        weights, buffers = self._recipe.weights(values | adapted), Buffers(rows.device)
        n_centers = 0 if support is None else support.shape[1]
        everything = rows if support is None else torch.cat([support, rows], 1)
        network = BatchedNetwork(self._recipe.network, weights, len(rows), everything.shape[1], buffers)
        z = network.forward(self._recipe.cast(everything))
        head = batched_head(self._recipe.head, weights, len(rows), rows.shape[1], buffers, rows.dtype)
        return head.logits(z[:, n_centers:], z[:, :n_centers])

    def gradients(
        self, values: Parameters, support: Tensor, query: Tensor, is_ood: Tensor, stacked: bool, group: int
    ) -> tuple[Tensor, Parameters]:
        """See `GenericPath`; of folded layers the gradients are the folded one's, which `finished` takes."""
        n_whole = len(support) // group * group
        if 0 < n_whole < len(support):  # all groups of one product are of one size
            parts = [
                self.gradients(values, support[cut], query[cut], is_ood[cut], stacked, group)
                for cut in (slice(n_whole), slice(n_whole, None))
            ]
            losses, grads = zip(*parts, strict=True)
            return torch.cat(losses), {name: torch.cat([part[name] for part in grads]) for name in grads[0]}
        self._check_centers(support)
        if self._prototypes and self._prototypes.serves(values, stacked, support):
            return self._prototypes.gradients(values, support, query, is_ood)
        kernels, layers = self._serving(values, support, query.shape[1], stacked)
        if kernels and layers:
            return kernels.gradients(layers, values, (support, query, is_ood), min(group, len(support)))
        program = self._program(values, support, query.shape[1], stacked)
        if program.run is None:
            gradients = functools.partial(program.gradients, group=min(group, len(support)))
            on_gpu = support.device.type == "cuda"
            program.run = Replayed(gradients, support, query, is_ood) if on_gpu else gradients
        result: tuple[Tensor, Parameters] = program.run(support, query, is_ood)
        return result

    def shares_threads(self, values: Parameters, stacked: bool) -> bool:
        """See `GenericPath`."""
        first = next(iter(values.values()))
        if self._prototypes:
            return self._prototypes.serves(values, stacked)
        return bool(self._kernels) and all(one.layers(values, first, stacked) for one in self._kernels.values())

    def finished(self, values: Parameters, grads: Parameters) -> Parameters:
        """See `GenericPath`."""
        for kernels in self._kernels.values():
            if kernels.name in grads:
                grads = grads | kernels.parted(grads[kernels.name])
        folding, folded = self._recipe.folding, {name: grads[name] for name in GRADIENTS if name in grads}
        if folding and folded:
            grads = grads | folding.gradients({name: values[name] for name in folding.names}, folded)
        return {name: grads[name].to(values[name].dtype) for name in self._recipe.trained}

    def _check_centers(self, support: Tensor) -> None:
        if self.takes_support:  # a logit for each of its rows
            _check_loss(self._recipe.loss, support.shape[1])

    def _serving(
        self, values: Parameters, support: Tensor, n_query: int, stacked: bool
    ) -> tuple[EpisodeKernels | None, list[MlpLayer] | None]:
        """What computes whole episodes of this shape, and the layers it takes; None where there are no such kernels."""
        folding = self._recipe.folds(values, support.shape[1], n_query, stacked) if self._kernels else None
        kernels = self._kernels.get(folding)
        return kernels, kernels.layers(values, support, stacked) if kernels else None

    def _program(self, values: Parameters, support: Tensor, n_query: int, stacked: bool) -> Program:
        """This thread's program for batches of this shape, with these values in it."""
        programs: dict[object, Program] = self._kept.__dict__.setdefault("programs", {})
        key = (support.shape, n_query, stacked, support.dtype, support.device)
        if key not in programs:
            if len(programs) == KEPT_PROGRAMS:
                programs.clear()
            programs[key] = Program(self._recipe, values, support, n_query, stacked)
        programs[key].load(values)
        return programs[key]


def _check_loss(loss: SoftmaxMarginLoss, n_logits: int) -> None:
    """Refuse what the loss refuses of logits [..., K], which the kernels take as they are."""
    background = None if loss.background is None else 0.0
    checks.logits(torch.empty(1, n_logits), loss.fixed_temperature, background, loss.confidence)


def _check_widths(layers: tuple[Layer, ...], modules: nn.ModuleDict) -> None:
    """Refuse a layer that takes another width than the one below it gives."""
    for below, above in itertools.pairwise(layers):
        given, taken = (modules.get_parameter(layer.weight).shape for layer in (below, above))
        if given[-2] != taken[-1]:
            names = [layer.weight.removesuffix(".weight") for layer in (below, above)]
            raise ValueError(
                f"{names[0]} gives {given[-2]} features, and {names[1]} takes {taken[-1]}: make them equal"
            )
