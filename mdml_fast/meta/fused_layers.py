"""The encoders that the fused path takes, and their layers for many episodes at once: in place, without a graph.

Letters: C episodes, n rows, I and O features into and out of a layer. A weight is [O, I] where the episodes share it,
one large product then serves all of them, or [C, O, I]; a bias [O] or [C, O].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from mdml_kernels.native import layers
from mdml_kernels.native import loader as native
from torch import Tensor, nn

from mdml_fast.meta.encoders import ResidualEncoder
from mdml_fast.meta.settings import Parameters


class Layer(NamedTuple):
    """A linear layer by the names of its parameters, and the activation that follows it, "" for none."""

    weight: str
    bias: str | None
    activation: str = ""

    @property
    def names(self) -> list[str]:
        """Those of its parameters."""
        return [name for name in (self.weight, self.bias) if name]


class Network(NamedTuple):
    """Layers in a row; with log_scale, what they give is added to ``x · exp(log_scale)``."""

    layers: tuple[Layer, ...]
    log_scale: str | None = None

    @property
    def names(self) -> list[str]:
        """Those of its parameters."""
        names = [name for layer in self.layers for name in layer.names]
        return [*names, self.log_scale] if self.log_scale else names


def read_encoder(encoder: nn.Module) -> Network | None:
    """The encoder as a `Network`, or None where it is none."""
    if type(encoder) is ResidualEncoder:
        inner = Layer("encoder.inner.weight", "encoder.inner.bias", "relu")
        return Network((inner, Layer("encoder.outer.weight", None)), "encoder.log_scale")
    if type(encoder) is nn.Linear:
        return Network((read_linear("encoder", encoder),))
    if type(encoder) is not nn.Sequential or len(set(encoder)) != len(encoder):
        return None
    layers: list[Layer] = []
    for name, module in encoder.named_children():
        if type(module) is nn.Linear:
            layers.append(read_linear(f"encoder.{name}", module))
        elif layers and not layers[-1].activation and _activation(module):
            layers[-1] = layers[-1]._replace(activation=_activation(module))
        else:
            return None
    return Network(tuple(layers)) if layers else None


def read_linear(name: str, module: nn.Linear) -> Layer:
    """The layer of a Linear of this name."""
    return Layer(f"{name}.weight", None if module.bias is None else f"{name}.bias")


def _activation(module: nn.Module) -> str:
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu tanh"}[module.approximate]
    simple: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh"}
    return simple.get(type(module), "")


class Weights(NamedTuple):
    """Parameters and buffers as they are trained, and in the dtype of the products (the same tensors, or copies)."""

    master: Parameters
    compute: Parameters

    def updated(self, own: Weights) -> Weights:
        """With others in place of some."""
        master = self.master | own.master
        exact = own.compute is own.master and self.compute is self.master
        return Weights(master, master if exact else self.compute | own.compute)


class Buffers:
    """Memory by name that is taken again and again: nothing is allocated after the first batch of a shape."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised, contiguous; whoever takes the name next has the same memory."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.dtype != dtype or len(flat) < size:
            flat = self._flat[name] = torch.empty(size, dtype=dtype, device=self.device)
        return flat[:size].view(shape)


# Told of a layer once nothing reads its parameters any more, with the gradient to what the layer gives [C, n, O].
Use = Callable[["BatchedLayer", Tensor], None]


