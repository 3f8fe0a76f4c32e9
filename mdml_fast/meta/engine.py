"""Many episodes at once: inner loop, outer loss and meta-gradient through torch.func, no Python loop over episodes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from mdml_kernels import SoftmaxMarginLoss
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Parameters = dict[str, Tensor]

# What the inner loop adapts, by the beginning of its name; all else is shared by the episodes.
ADAPTED = ("encoder.", "decoder.")


class MetaGradients(NamedTuple):
    """Attributes:
    loss: the outer loss of each episode [E].
    grads: gradient of its mean over episodes, by name: `encoder.…`, `head.…`, `loss.…`, `decoder.…`.
    """

    loss: Tensor
    grads: Parameters


class MetaEngine:
    """The two levels of arXiv 2601.19833 over a batch of episodes.

    The inner loop takes `inner_steps` SGD steps on the encoder, from the shared parameters, on the one-class loss of an
    episode's support rows. The outer loss is the softmax margin of its query rows under the adapted encoder and the
    head. With a decoder, both levels add the reconstruction error of their normal rows, and the inner loop adapts the
    decoder too.

    Args:
        encoder: rows [n, d] to embeddings [n, z].
        head: embeddings [n, z] to logits [n, K].
        inner_steps: SGD steps of the inner loop; 0 adapts nothing.
        inner_lr: their rate.
        loss: the margin loss; its temperature may be learned (outer level).
        first_order: take the outer gradient at the adapted parameters, without a graph through the inner loop;
            False differentiates through it.
        decoder: embeddings [n, z] back to rows [n, d], or None.
        reconstruction_weight: of the mean squared reconstruction error; used with a decoder only.
        dtype: what encoder, head and decoder compute in; parameters, updates and losses keep their own dtype.

    Raises:
        ValueError: a module can't be batched over episodes, or a number is out of range.
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
    ) -> None:
        if inner_steps < 0:
            raise ValueError(f"inner_steps must be 0 or more, got {inner_steps}")
        if not inner_lr > 0:
            raise ValueError(f"inner_lr must be positive, got {inner_lr}")
        self.inner_steps, self.inner_lr, self.first_order = inner_steps, inner_lr, first_order
        self.reconstruction_weight = reconstruction_weight
        self.dtype = dtype
        self.modules = nn.ModuleDict({"encoder": encoder, "head": head, "loss": loss or SoftmaxMarginLoss()})
        if decoder is not None:
            self.modules["decoder"] = decoder
        _check_batchable(self.modules)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The meta-parameters by name: `encoder.…`, `head.…`, …; the keys of `MetaGradients.grads`."""
        return dict(self.modules.named_parameters())

    def adapt(self, support: Tensor) -> Parameters:
        """The inner loop of each episode, on its own normals.

        Args:
            support: normal rows [E, n, d].

        Returns:
            The adapted parameters by name, each [E, …]; no graph leads back to the shared ones.
        """
        params = self._detached()
        return vmap(lambda rows: self._adapt(params, rows))(support)

    def logits(self, adapted: Parameters, rows: Tensor) -> Tensor:
        """Logits [E, n, K] of rows [E, n, d] under the parameters that `adapt` gave [E, …] and the head; no graph."""
        params = self._detached()
        return vmap(lambda own, x: self._logits(params | own, x)[0])(adapted, rows)

    def meta_gradients(self, support: Tensor, query: Tensor, is_ood: Tensor) -> MetaGradients:
        """Outer loss and meta-gradient of a batch of episodes.

        Args:
            support: normal rows of the inner loop [E, n, d].
            query: rows of the outer loss [E, q, d].
            is_ood: which query rows are anomalous, bool [E, q].
        """
        params = self._detached()
        if self.first_order:
            adapted = self.adapt(support)
            shared = {name: value for name, value in params.items() if name not in adapted}
            (own_grads, grads), losses = grad(self._mean_loss, argnums=(0, 1), has_aux=True)(
                adapted, shared, query, is_ood
            )
            # The mean over episodes is in the loss already: episodes' gradients to their own parameters add up.
            grads |= {name: value.sum(0) for name, value in own_grads.items()}
        else:
            grads, losses = grad(self._mean_loss_through, has_aux=True)(params, support, query, is_ood)
        return MetaGradients(losses, {name: grads[name] for name in params})

    def _mean_loss(
        self, adapted: Parameters, shared: Parameters, query: Tensor, is_ood: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses = vmap(self._outer_loss, in_dims=(0, None, 0, 0))(adapted, shared, query, is_ood)
        return losses.mean(), losses.detach()

    def _mean_loss_through(
        self, params: Parameters, support: Tensor, query: Tensor, is_ood: Tensor
    ) -> tuple[Tensor, Tensor]:
        def episode(rows: Tensor, query: Tensor, is_ood: Tensor) -> Tensor:
            return self._outer_loss(self._adapt(params, rows), params, query, is_ood)

        losses = vmap(episode)(support, query, is_ood)
        return losses.mean(), losses.detach()

    def _adapt(self, params: Parameters, support: Tensor) -> Parameters:
        """One episode's inner loop."""
        own = {name: value for name, value in params.items() if name.startswith(ADAPTED)}
        shared = {name: value for name, value in params.items() if name not in own}
        for _ in range(self.inner_steps):
            steps = grad(self._inner_loss)(own, shared, support)
            own = {name: value - self.inner_lr * steps[name] for name, value in own.items()}
        return own

    def _inner_loss(self, own: Parameters, shared: Parameters, support: Tensor) -> Tensor:
        params = shared | own
        logits, z = self._logits(params, support)
        one_class = self._call(params, "loss", logits, method="one_class")
        return one_class + self._reconstruction(params, z, support).mean()

    def _outer_loss(self, own: Parameters, shared: Parameters, query: Tensor, is_ood: Tensor) -> Tensor:
        params = shared | own
        logits, z = self._logits(params, query)
        margin = self._call(params, "loss", logits, is_ood)
        is_id = ~is_ood
        errors = self._reconstruction(params, z, query) * is_id
        return margin + errors.sum() / is_id.sum().clamp(min=1)

    def _logits(self, params: Parameters, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, K] and embeddings [n, z] of rows [n, d]."""
        z = self._call(params, "encoder", rows)
        return self._call(params, "head", z).to(rows.dtype), z

    def _reconstruction(self, params: Parameters, z: Tensor, rows: Tensor) -> Tensor:
        """The weighted mean squared error of each row [n]; zero without a decoder."""
        if "decoder" not in self.modules:
            return rows.new_zeros(rows.shape[0])
        decoded = self._call(params, "decoder", z).to(rows.dtype)
        errors: Tensor = (decoded - rows).square().mean(-1)
        return self.reconstruction_weight * errors

    def _call(self, params: Parameters, part: str, *args: Tensor, method: str | None = None) -> Tensor:
        """Call a module, or a method of it, with these parameters; networks compute in `dtype`."""
        prefix = f"{part}."
        own = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
        if self.dtype is not None and part != "loss":
            own = {name: value.to(self.dtype) for name, value in own.items()}
            args = tuple(arg.to(self.dtype) for arg in args)
        module = self.modules[part]
        if method is not None:
            module = _Method(module, method)
            own = {f"module.{name}": value for name, value in own.items()}
        result: Tensor = functional_call(module, own, args)
        return result

    def _detached(self) -> Parameters:
        return {name: value.detach() for name, value in self.parameters().items()}


class _Method(nn.Module):
    """A module whose forward is a method of another: functional_call only calls forward."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, *args: Tensor) -> Tensor:
        result: Tensor = getattr(self.module, self.method)(*args)
        return result


def _check_batchable(modules: nn.Module) -> None:
    """Refuse now what would fail, or mix episodes, deep inside a batched computation."""
    for name, module in modules.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            raise ValueError(f"{name} keeps running statistics, which episodes can't share: use LayerNorm")
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(f"{name} is dropout, which has no place in an episode's inner loop: set p=0")
