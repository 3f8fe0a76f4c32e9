"""The path for any encoder and head: torch.func over one episode's computation, vmapped over the episodes."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.utils._pytree import tree_map

from mdml_fast.meta.batchable import batchable
from mdml_fast.meta.compiling import Compiled, give_up, reason_of
from mdml_fast.meta.settings import ADAPTED, EngineSettings, Parameters

# With fewer logits in an episode the fused loss's calls cost more, under vmap, than its arithmetic saves.
_FEW_LOGITS = 1 << 14

Batch = tuple[Parameters, Tensor, Tensor, Tensor]
"""Values, support rows, query rows, and which of these are anomalous."""


class GenericPath:
    """Inner loop, logits and gradients of a batch of episodes, for modules that vmap can batch.

    Args:
        modules: ``encoder``, ``head``, ``loss`` and perhaps ``decoder``.
        settings: of the two levels.

    Everywhere below, `values` are parameters and buffers by name: each [E, …], one for each episode, if `stacked`, else
    shared by all of them.
    """

    def __init__(self, modules: nn.ModuleDict, settings: EngineSettings) -> None:
        self._modules, self._settings = modules, settings
        self._local = threading.local()
        self.compiled: Compiled | None = None
        self.takes_support = bool(getattr(modules["head"], "takes_support", False))
        self.n_features: int | None = None  # any that the modules take

    def adapt(self, values: Parameters, support: Tensor, stacked: bool) -> Parameters:
        """The adapted parameters [E, …] of support rows [E, n, d]."""
        with self._batchable(support):
            return vmap(self._episode().adapt, in_dims=(0 if stacked else None, 0))(values, support)

    def logits(
        self, adapted: Parameters, values: Parameters, rows: Tensor, support: Tensor | None, stacked: bool
    ) -> Tensor:
        """Logits [E, n, K] of rows [E, n, d] under the adapted parameters [E, …]."""
        in_dims = (0, 0 if stacked else None, 0, None if support is None else 0)
        with self._batchable(rows, *([] if support is None else [support])):
            return vmap(self._episode().adapted_logits, in_dims=in_dims)(adapted, values, rows, support)

    def gradients(
        self, values: Parameters, support: Tensor, query: Tensor, is_ood: Tensor, stacked: bool, group: int
    ) -> tuple[Tensor, Parameters]:
        """Outer losses [E], and the gradients of every parameter among the values, each summed over groups [G, …].

        A group is so many consecutive episodes, the last one perhaps fewer; a group's bits depend on it alone.

        Raises:
            ValueError: a module works in place on its rows.
        """
        batch = values, support, query, is_ood
        with self._batchable(support, query):
            if self.compiled is not None and self.compiled.takes(batch):
                losses, own = self.compiled(*batch)
            else:
                self._episode()
                batched = self._local.stacked if stacked else self._local.shared
                losses, own = batched(*batch)
        if group == 1:
            return losses, own
        return losses, {
            name: torch.stack([part.sum(0) for part in torch.split(value, group)]) for name, value in own.items()
        }

    def shares_threads(self, values: Parameters, stacked: bool) -> bool:
        """Whether threads share a batch of episodes as it is, and batches side by side gain nothing."""
        del values, stacked
        return False

    def finished(self, values: Parameters, grads: Parameters) -> Parameters:
        """The gradients to the parameters, in their order, from sums or means of what `gradients` gave at these values.

        Without a direction's selection: values and grads are shared by all episodes, or [D, …].
        """
        del values
        return grads

    def compile(self, batch: Batch, stacked: bool) -> None:
        """Have the `gradients` of batches like this one compiled; where that fails, tell so and go on without."""
        try:
            self.compiled = compiled(self._modules, self._settings, batch, stacked)
        except Exception as error:  # whatever a compiler comes up with: where it is ours, the plain function raises it
            give_up(reason_of(error))

    def compiling(self, batch: Batch, stacked: bool) -> Callable[[], object]:
        """What `compile` does, for another process."""
        return functools.partial(compiled, self._modules, self._settings, tree_map(_without_the_rest, batch), stacked)

    def _batchable(self, *rows: Tensor) -> contextlib.AbstractContextManager[None]:
        return batchable(self._episode().modules, *rows)

    def _episode(self) -> _Episode:
        """This thread's own: functional_call puts values into a module for as long as it runs, where all see them."""
        episode: _Episode | None = getattr(self._local, "episode", None)
        if episode is None:
            episode = self._local.episode = _Episode(copy.deepcopy(self._modules), self._settings)
            self._local.shared, self._local.stacked = episode.batched(False), episode.batched(True)
        return episode