class BatchedLayer:
    """One layer for C episodes of n rows. All views are made here, once: the calls below are a few operations each."""

    def __init__(self, layer: Layer, weights: Weights, n_episodes: int, n_rows: int, buffers: Buffers) -> None:
        self.layer = layer
        self.weight, self.master_weight = weights.compute[layer.weight], weights.master[layer.weight]
        self.bias = self.master_bias = None
        if layer.bias:
            self.master_bias, self.bias = (side[layer.bias].unsqueeze(-2) for side in weights)
        self.weight_t, self.shared = self.weight.mT, self.weight.ndim == 2
        n_out, n_in = self.weight.shape[-2:]

        def take(kind: str, width: int) -> Tensor:
            return buffers.take(f"{layer.weight} {kind}", (n_episodes, n_rows, width), self.weight.dtype)

        self.before = take("before", n_out)
        # GELU's derivative wants what was there before it; the other activations work in place.
        self.after = take("after", n_out) if layer.activation.startswith("gelu") else self.before
        self.grad_rows = take("grad rows", n_in)
        self.grad_weight = (
            self.weight if self._exact else buffers.take("grad weight", (n_episodes, n_out, n_in), self.weight.dtype)
        )
        self.rows = self.grad_rows
        given = [value for value in (self.weight, self.bias) if value is not None]
        self._native = self._exact and native.serves(*given) and all(value.is_contiguous() for value in given)

    @property
    def _exact(self) -> bool:
        """Whether products are taken with the master weights themselves."""
        return self.weight is self.master_weight

    def forward(self, rows: Tensor) -> Tensor:
        """What the layer gives [C, n, O] for rows [C, n, I]."""
        self.rows = rows.contiguous() if self._native else rows
        if self._native:
            rectify = self.layer.activation == "relu"
            layers.forward(self.rows, self.weight, self.bias, rectify, self.before)
            if not rectify:
                _activate(self.layer.activation, self.before, self.after)
            return self.after
        if not self.shared and self.bias is not None:
            torch.baddbmm(self.bias, rows, self.weight_t, out=self.before)
        elif not self.shared:
            torch.bmm(rows, self.weight_t, out=self.before)
        elif self.bias is not None:
            torch.addmm(self.bias, rows.flatten(0, 1), self.weight_t, out=self.before.flatten(0, 1))
        else:
            torch.mm(rows.flatten(0, 1), self.weight_t, out=self.before.flatten(0, 1))
        _activate(self.layer.activation, self.before, self.after)
        return self.after

    def through_activation_(self, grad: Tensor) -> None:
        """Turn the gradient to what the activation gives [C, n, O] into that to what it takes."""
        _pull_activation_(self.layer.activation, grad, self.before, self.after)

    def pull(self, grad: Tensor, below: BatchedLayer | None = None) -> Tensor:
        """The gradient to the rows [C, n, I] from that to the product [C, n, O]; or to the product below."""
        if self._native:
            rectified = below is not None and below.layer.activation == "relu"
            layers.pull(grad, self.weight, below.after if below and rectified else None, self.grad_rows)
            if rectified:
                return self.grad_rows
        elif self.shared:
            torch.mm(grad.flatten(0, 1), self.weight, out=self.grad_rows.flatten(0, 1))
        else:
            torch.bmm(grad, self.weight, out=self.grad_rows)
        if below:
            below.through_activation_(self.grad_rows)
        return self.grad_rows

    def gradients(self, grad: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The gradients to weight and bias, summed over groups of so many episodes: [C / group, …]."""
        # A group's rows one below the other: a single product sums the gradient over the whole of it.
        grad = grad.reshape(len(grad) // group, -1, grad.shape[-1])
        rows = self.rows.reshape(len(grad), -1, self.rows.shape[-1])
        if self._native:
            by_weight = grad.new_empty(len(grad), *self.weight.shape[-2:])
            by_bias = grad.new_empty(len(grad), self.weight.shape[-2]) if self.layer.bias else None
            layers.step(grad, rows, 1.0, (None, None), (by_weight, None if by_bias is None else by_bias.unsqueeze(1)))
            return by_weight, by_bias
        if group == 1:
            by_weight = torch.bmm(grad.mT, rows)
        else:  # one by one: a batch of one group may be taken in another way than of many, with other bits
            by_weight = torch.stack([torch.mm(g.mT, r) for g, r in zip(grad, rows, strict=True)])
        return by_weight.to(dtype), torch.sum(grad, 1, dtype=dtype) if self.layer.bias else None

    def descend(self, start: BatchedLayer, grad: Tensor, lr: float) -> None:
        """Make these weights [C, O, I] those of start less lr times start's gradient; start may be this layer."""
        if self._native:
            layers.step(grad, start.rows, -lr, (start.weight, start.bias), (self.weight, self.bias))
            return
        if self._exact:
            torch.baddbmm(start.weight_t, start.rows.mT, grad, alpha=-lr, out=self.weight_t)
            if self.bias is not None and start.bias is not None:
                torch.add(start.bias, grad.sum(1, keepdim=True), alpha=-lr, out=self.bias)
            return
        torch.bmm(grad.mT, start.rows, out=self.grad_weight)
        torch.add(start.master_weight, self.grad_weight, alpha=-lr, out=self.master_weight)
        self.weight.copy_(self.master_weight)
        if self.bias is not None:
            assert self.master_bias is not None
            assert start.master_bias is not None
            by_bias = torch.sum(grad, 1, keepdim=True, dtype=self.master_bias.dtype)
            torch.add(start.master_bias, by_bias, alpha=-lr, out=self.master_bias)
            self.bias.copy_(self.master_bias)


class BatchedNetwork:
    """An encoder for C episodes of n rows."""

    def __init__(self, network: Network, weights: Weights, n_episodes: int, n_rows: int, buffers: Buffers) -> None:
        self.layers = [BatchedLayer(layer, weights, n_episodes, n_rows, buffers) for layer in network.layers]
        self.log_scale = weights.master[network.log_scale] if network.log_scale else None

    def forward(self, rows: Tensor) -> Tensor:
        """Embeddings [C, n, z] of rows [C, n, d], in a buffer."""
        z = rows
        for layer in self.layers:
            z = layer.forward(z)
        if self.log_scale is not None:
            z.addcmul_(rows, self.log_scale.exp().unsqueeze(-2).to(rows.dtype))
        return z

    def backward(self, grad: Tensor, use: Use) -> Tensor | None:
        """From the gradient to z [C, n, z], which is overwritten, to each layer's `use`; none to the rows themselves.

        Returns:
            The gradient to log_scale [C, d], where there is one.
        """
        by_scale = None
        if self.log_scale is not None:
            by_scale = (grad * self.layers[0].rows).sum(1, dtype=self.log_scale.dtype) * self.log_scale.exp()
        self.layers[-1].through_activation_(grad)
        for layer, below in zip(reversed(self.layers), [*reversed(self.layers[:-1]), None], strict=True):
            grad_below = layer.pull(grad, below) if below else grad
            use(layer, grad)
            grad = grad_below
        return by_scale


def group_sums(values: Tensor, group: int) -> Tensor:
    """Values of episodes [C, …] summed over groups of so many: [C / group, …]."""
    return values.view(-1, group, *values.shape[1:]).sum(1)


def _activate(activation: str, before: Tensor, after: Tensor) -> None:
    match activation:
        case "relu":
            after.relu_()
        case "tanh":
            after.tanh_()
        case "gelu" | "gelu tanh":
            torch.ops.aten.gelu.out(before, approximate=_approximate(activation), out=after)


def _pull_activation_(activation: str, grad: Tensor, before: Tensor, after: Tensor) -> None:
    aten = torch.ops.aten
    match activation:
        case "relu":
            aten.threshold_backward.grad_input(grad, after, 0, grad_input=grad)
        case "tanh":
            aten.tanh_backward.grad_input(grad, after, grad_input=grad)
        case "gelu" | "gelu tanh":
            aten.gelu_backward.grad_input(grad, before, approximate=_approximate(activation), grad_input=grad)


def _approximate(activation: str) -> str:
    return "tanh" if activation == "gelu tanh" else "none"
