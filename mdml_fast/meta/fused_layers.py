"""The encoders that the fused path takes, and their layers for many episodes at once: in place, without a graph.

Letters: C episodes, n rows, I and O features into and out of a layer. A weight is [O, I] where episodes share it, one
large product then serves all of them, or [C, O, I]; a bias [O] or [C, O]. Rows are contiguous [C, n, I].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mdml_fast.meta.encoders import ResidualEncoder


class Layer(NamedTuple):
    """A linear layer by the names of its parameters, and the activation that follows it, "" for none."""

    weight: str
    bias: str | None
    activation: str


class Network(NamedTuple):
    """Layers in a row; with log_scale, what they give is added to ``x · exp(log_scale)``."""

    layers: tuple[Layer, ...]
    log_scale: str | None


def read_encoder(encoder: nn.Module) -> Network | None:
    """The encoder as a `Network`, or None where it is none."""
    if type(encoder) is ResidualEncoder:
        inner = Layer("encoder.inner.weight", "encoder.inner.bias", "relu")
        return Network((inner, Layer("encoder.outer.weight", None, "")), "encoder.log_scale")
    if type(encoder) is nn.Linear:
        return Network((_layer("encoder", encoder),), None)
    if type(encoder) is not nn.Sequential or len(set(encoder)) != len(encoder):
        return None
    layers: list[Layer] = []
    for name, module in encoder.named_children():
        if type(module) is nn.Linear:
            layers.append(_layer(f"encoder.{name}", module))
        elif layers and not layers[-1].activation and _activation(module):
            layers[-1] = layers[-1]._replace(activation=_activation(module))
        else:
            return None
    return Network(tuple(layers), None) if layers else None


def _layer(name: str, module: nn.Linear) -> Layer:
    return Layer(f"{name}.weight", None if module.bias is None else f"{name}.bias", "")


def _activation(module: nn.Module) -> str:
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu tanh"}[module.approximate]
    simple: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh"}
    return simple.get(type(module), "")


class Buffers:
    """Memory by name that is taken again and again: no allocation after the first batch of a shape."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised, contiguous; valid until the name is taken again."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.dtype != dtype or len(flat) < size:
            flat = self._flat[name] = torch.empty(size, dtype=dtype, device=self._device)
        return flat[:size].view(shape)


class Tape(NamedTuple):
    """What a forward pass leaves: the rows into each layer, each layer's values before its activation, embeddings z."""

    inputs: list[Tensor]
    before: list[Tensor]
    z: Tensor


def forward(network: Network, x: Tensor, values: dict[str, Tensor], buffers: Buffers) -> Tape:
    """Embeddings of rows x [C, n, I] under values in x's dtype. The tape lies in the buffers."""
    inputs, before = [x], []
    for number, layer in enumerate(network.layers):
        rows, weight = inputs[-1], values[layer.weight]
        out = buffers.take(f"layer {number}", (*rows.shape[:-1], weight.shape[-2]), x.dtype)
        affine(rows, weight, values[layer.bias] if layer.bias else None, out)
        before.append(out)
        if layer.activation.startswith("gelu"):  # its derivative wants what was there before it
            out = buffers.take(f"gelu {number}", tuple(out.shape), x.dtype)
        inputs.append(_activate(layer.activation, before[-1], out))
    z = inputs.pop()
    if network.log_scale:
        z.addcmul_(x, values[network.log_scale].exp().unsqueeze(-2))
    return Tape(inputs, before, z)


# Told of a layer's parameters once nothing reads them any more: weight and bias, the gradient to what the layer gives
# [C, n, O] and the rows it took [C, n, I]; the weight's gradient is the product of the two over the rows.
Use = Callable[[str, str | None, Tensor, Tensor], None]


def backward(network: Network, tape: Tape, grad: Tensor, values: dict[str, Tensor], buffers: Buffers, use: Use) -> None:
    """From the gradient to z [C, n, z], which is overwritten, to every layer's `use`; none to the rows themselves."""
    for number in range(len(network.layers) - 1, -1, -1):
        layer, rows = network.layers[number], tape.inputs[number]
        after = tape.inputs[number + 1] if number + 1 < len(tape.inputs) else tape.z
        _pull_activation_(layer.activation, grad, tape.before[number], after)
        below = grad
        if number:
            below = pull(grad, values[layer.weight], buffers.take(f"grad {number}", tuple(rows.shape), grad.dtype))
        use(layer.weight, layer.bias, grad, rows)
        grad = below


def scale_gradient(x: Tensor, grad: Tensor, log_scale: Tensor) -> Tensor:
    """The gradient to log_scale [C, d], of rows x and the gradient to z, both [C, n, d]."""
    return (x * grad).sum(1) * log_scale.exp()


def affine(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """``x Wᵀ + b`` into out [C, n, O]."""
    if weight.ndim == 3:
        if bias is None:
            return torch.bmm(x, weight.mT, out=out)
        return torch.baddbmm(bias.unsqueeze(-2), x, weight.mT, out=out)
    flat = out.flatten(0, 1)
    if bias is None:
        torch.mm(x.flatten(0, 1), weight.mT, out=flat)
    else:
        torch.addmm(bias, x.flatten(0, 1), weight.mT, out=flat)
    return out


def pull(grad: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """``g W`` into out [C, n, I]: the gradient to the rows of a linear layer from that to its results [C, n, O]."""
    if weight.ndim == 3:
        return torch.bmm(grad, weight, out=out)
    torch.mm(grad.flatten(0, 1), weight, out=out.flatten(0, 1))
    return out


def row_sums(grad: Tensor, out: Tensor) -> Tensor:
    """The sum over rows of [C, n, O] into out [C, O], in its dtype."""
    if grad.dtype != out.dtype:
        return torch.sum(grad, 1, dtype=out.dtype, out=out)
    # A product with ones takes half the time of a sum over the middle dim.
    ones = grad.new_ones(1, 1, 1).expand(*grad.shape[:1], 1, grad.shape[1])
    torch.bmm(ones, grad, out=out.unsqueeze(1))
    return out


def _activate(activation: str, before: Tensor, out: Tensor) -> Tensor:
    """out is `before` itself but for GELU."""
    match activation:
        case "relu":
            return out.relu_()
        case "tanh":
            return out.tanh_()
        case "gelu" | "gelu tanh":
            return torch.ops.aten.gelu.out(before, approximate=_approximate(activation), out=out)  # type: ignore[no-any-return]
    return out


def _pull_activation_(activation: str, grad: Tensor, before: Tensor, after: Tensor) -> None:
    """Turn the gradient to what the activation gives into that to what it takes."""
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
