"""What the fused path does otherwise on a GPU: the inner loop by Triton kernels, and all of it replayed as a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from mdml_kernels.launch import on_device_of
from torch import Tensor
from torch.utils._pytree import tree_map

from mdml_fast.meta.fused_layers import Layer, Network, Weights

if TYPE_CHECKING:
    from mdml_fast.meta.fused_program import Recipe


def takes_triton(network: Network, head: Layer | str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `adapt` serves: a GPU, ReLU after every layer but the last, biases, a linear head, no float64."""
    *hidden, last = network.layers
    return (
        device.type == "cuda"
        and dtype != torch.float64
        and isinstance(head, Layer)
        and network.log_scale is None
        and all(layer.activation == "relu" for layer in hidden)
        and not last.activation
        and all(layer.bias for layer in network.layers)
    )


def adapt(
    recipe: Recipe, given: Weights, own: Weights, support: Tensor, tau: Tensor | None, background: Tensor | None
) -> None:
    """Fill own with the encoder's weights after the inner loop on support rows [C, n, d], from those that are given."""
    from mdml_kernels.triton_mlp import adapt_mlp

    def stacked(name: str, ndim: int) -> Tensor:
        value = given.master[name]
        return value if value.ndim == ndim else value.unsqueeze(0)

    network, head = recipe.network, recipe.head
    assert isinstance(head, Layer)
    weights, biases = adapt_mlp(
        support.contiguous(),
        [stacked(layer.weight, 3) for layer in network.layers],
        [stacked(layer.bias, 2) for layer in network.layers if layer.bias],
        stacked(head.weight, 3),
        stacked(head.bias, 2) if head.bias else None,
        steps=recipe.settings.inner_steps,
        lr=recipe.settings.inner_lr,
        inv_temperature=None if tau is None else tau.contiguous(),  # it may be one value, expanded
        background=None if background is None else background.contiguous(),
        confidence=recipe.loss.confidence,
        precision="float32" if given.compute is given.master else "bfloat16",
    )
    for layer, weight, bias in zip(network.layers, weights, biases, strict=True):
        for side in {id(side): side for side in own}.values():
            side[layer.weight].copy_(weight)
            if layer.bias:
                side[layer.bias].copy_(bias)


class Replayed:
    """A function of tensors on a GPU: captured as a CUDA graph at once, replayed at each call.

    Args:
        function: tensors to tensors (in any nesting); it must not wait for the device.
        args: tensors like those to come.
    """

    def __init__(self, function: Callable[..., Any], *args: Tensor) -> None:
        self._inputs = [arg.clone() for arg in args]
        with on_device_of(args[0]):  # streams and graphs are those of the current GPU, which may be another
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function(*self._inputs)  # compiles kernels and allocates, which a capture must not
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # Another thread, which samples the next episodes, may allocate meanwhile.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._outputs = function(*self._inputs)

    def __call__(self, *args: Tensor) -> Any:
        """What the function gives, in tensors of its own."""
        for own, arg in zip(self._inputs, args, strict=True):
            own.copy_(arg)
        with on_device_of(args[0]):
            self._graph.replay()
        return tree_map(torch.clone, self._outputs)
