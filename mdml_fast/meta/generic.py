"""The path for any encoder and head: torch.func over one episode's computation, vmapped over the episodes."""

from __future__ import annotations

import copy
import threading

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from mdml_fast.meta.settings import ADAPTED, EngineSettings, Parameters


class GenericPath:
    """Inner loop, logits and gradients of a batch of episodes, for modules that vmap can batch.

    Args:
        modules: ``encoder``, ``head``, ``loss`` and perhaps ``decoder``.
        settings: of the two levels.

    Everywhere below, `values` are parameters and buffers by name: each [E, …], one for each episode, if `stacked`, else
    shared by all of them.
    """

    def __init__(self, modules: nn.ModuleDict, settings: EngineSettings) -> None:
        self._modules, self.settings = modules, settings
        self.takes_support = bool(getattr(modules["head"], "takes_support", False))
        self._local = threading.local()
        self._trained = {name for name, _ in modules.named_parameters()}

    def adapt(self, values: Parameters, support: Tensor, stacked: bool) -> Parameters:
        """The adapted parameters [E, …] of support rows [E, n, d]."""
        return vmap(self._adapt, in_dims=(0 if stacked else None, 0))(values, support)

    def logits(
        self, adapted: Parameters, values: Parameters, rows: Tensor, support: Tensor | None, stacked: bool
    ) -> Tensor:
        """Logits [E, n, K] of rows [E, n, d] under the adapted parameters [E, …]."""

        def episode(own: Parameters, values: Parameters, rows: Tensor, support: Tensor | None) -> Tensor:
            return self._logits(values | own, rows, support)[0]

        in_dims = (0, 0 if stacked else None, 0, None if support is None else 0)
        return vmap(episode, in_dims=in_dims)(adapted, values, rows, support)

    def gradients(
        self, values: Parameters, support: Tensor, query: Tensor, is_ood: Tensor, stacked: bool, group: int
    ) -> tuple[Tensor, Parameters]:
        """Outer losses [E], and the gradients of every parameter among the values, each summed over groups [G, …].

        A group is so many consecutive episodes, the last one perhaps fewer; a group's bits depend on it alone.
        """
        differentiate = self._first_order if self.settings.first_order else self._second_order
        losses, own = vmap(differentiate, in_dims=(0 if stacked else None, 0, 0, 0))(values, support, query, is_ood)
        if group == 1:
            return losses, own
        return losses, {
            name: torch.stack([part.sum(0) for part in torch.split(value, group)]) for name, value in own.items()
        }

    def _first_order(
        self, values: Parameters, support: Tensor, query: Tensor, is_ood: Tensor
    ) -> tuple[Tensor, Parameters]:
        # The gradient is taken at the adapted parameters, which are constants here: no graph through the inner loop.
        params, buffers = self._split(values | self._adapt(values, support))
        grads, loss = grad_and_value(self._outer_loss)(params, buffers, support, query, is_ood)
        return loss, grads

    def _second_order(
        self, values: Parameters, support: Tensor, query: Tensor, is_ood: Tensor
    ) -> tuple[Tensor, Parameters]:
        def through(params: Parameters, buffers: Parameters) -> Tensor:
            adapted = self._adapt(params | buffers, support)
            return self._outer_loss(params | adapted, buffers, support, query, is_ood)

        grads, loss = grad_and_value(through)(*self._split(values))
        return loss, grads

    def _adapt(self, values: Parameters, support: Tensor) -> Parameters:
        """One episode's inner loop."""
        own = {name: value for name, value in values.items() if name.startswith(ADAPTED) and name in self._trained}
        shared = {name: value for name, value in values.items() if name not in own}
        for _ in range(self.settings.inner_steps):
            steps = grad(self._inner_loss)(own, shared, support)
            own = {name: value - self.settings.inner_lr * steps[name] for name, value in own.items()}
        return own

    def _inner_loss(self, own: Parameters, shared: Parameters, support: Tensor) -> Tensor:
        values = shared | own
        logits, z = self._logits(values, support, support)
        one_class = self._call(values, "loss", logits, method="one_class")
        return one_class + self._reconstruction(values, z, support).mean()

    def _outer_loss(
        self, params: Parameters, buffers: Parameters, support: Tensor, query: Tensor, is_ood: Tensor
    ) -> Tensor:
        values = params | buffers
        logits, z = self._logits(values, query, support)
        margin = self._call(values, "loss", logits, is_ood)
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
        if "decoder" not in self._modules:
            return rows.new_zeros(rows.shape[0])
        decoded = self._call(values, "decoder", z).to(rows.dtype)
        errors: Tensor = (decoded - rows).square().mean(-1)
        return self.settings.reconstruction_weight * errors

    def _call(self, values: Parameters, part: str, *args: Tensor, method: str | None = None) -> Tensor:
        """Call a module, or a method of it, with these values; networks compute in the settings' dtype."""
        prefix = f"{part}."
        own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        dtype = self.settings.dtype
        if dtype is not None and part != "loss":
            own = {name: value.to(dtype) if value.is_floating_point() else value for name, value in own.items()}
            args = tuple(arg.to(dtype) for arg in args)
        module = self._own_modules()[part]
        if method is not None:
            module = _Method(module, method)
            own = {f"module.{name}": value for name, value in own.items()}
        result: Tensor = functional_call(module, own, args)
        return result

    def _own_modules(self) -> nn.ModuleDict:
        """This thread's copy: functional_call puts values into a module for as long as it runs, where all see them."""
        copied: nn.ModuleDict | None = getattr(self._local, "modules", None)
        if copied is None:
            copied = self._local.modules = copy.deepcopy(self._modules)
        return copied

    def _split(self, values: Parameters) -> tuple[Parameters, Parameters]:
        """Parameters and buffers."""
        params = {name: value for name, value in values.items() if name in self._trained}
        return params, {name: value for name, value in values.items() if name not in self._trained}


class _Method(nn.Module):
    """A module whose forward is a method of another: functional_call only calls forward."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, *args: Tensor) -> Tensor:
        result: Tensor = getattr(self.module, self.method)(*args)
        return result
