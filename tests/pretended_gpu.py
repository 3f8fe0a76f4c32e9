"""A GPU that isn't there: torch's own CPU, and a mode that remembers which tensors would lie on the GPU.

It stops what a GPU would stop: operations on tensors of both devices, NumPy's look into the GPU's memory. It can't tell
whether a kernel is right or fast there. One thread alone: a mode belongs to its thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

CPU, GPU = torch.device("cpu"), torch.device("cuda")
# These take tensors of both devices.
ACROSS = {"torch.Tensor.copy_", "torch.Tensor.data.__set__", "torch.Tensor.device.__get__"}
# These may be told places on the GPU by tensors on the CPU.
INDEXING = {"torch.Tensor.__getitem__", "torch.Tensor.__setitem__"}
# What the host waits for, and what moves memory between the two: neither can be captured in a CUDA graph.
WAITING = {
    *("torch.nonzero", "torch.argwhere", "torch.masked_select", "torch.functional.unique", "torch.equal"),
    *("torch.functional.unique_consecutive", "torch.allclose", "torch.bincount", "torch.nn.functional.one_hot"),
} | {
    f"torch.Tensor.{name}"
    for name in (
        *("__bool__", "__float__", "__int__", "__index__", "__format__", "__repr__", "item", "tolist", "nonzero"),
        *("argwhere", "masked_select", "unique", "unique_consecutive", "equal", "allclose", "bincount"),
    )
}
# These where what they are given tells how much comes out.
SIZING = {"torch.where": 1, "torch.repeat_interleave": 2, "torch.Tensor.repeat_interleave": 2}
CROSSING = {"torch.tensor", "torch.as_tensor", "torch.from_numpy", "torch.Tensor.new_tensor"} | {
    f"torch.Tensor.{name}" for name in ("to", "cpu", "cuda", "copy_")
}


class WrongDeviceError(AssertionError):
    """What a GPU would refuse."""


class PretendedGpu(TorchFunctionMode):
    """Marks tensors as on the GPU by an attribute of theirs.

    Attributes:
        seen: names of the functions that computed on the GPU.
        capturing: whether what is computed now goes into a CUDA graph.
        captured: how often something went there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.capturing, self.captured = False, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), resolve_name(func)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = [tensor for tensor in given if is_on_gpu(tensor)]
        if func is torch.device:
            return func(*args, **kwargs)
        if name == "torch.Tensor.device.__get__":
            return GPU if on_gpu else CPU
        if name == "torch.Tensor.is_cuda.__get__":
            return bool(on_gpu)
        if name in ("torch.Tensor.numpy", "torch.Tensor.__array__") and on_gpu:
            raise WrongDeviceError(f"{name}: can't convert a tensor on the GPU; .cpu() first")
        self._check(name, args, given, on_gpu)
        target = self._target(name, args, kwargs, bool(on_gpu))
        if self.capturing:
            self._check_capture(name, args, given, target)
        if name:  # others hand devices on
            args, kwargs = tree_map(_to_cpu, args), tree_map(_to_cpu, kwargs)
        result = func(*args, **kwargs)
        if name and target and on_gpu:
            self.seen.add(name)
        if name == "torch.Tensor.data.__set__":
            args[0]._on_gpu = is_on_gpu(args[1])
        if isinstance(result, Tensor) and is_on_gpu(result) != target and any(result is tensor for tensor in given):
            result = result.clone()  # a copy over there
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                leaf._on_gpu = target  # type: ignore[attr-defined]
        return result

    def _check(self, name: str | None, args: tuple[Any, ...], given: list[Tensor], on_gpu: list[Tensor]) -> None:
        if not on_gpu or not name or name in ACROSS or name.endswith(("__get__", ".to")):
            return
        others = [tensor for tensor in given if not is_on_gpu(tensor) and tensor.ndim]
        if name in INDEXING:
            # A place may lie on the CPU; what is put there may not, nor the tensor itself.
            others = [] if is_on_gpu(args[0]) else others
            if len(args) > 2 and isinstance(args[2], Tensor) and not is_on_gpu(args[2]) and args[2].ndim:
                others.append(args[2])
        if others:
            shapes = [(tuple(tensor.shape), "GPU" if is_on_gpu(tensor) else "CPU") for tensor in given]
            raise WrongDeviceError(f"{name}: tensors on both devices: {shapes}")

    def _check_capture(self, name: str | None, args: tuple[Any, ...], given: list[Tensor], target: bool) -> None:
        there = [is_on_gpu(tensor) for tensor in given]
        sized = name in SIZING and len(given) == len(args) == SIZING[name]
        waits = any(there) and (name in WAITING or _host_tells_places(name, args) or sized)
        crosses = name in CROSSING and (target or any(there)) and not (target and there and all(there))
        if waits or crosses:
            raise WrongDeviceError(f"{name}: the host's part in what is captured")

    def _target(self, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any], on_gpu: bool) -> bool:
        """Whether the result lies on the GPU."""
        if name == "torch.Tensor.cpu":
            return False
        named = [
            leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, torch.device | str) and _is_device(leaf)
        ]
        if named:
            return torch.device(named[-1]).type == "cuda"
        if name == "torch.Tensor.to" and len(args) > 1 and isinstance(args[1], Tensor):
            return is_on_gpu(args[1])
        if name in ("torch.Tensor.copy_", "torch.Tensor.data.__set__"):
            return is_on_gpu(args[0])
        return on_gpu


