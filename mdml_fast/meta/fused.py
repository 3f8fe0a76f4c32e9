"""The fused path: an MLP and a linear or prototype head for many episodes at once, by analytic gradients in place.

Only the products that are needed are taken: no gradient to the rows, none to the head in the inner loop. As long as
all episodes share their weights (before the first inner step) a layer is one large product. No graph is built, and
nothing of size is allocated after the first batch.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from mdml_kernels import SoftmaxMarginLoss, direct
from torch import Tensor, nn

from mdml_fast.meta.fused_heads import read_head
from mdml_fast.meta.fused_layers import Buffers, Tape, backward, forward, read_encoder, row_sums, scale_gradient
from mdml_fast.meta.settings import EngineSettings, Parameters


class Weights(NamedTuple):
    """Parameters and buffers as they are trained, and in the dtype of the products (the same tensors, or copies)."""

    master: Parameters
    compute: Parameters


class FusedPath:
    """As `GenericPath`, first order only, for what `paths.choose_path` lets through."""

    def __init__(self, modules: nn.ModuleDict, settings: EngineSettings) -> None:
        network, head, loss = read_encoder(modules["encoder"]), read_head(modules["head"]), modules["loss"]
        assert network is not None
        assert head is not None
        assert isinstance(loss, SoftmaxMarginLoss)
        self.network, self.head, self.loss, self.settings = network, head, loss, settings
        self.takes_support = head.takes_support
        self.trained = [name for name, _ in modules.named_parameters() if not name.startswith("loss.")]
        self.adapted = [name for name in self.trained if name.startswith("encoder.")]
        self._local = threading.local()

    def adapt(self, values: Parameters, support: Tensor, stacked: bool) -> Parameters:
        """See `GenericPath`."""
        weights = self._inner_loop(self._weights(values), support, stacked)
        if stacked or self.settings.inner_steps:
            return {name: weights.master[name].clone() for name in self.adapted}
        return {name: values[name].expand(len(support), *values[name].shape).clone() for name in self.adapted}

    def logits(
        self, adapted: Parameters, values: Parameters, rows: Tensor, support: Tensor | None, stacked: bool
    ) -> Tensor:
        """See `GenericPath`."""
        del stacked
        weights = self._weights(values | adapted)
        if self.takes_support:
            assert support is not None
            n_centers = support.shape[1]
            z = self._forward(weights, torch.cat([support, rows], 1)).z
            return self._logits(weights, z[:, n_centers:], z[:, :n_centers], rows.dtype).clone()
        z = self._forward(weights, rows).z
        return self._logits(weights, z, z, rows.dtype).clone()

    def gradients(
        self, values: Parameters, support: Tensor, query: Tensor, is_ood: Tensor, stacked: bool, group: int
    ) -> tuple[Tensor, Parameters]:
        """See `GenericPath`."""
        n_whole = len(support) // group * group
        if 0 < n_whole < len(support):  # all groups of one product are of one size
            parts = [
                self.gradients(values, support[cut], query[cut], is_ood[cut], stacked, group)
                for cut in (slice(n_whole), slice(n_whole, None))
            ]
            losses, grads = zip(*parts, strict=True)
            return torch.cat(losses), {name: torch.cat([part[name] for part in grads]) for name in grads[0]}
        group = min(group, len(support))
        weights = self._inner_loop(self._weights(values), support, stacked)
        return self._outer_gradients(weights, support, query, is_ood, group)

    def _inner_loop(self, weights: Weights, support: Tensor, stacked: bool) -> Weights:
        """The weights after SGD on the one-class loss of the support rows; those of the encoder are [C, …] then."""
        if not self.settings.inner_steps:
            return weights
        buffers, x = self._buffers(support.device), self._cast(support)
        own = {}
        for name in self.adapted:
            value = weights.master[name]
            shape = value.shape[1:] if stacked else value.shape
            own[name] = buffers.take(f"own {name}", (len(support), *shape), value.dtype)
        compute = own
        if weights.compute is not weights.master:
            compute = {name: buffers.take(f"compute {name}", tuple(v.shape), x.dtype) for name, v in own.items()}
        before, after = weights, Weights(weights.master | own, weights.compute | compute)
        for _ in range(self.settings.inner_steps):
            self._inner_step(x, before, after, support.dtype)
            before = after
        return after

    def _inner_step(self, x: Tensor, before: Weights, after: Weights, dtype: torch.dtype) -> None:
        """One SGD step from the weights before to the weights after, which may be the same."""
        buffers, lr = self._buffers(x.device), self.settings.inner_lr

        def descend(weight: str, bias: str | None, grad: Tensor, rows: Tensor) -> None:
            if after.compute is after.master:
                torch.baddbmm(before.master[weight], grad.mT, rows, alpha=-lr, out=after.master[weight])
            else:
                by_weight = buffers.take("grad weight", tuple(after.master[weight].shape), grad.dtype)
                move(weight, torch.bmm(grad.mT, rows, out=by_weight))
            if bias:
                move(bias, row_sums(grad, buffers.take("grad bias", tuple(after.master[bias].shape), dtype)))

        def move(name: str, grad: Tensor) -> None:
            torch.add(before.master[name], grad, alpha=-lr, out=after.master[name])
            if after.compute is not after.master:
                after.compute[name].copy_(after.master[name])

        tape = forward(self.network, x, before.compute, buffers)
        logits = self._logits(before, tape.z, tape.z, dtype)
        tau, background = self._tau_and_background(before, logits)
        grad = direct.one_class_gradient_(logits, tau, background, self.loss.confidence)
        grad_z, grad_support = self.head.pull(grad, tape.z, tape.z, before.compute, buffers, None)
        if grad_support is not None:
            grad_z.add_(grad_support)
        by_scale = self._scale_gradient(before, tape, grad_z)
        backward(self.network, tape, grad_z, before.compute, buffers, descend)
        if by_scale is not None:
            assert self.network.log_scale
            move(self.network.log_scale, by_scale)

    def _outer_gradients(
        self, weights: Weights, support: Tensor, query: Tensor, is_ood: Tensor, group: int
    ) -> tuple[Tensor, Parameters]:
        n_groups, dtype = len(query) // group, query.dtype
        buffers, grads = self._buffers(query.device), {}

        def collect(weight: str, bias: str | None, grad: Tensor, rows: Tensor) -> None:
            """The gradients summed over the rows of a group: one product for the whole of it."""
            grad = grad.reshape(n_groups, -1, grad.shape[-1])
            grads[weight] = torch.bmm(grad.mT, rows.reshape(n_groups, -1, rows.shape[-1])).to(dtype)
            if bias:
                grads[bias] = row_sums(grad, query.new_empty(n_groups, grad.shape[-1]))

        def sums(values: Tensor) -> Tensor:
            return values.view(n_groups, group, *values.shape[1:]).sum(1)

        rows = torch.cat([support, query], 1) if self.takes_support else query
        n_centers = support.shape[1] if self.takes_support else 0
        tape = self._forward(weights, rows)
        z, centers = tape.z[:, n_centers:], tape.z[:, :n_centers]
        logits = self._logits(weights, z, centers, dtype)
        tau, background = self._tau_and_background(weights, logits)
        learned_tau, learned_background = self._learned("log_temperature"), self._learned("background")
        out = direct.margin_gradients(
            logits,
            is_ood,
            logits.new_ones(len(logits)) if tau is None else tau,
            background,
            margin=self.loss.margin,
            confidence=self.loss.confidence,
            form=self.loss.form,
            backend="cpu" if logits.device.type == "cpu" else "triton",
            needs_tau=learned_tau is not None,
        )
        if learned_tau:
            assert out.tau is not None
            assert tau is not None
            grads[learned_tau] = sums(-tau * out.tau)  # τ = exp(-log T)
        if learned_background:
            assert out.background is not None
            grads[learned_background] = sums(out.background)
        grad_z, grad_centers = self.head.pull(out.logits, z, centers, weights.compute, buffers, collect)
        if grad_centers is not None:
            grad_z = torch.cat([grad_centers, grad_z], 1)
        by_scale = self._scale_gradient(weights, tape, grad_z)
        if by_scale is not None:
            assert self.network.log_scale
            grads[self.network.log_scale] = sums(by_scale)
        backward(self.network, tape, grad_z, weights.compute, buffers, collect)
        return out.loss, grads

    def _forward(self, weights: Weights, rows: Tensor) -> Tape:
        return forward(self.network, self._cast(rows), weights.compute, self._buffers(rows.device))

    def _logits(self, weights: Weights, z: Tensor, centers: Tensor, dtype: torch.dtype) -> Tensor:
        """Logits [C, n, K] in the rows' dtype."""
        buffers = self._buffers(z.device)
        n_logits = centers.shape[1] if self.takes_support else weights.master["head.weight"].shape[-2]
        logits = buffers.take("logits", (*z.shape[:2], n_logits), dtype)
        self.head.logits(z, centers, weights.compute, logits, buffers)
        return logits

    def _scale_gradient(self, weights: Weights, tape: Tape, grad_z: Tensor) -> Tensor | None:
        """To the residual encoder's log_scale, [C, d] in its own dtype; before grad_z is overwritten."""
        name = self.network.log_scale
        if name is None:
            return None
        dtype = weights.master[name].dtype
        return scale_gradient(tape.inputs[0].to(dtype), grad_z.to(dtype), weights.master[name])

    def _tau_and_background(self, weights: Weights, logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """1/T [C], None where it is 1, and b [C], None where there is none."""
        name = self._learned("log_temperature")
        tau = None
        if name:
            tau = weights.master[name].neg().exp().expand(len(logits))
        elif self.loss.fixed_temperature != 1:
            tau = logits.new_full((len(logits),), 1 / self.loss.fixed_temperature)
        name = self._learned("background")
        if name:
            return tau, weights.master[name].expand(len(logits))
        assert not isinstance(self.loss.background, Tensor)
        return tau, None if self.loss.background is None else logits.new_full((len(logits),), self.loss.background)

    def _learned(self, name: str) -> str | None:
        """The full name of the loss's parameter, None where it is not learned."""
        return f"loss.{name}" if name in self.loss._parameters and self.loss._parameters[name] is not None else None

    def _weights(self, values: Parameters) -> Weights:
        dtype = self.settings.dtype
        if dtype is None or all(values[name].dtype == dtype for name in self.trained):
            return Weights(values, values)
        return Weights(values, values | {name: values[name].to(dtype) for name in self.trained})

    def _cast(self, rows: Tensor) -> Tensor:
        dtype = self.settings.dtype
        return (rows if dtype is None else rows.to(dtype)).contiguous()

    def _buffers(self, device: torch.device) -> Buffers:
        """This thread's own."""
        buffers: Buffers | None = getattr(self._local, "buffers", None)
        if buffers is None:
            buffers = self._local.buffers = Buffers(device)
        return buffers
