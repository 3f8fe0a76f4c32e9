"""Many episodes at once: inner loop, outer loss and meta-gradient, with no Python loop over episodes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from mdml_kernels import SoftmaxMarginLoss
from torch import Tensor, nn

from mdml_fast.meta import checks
from mdml_fast.meta.batchable import check_batchable, try_forward
from mdml_fast.meta.compiling import Compile
from mdml_fast.meta.fused import FusedPath
from mdml_fast.meta.generic import Batch, GenericPath
from mdml_fast.meta.gradients import GROUP, GradientSums, MeanGradients, MetaGradients
from mdml_fast.meta.paths import Path, choose_path
from mdml_fast.meta.settings import EngineSettings, Parameters


class MetaEngine:
    """The two levels of arXiv 2601.19833 over a batch of episodes.

    The inner loop takes `inner_steps` SGD steps on the encoder, from the shared parameters, on the one-class loss of an
    episode's support rows. The outer loss is the softmax margin of its query rows under the adapted encoder and the
    head. With a decoder, both levels add the reconstruction error of their normal rows, and the inner loop adapts the
    decoder too.

    A parameter that several modules hold is one: named, and adapted where the encoder or the decoder holds it, as that
    of the first of encoder, decoder, head and loss.

    Settings of the modules, as the loss's margin, are taken as they are when the engine is made: for others make a new
    engine.

    With `n_directions` every parameter and buffer is stacked [D, …], D copies of the modules' values to begin with,
    and each episode names its direction: D engines of their own, in one batched computation. The values may be set
    for each direction in place, `engine.parameters()[name].data[d] = …`, and trained with any torch optimiser.

    Args:
        encoder: rows [n, d] to embeddings [n, z].
        head: embeddings [n, z] to logits [n, K]; a head with a true attribute ``takes_support``, as `PrototypeHead`,
            is called with the embeddings of the episode's support rows too.
        inner_steps: SGD steps of the inner loop; 0 adapts nothing.
        inner_lr: their rate.
        loss: the margin loss; its temperature and background may be learned (outer level).
        first_order: take the outer gradient at the adapted parameters, without a graph through the inner loop;
            False differentiates through it.
        decoder: embeddings [n, z] back to rows [n, d], or None.
        reconstruction_weight: of the mean squared reconstruction error; used with a decoder only.
        dtype: what encoder, head and decoder compute in; parameters, updates and losses keep their own dtype.
        n_directions: D, at least 1; None for parameters that all episodes share.
        path: ``auto``, ``generic`` (any modules) or ``fused`` (an MLP, analytic gradients); `choice` says which it is.
        compile: have torch compile the gradients of the generic path, for batches like the first (on a CPU that needs
            a C++ compiler); ``auto`` in the background of a run that is long enough to earn it back, which the
            scheduler knows. The fused path has kernels of its own.

    Raises:
        ValueError: a module can't be batched over episodes, a parameter does not require a gradient, the path can't
            serve, a layer of an MLP takes another width than the one before it gives, or a number is out of range.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        inner_steps: int = 5,
        inner_lr: float = 0.1,
        loss: SoftmaxMarginLoss | None = None,
        first_order: bool = True,
        *,
        decoder: nn.Module | None = None,
        reconstruction_weight: float = 1.0,
        dtype: torch.dtype | None = None,
        n_directions: int | None = None,
        path: Path = "auto",
        compile: Compile = "auto",  # noqa: A002 - torch's word for it
    ) -> None:
        self.settings = EngineSettings(inner_steps, inner_lr, first_order, reconstruction_weight, dtype)
        # What is adapted comes first: a parameter that modules share is named, and adapted, as the first one's.
        adapted = {"encoder": encoder} if decoder is None else {"encoder": encoder, "decoder": decoder}
        self.modules = nn.ModuleDict({**adapted, "head": head, "loss": loss or SoftmaxMarginLoss()})
        checks.loss(self.modules["loss"])
        check_batchable(self.modules)
        first = next(iter(self.parameters().values()), torch.empty(0))
        self.choice = choose_path(self.modules, first.device.type, dtype or first.dtype, first_order, path)
        if self.choice.path == "generic":
            try_forward(self.modules, stacked=n_directions is not None)
        self.n_directions = n_directions
        if n_directions is not None:
            self.modules = _stacked(self.modules, n_directions)
        self._path = self._new_path()
        self.compile: Compile = compile if self.choice.path == "generic" else False
        self.is_to_be_compiled = self.compile is True

    def _new_path(self) -> FusedPath | GenericPath:
        return (FusedPath if self.choice.path == "fused" else GenericPath)(self.modules, self.settings)

    def __getstate__(self) -> dict[str, Any]:
        """Without the path's workings, which threads keep; they are made anew where it is unpickled or copied."""
        return {name: value for name, value in vars(self).items() if name != "_path"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._path, self.is_to_be_compiled = self._new_path(), self.compile is True

    def parameters(self) -> dict[str, nn.Parameter]:
        """The meta-parameters by name: `encoder.…`, `head.…`, …; the keys of `MetaGradients.grads`."""
        return dict(self.modules.named_parameters())

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((value.device for value in self.parameters().values()), torch.device("cpu"))

    @property
    def takes_support(self) -> bool:
        """Whether the head's logits depend on the support rows."""
        return self._path.takes_support

    @property
    def shares_threads(self) -> bool:
        """Whether threads share a batch of episodes as it is (`shared_by` says how many), bit for bit."""
        return self._path.shares_threads(self.values(), self.n_directions is not None)

    def buffers(self) -> dict[str, Tensor]:
        """What the modules hold that is not trained, by name; with directions [D, …]."""
        return dict(self.modules.named_buffers())

    def adapt(self, support: Tensor, direction: Tensor | None = None) -> Parameters:
        """The inner loop of each episode, on its own normals.

        Args:
            support: normal rows [E, n, d].
            direction: of each episode, in 0 … D - 1, int64 [E]; with directions only, and then None where E is D:
                episode i is of i.

        Returns:
            The adapted parameters by name, each [E, …]; no graph leads back to the shared ones.

        Raises:
            ValueError: rows or directions are of another shape, dtype or range.
        """
        values = self.values()
        self._check_rows(values, support=support)
        direction = self._direction(direction, len(support))
        return self._path.adapt(_of_directions(values, direction), support, direction is not None)

    def logits(
        self, adapted: Parameters, rows: Tensor, support: Tensor | None = None, direction: Tensor | None = None
    ) -> Tensor:
        """Logits [E, n, K] of rows [E, n, d] under the parameters that `adapt` gave [E, …] and the head; no graph.

        Args:
            adapted: what `adapt` returned.
            rows: [E, n, d].
            support: normal rows [E, m, d]; for a head that takes them.
            direction: as in `adapt`.

        Raises:
            ValueError: adapted parameters are missing or of other episodes, the head's support rows are missing, or
                something is of another shape, dtype or range.
        """
        if self._path.takes_support and support is None:
            raise ValueError("this engine's head needs the support rows: give support=")
        values = self.values()
        self._check_rows(values, rows=rows, **({} if support is None else {"support": support}))
        checks.adapted(adapted, self.parameters(), len(rows), self.n_directions is not None)
        direction = self._direction(direction, len(rows))
        return self._path.logits(adapted, _of_directions(values, direction), rows, support, direction is not None)

    def meta_gradients(
        self, support: Tensor, query: Tensor, is_ood: Tensor, direction: Tensor | None = None
    ) -> MetaGradients:
        """Outer loss and meta-gradient of a batch of episodes.

        Args:
            support: normal rows of the inner loop [E, n, d].
            query: rows of the outer loss [E, q, d].
            is_ood: which query rows are anomalous, bool [E, q].
            direction: as in `adapt`.

        Raises:
            ValueError: something is of another shape, dtype or range.
        """
        if self.is_to_be_compiled:
            self.compile_for(support, query, is_ood, direction)
        mean = MeanGradients(self, len(support))
        return mean.add(self.gradient_sums(mean.values, support, query, is_ood, direction)).result()

    def values(self) -> Parameters:
        """Parameters and buffers as they are now, without a graph, by name."""
        return {name: value.detach() for name, value in (self.parameters() | self.buffers()).items()}

    def gradient_sums(
        self, values: Parameters, support: Tensor, query: Tensor, is_ood: Tensor, direction: Tensor | None = None
    ) -> GradientSums:
        """As `meta_gradients`, but in parts, from which batches of episodes can be put together: see `MeanGradients`.

        A group's bits depend on its own episodes alone, as long as it is whole (`GROUP` episodes).

        Args:
            values: of the mean that the sums are for; what follows from them is worked out once.
            support: as in `meta_gradients`.
            query: likewise.
            is_ood: likewise.
            direction: as in `adapt`.
        """
        direction = self.check(values, support, query, is_ood, direction)
        group = GROUP if direction is None else 1
        values = _of_directions(values, direction)
        losses, groups = self._path.gradients(values, support, query, is_ood, direction is not None, group)
        return GradientSums(losses, groups, direction)

    def check(
        self, values: Parameters, support: Tensor, query: Tensor, is_ood: Tensor, direction: Tensor | None = None
    ) -> Tensor | None:
        """Refuse what `gradient_sums` does not take.

        Returns:
            The direction of each episode [E]; None where parameters are shared.

        Raises:
            ValueError: something is of another shape, dtype or range.
        """
        self._check_rows(values, support=support, query=query)
        checks.flags(is_ood, query)
        return self._direction(direction, len(support))

    def finished(self, values: Parameters, grads: Parameters) -> Parameters:
        """The gradients to the parameters from means of what `gradient_sums` gave at these values."""
        return self._path.finished(values, grads)

    def compile_for(self, support: Tensor, query: Tensor, is_ood: Tensor, direction: Tensor | None = None) -> bool:
        """Have the generic path's gradients compiled for batches like this one, as those of `meta_gradients`.

        Where that fails it goes on as it is, with one warning, and gives False.
        """
        self.is_to_be_compiled = False
        assert isinstance(self._path, GenericPath)
        self._path.compile(*self._batch(support, query, is_ood, direction))
        return self._path.compiled is not None

    def leave_compiled(self) -> None:
        """Take the generic path as it is again."""
        assert isinstance(self._path, GenericPath)
        self._path.compiled = None

    def compiling_for(
        self, support: Tensor, query: Tensor, is_ood: Tensor, direction: Tensor | None = None
    ) -> Callable[[], object]:
        """What `compile_for` does, for another process. On the generic path alone."""
        assert isinstance(self._path, GenericPath)
        return self._path.compiling(*self._batch(support, query, is_ood, direction))

    def flops(self, n_support: int, n_query: int) -> float:
        """Floating point operations of an episode of so many rows, roughly: those of the products with the weights."""
        weights = sum(value.numel() for value in self.parameters().values()) // (self.n_directions or 1)
        return 6.0 * weights * (n_support * self.settings.inner_steps + n_query)

    def _check_rows(self, values: Parameters, **given: Tensor) -> None:
        dtype = None if self.settings.dtype else next((value.dtype for value in values.values()), None)
        device = next((value.device for value in values.values()), None)
        checks.rows(given, device, dtype, self._path.n_features)

    def _batch(self, support: Tensor, query: Tensor, is_ood: Tensor, direction: Tensor | None) -> tuple[Batch, bool]:
        """As the generic path takes it, and whether the values are stacked."""
        direction = self._direction(direction, len(support))
        return (_of_directions(self.values(), direction), support, query, is_ood), direction is not None

    def _direction(self, direction: Tensor | None, n_episodes: int) -> Tensor | None:
        """The direction of each episode [E], None where parameters are shared."""
        if self.n_directions is None:
            if direction is not None:
                raise ValueError("this engine's parameters are shared by all episodes: leave direction out")
            return None
        if direction is not None:
            checks.direction(direction, n_episodes, self.n_directions)
            return direction
        if n_episodes != self.n_directions:
            raise ValueError(f"{n_episodes} episodes of {self.n_directions} directions: give direction=, int64 [E]")
        return torch.arange(n_episodes, device=self.device)


def _of_directions(values: Parameters, direction: Tensor | None) -> Parameters:
    """The values as they are, or those of each episode's direction [E, …]."""
    return values if direction is None else {name: value[direction] for name, value in values.items()}


def _stacked(modules: nn.ModuleDict, n_directions: int) -> nn.ModuleDict:
    """A copy whose parameters and buffers are [D, …]; such modules only work through functional_call under vmap."""
    if n_directions < 1:
        raise ValueError(f"n_directions must be 1 or more, got {n_directions}")
    modules = copy.deepcopy(modules)
    for value in (*modules.parameters(), *modules.buffers()):
        value.data = value.data.expand(n_directions, *value.shape).clone()
    return modules