def is_on_gpu(tensor: Tensor) -> bool:
    """Whether the mode would have it there."""
    return bool(tensor.__dict__.get("_on_gpu", False))


def _host_tells_places(name: str | None, args: tuple[Any, ...]) -> bool:
    """Whether it indexes by a mask, of which the host has to know the size, or by what the host has to send."""
    if name not in INDEXING:
        return False
    return isinstance(args[1], list) or any(
        isinstance(place, np.ndarray)
        or (isinstance(place, Tensor) and (place.dtype == torch.bool or not is_on_gpu(place)))
        for place in tree_leaves(args[1])
    )


def _is_device(value: torch.device | str) -> bool:
    return isinstance(value, torch.device) or value.split(":")[0] in ("cpu", "cuda")


def _to_cpu(leaf: Any) -> Any:
    if isinstance(leaf, torch.device | str) and _is_device(leaf):
        return CPU if isinstance(leaf, torch.device) else "cpu"
    return leaf


@contextlib.contextmanager
def pretended_gpu(patch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    """torch finds a GPU meanwhile; graphs are not captured, and what Triton computes torch does."""
    from mdml_kernels import direct, dispatch

    from mdml_fast import threads
    from mdml_fast.meta import chunks, fused, on_gpu, paths

    mode = PretendedGpu()

    class Again:
        """`on_gpu.Replayed` without a graph: computed each time, as if it were captured."""

        def __init__(self, function: Callable[..., Any], *_: Tensor) -> None:
            self._function = function

        def __call__(self, *args: Tensor) -> Any:
            mode.capturing = True
            mode.captured += 1
            try:
                return tree_map(torch.clone, self._function(*args))
            finally:
                mode.capturing = False

    margin_gradients = direct.margin_gradients

    def by_torch(*args: Any, **options: Any) -> Any:
        assert options["backend"] == "triton"
        return margin_gradients(*args, **{**options, "backend": "cpu"})

    class AtOnce:
        """A pool of no threads."""

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __enter__(self) -> AtOnce:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def submit(self, job: Callable[..., Any], *args: Any) -> Future[Any]:
            done: Future[Any] = Future()
            done.set_result(job(*args))
            return done

    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "mem_get_info", lambda _: (2**33, 2**33))
    patch.setattr(torch.cuda, "get_device_name", lambda _=None: "pretended")
    patch.setattr(threads, "ThreadPoolExecutor", AtOnce)
    patch.setattr(chunks.ChunkCache, "get", lambda *_: None)
    patch.setattr(chunks.ChunkCache, "put", lambda *_: None)
    patch.setattr(chunks, "measure", lambda _, sizes: sizes[-1])
    patch.setattr(dispatch, "triton_state", lambda: None)
    patch.setattr(paths, "triton_state", lambda: "compiler")
    patch.setattr(on_gpu, "takes_triton", lambda *_: False)
    patch.setattr(fused, "Replayed", Again)
    patch.setattr(direct, "margin_gradients", by_torch)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with mode:
            yield mode
    finally:
        torch.set_num_threads(n_threads)
