"""Calls of the compiled kernels: the arguments as C takes them, the work shared by the threads."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from mdml_kernels.native import loader
from mdml_kernels.native.threads import shared


def call(name: str, n: int, size: int, worthwhile: int, *arguments: Any, held: tuple[Any, ...] = ()) -> None:
    """Run a kernel on range(n), in parts side by side.

    Args:
        name: of the function.
        n: how many things it does.
        size: what each of them takes.
        worthwhile: less than this is not worth a thread of its own.
        arguments: what follows the bounds of a part: tensors by their memory, None as null, whole numbers, `c_float`s,
            or a reference that ctypes made. A tensor is contiguous, or its strides are among the arguments.
        held: whose memory the arguments name beside their own.
    """
    kernels = loader.native().kernels
    assert kernels is not None
    function = getattr(kernels, name)
    if function.argtypes is None:  # an argument is of the same kind in every call
        function.argtypes = [ctypes.c_int64, ctypes.c_int64, *map(_kind, arguments)]
    given = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]

    def run(begin: int, end: int, held: tuple[Any, ...] = (*arguments, *held)) -> None:  # noqa: ARG001 - see `shared`
        function(begin, end, *given)

    shared(run, n, least=max(1, worthwhile // max(1, size)))


def address(tensor: Tensor | None) -> int | None:
    """Of a tensor's memory; None for null."""
    return None if tensor is None else tensor.data_ptr()


def check(name: str, values: Tensor | None, *shape: int, dtype: torch.dtype = torch.float32) -> None:
    """Refuse what a kernel would read beyond: values of another shape or dtype. None is let through.

    Raises:
        ValueError: they are of another one.
    """
    if values is not None and (values.shape != shape or values.dtype != dtype):
        raise ValueError(f"{name} must be {dtype} {list(shape)}, got {values.dtype} {list(values.shape)}")


def stride(name: str, parameter: Tensor | None, n_episodes: int, *shape: int) -> int:
    """From one episode's parameter [n_episodes, *shape] to the next's; 0 where they share one [*shape], or have none.

    Raises:
        ValueError: it is of another shape.
    """
    if parameter is None:
        return 0
    given, own = parameter.shape, (n_episodes, *shape)
    if given == own:
        return parameter.stride(0)
    if given == shape:
        return 0
    raise ValueError(f"{name} must be {list(shape)} or {list(own)}, got {list(given)}")


def whole(values: Tensor | None) -> Tensor | None:
    """Values in contiguous memory; None stays."""
    return None if values is None else values.contiguous()


def _kind(argument: Any) -> type:
    if isinstance(argument, int):
        return ctypes.c_int64
    return ctypes.c_float if isinstance(argument, ctypes.c_float) else ctypes.c_void_p