def _without_the_rest(tensor: Tensor) -> Tensor:
    """The tensor without others that are in memory of its, which would be sent to another process with it."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def compiled(modules: nn.ModuleDict, settings: EngineSettings, batch: Batch, stacked: bool) -> Compiled:
    """The gradients of the episodes of batches like this one."""
    return Compiled(_Episode(copy.deepcopy(modules), settings).batched(stacked), batch)


class _Episode:
    """The computation of one episode: pure functions of values and rows."""

    def __init__(self, modules: nn.ModuleDict, settings: EngineSettings) -> None:
        self.modules, self.settings = modules, settings
        self.takes_support = bool(getattr(modules["head"], "takes_support", False))
        self.trained = {name for name, _ in modules.named_parameters()}
        # What modules share has one name among the values: that of the first that holds it.
        named = {id(value): name for name, value in (*modules.named_parameters(), *modules.named_buffers())}
        self.names = {
            part: {name: named[id(value)] for name, value in (*module.named_parameters(), *module.named_buffers())}
            for part, module in modules.items()
        }
        loss = modules["loss"]
        few = copy.copy(loss)
        if getattr(loss, "backend", "") == "auto":
            few.backend = "reference"  # type: ignore[assignment]
        # functional_call only calls forward. Made here, because a compiler can't follow the making of a module.
        self.losses = {
            (method, is_few): _Method(module, method)
            for method in ("__call__", "one_class")
            for module, is_few in ((loss, False), (few, True))
        }

    def batched(self, stacked: bool) -> Callable[..., tuple[Tensor, Parameters]]:
        """`gradients` of many episodes; the values are shared by them, or each has its own."""
        return vmap(self.gradients, in_dims=(0 if stacked else None, 0, 0, 0))

    def gradients(
        self, values: Parameters, support: Tensor, query: Tensor, is_ood: Tensor
    ) -> tuple[Tensor, Parameters]:
        """The outer loss, and its gradients."""
        if self.settings.first_order:
            # At the adapted parameters, which are constants here: no graph leads through the inner loop.
            params, buffers = self._split(values | self.adapt(values, support))
            grads, loss = grad_and_value(self._outer_loss)(params, buffers, support, query, is_ood)
        else:
            params, buffers = self._split(values)
            grads, loss = grad_and_value(self._loss_through)(params, buffers, support, query, is_ood)
        return loss, grads

    def adapt(self, values: Parameters, support: Tensor) -> Parameters:
        """The inner loop."""
        own = {name: value for name, value in values.items() if name.startswith(ADAPTED) and name in self.trained}
        shared = {name: value for name, value in values.items() if name not in own}
        for _ in range(self.settings.inner_steps):
            steps = grad(self._inner_loss)(own, shared, support)
            own = {name: value - self.settings.inner_lr * steps[name] for name, value in own.items()}
        return own

    def adapted_logits(self, own: Parameters, values: Parameters, rows: Tensor, support: Tensor | None) -> Tensor:
        """Logits [n, K] of rows [n, d]."""
        return self._logits(values | own, rows, support)[0]

    def _loss_through(
        self, params: Parameters, buffers: Parameters, support: Tensor, query: Tensor, is_ood: Tensor
    ) -> Tensor:
        adapted = self.adapt(params | buffers, support)
        return self._outer_loss(params | adapted, buffers, support, query, is_ood)

    def _inner_loss(self, own: Parameters, shared: Parameters, support: Tensor) -> Tensor:
        values = shared | own
        logits, z = self._logits(values, support, support)
        one_class = self._loss(values, "one_class", logits)
        return one_class + self._reconstruction(values, z, support).mean()

    def _outer_loss(
        self, params: Parameters, buffers: Parameters, support: Tensor, query: Tensor, is_ood: Tensor
    ) -> Tensor:
        values = params | buffers
        logits, z = self._logits(values, query, support)
        margin = self._loss(values, "__call__", logits, is_ood)
        is_id = ~is_ood
        errors = self._reconstruction(values, z, query) * is_id
        return margin + errors.sum() / is_id.sum().clamp(min=1)

    def _logits(self, values: Parameters, rows: Tensor, support: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits [n, K] and embeddings [n, z] of rows [n, d]."""
        z = self._call(values, "encoder", rows)
        if not self.takes_support:
            return self._call(values, "head", z).to(rows.dtype), z
        assert support is not None
        centers = z if support is rows else self._call(values, "encoder", support)
        return self._call(values, "head", z, centers).to(rows.dtype), z

    def _reconstruction(self, values: Parameters, z: Tensor, rows: Tensor) -> Tensor:
        """The weighted mean squared error of each row [n]; zero without a decoder."""
        if "decoder" not in self.modules:
            return rows.new_zeros(rows.shape[0])
        decoded = self._call(values, "decoder", z).to(rows.dtype)
        errors: Tensor = (decoded - rows).square().mean(-1)
        return self.settings.reconstruction_weight * errors

    def _call(self, values: Parameters, part: str, *args: Tensor) -> Tensor:
        """Call a network with these values; it computes in the settings' dtype."""
        own, dtype = {name: values[shared] for name, shared in self.names[part].items()}, self.settings.dtype
        if dtype is not None:
            own = {name: value.to(dtype) if value.is_floating_point() else value for name, value in own.items()}
            args = tuple(arg.to(dtype) for arg in args)
        result: Tensor = functional_call(self.modules[part], own, args)
        return result

    def _loss(self, values: Parameters, method: str, logits: Tensor, *args: Tensor) -> Tensor:
        """A method of the loss with these values."""
        own = {f"loss.{name}": values[shared] for name, shared in self.names["loss"].items()}
        result: Tensor = functional_call(self.losses[method, logits.numel() <= _FEW_LOGITS], own, (logits, *args))
        return result

    def _split(self, values: Parameters) -> tuple[Parameters, Parameters]:
        """Parameters and buffers."""
        params = {name: value for name, value in values.items() if name in self.trained}
        return params, {name: value for name, value in values.items() if name not in self.trained}


class _Method(nn.Module):
    """A module whose forward is a method of the loss."""

    def __init__(self, loss: nn.Module, method: str) -> None:
        super().__init__()
        self.loss, self.method = loss, method

    def forward(self, *args: Tensor) -> Tensor:
        result: Tensor = getattr(self.loss, self.method)(*args)
        return result
