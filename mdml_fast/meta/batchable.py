"""Which modules can be batched over episodes; all others are refused, in one line that names the module."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import partial
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

# What vmap says of a forward that it can't batch, and what we say after the module's name.
_NOT_BATCHED = {
    "randomness": "draws random numbers in its forward, as dropout does, which episodes can't share: leave that "
    "out, or call eval() first",
    "Batching rule not implemented": "takes an operation that can't be batched over episodes: leave it out",
    "inplace arithmetic": "writes into a tensor that its forward made, which has no place for every episode: let it "
    "make a new one",
}
_CHANGES_ROWS = "works in place on its rows, which later steps read: let it copy them"


def check_batchable(modules: nn.ModuleDict) -> None:
    """Refuse now what would fail, mix episodes, or be trained unasked, deep inside a batched computation.

    Raises:
        ValueError: one line with the module's or parameter's name and the remedy.
    """
    for name, param in modules.named_parameters():
        if not param.requires_grad:
            raise ValueError(
                f"{name} has requires_grad=False, but all parameters are trained: set it True, or make it a buffer"
            )
    for name, module in modules.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise ValueError(f"{name} has a backward hook, which gradients of many episodes don't call: remove it")
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                raise ValueError(
                    f"{name}.{attribute} was computed from parameters, as legacy weight_norm and prune do, and has no "
                    "place in an episode: use torch.nn.utils.parametrize"
                )
        if getattr(module, "track_running_stats", False):
            raise ValueError(f"{name} keeps running statistics, which episodes can't share: use LayerNorm")
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(f"{name} is dropout, which has no place in an episode's inner loop: set p=0")
        within = getattr(module, "dropout", 0)  # of an attention or a recurrent layer
        if isinstance(within, float | int) and within > 0:
            raise ValueError(f"{name} has dropout, which has no place in an episode's inner loop: set dropout=0")
        if isinstance(module, nn.RReLU):
            raise ValueError(f"{name} draws its slopes at random, which episodes can't share: use LeakyReLU")
        if getattr(module, "inplace", False):
            raise ValueError(f"{name} works in place, on rows that other episodes read: set inplace=False")


def try_forward(modules: nn.ModuleDict, stacked: bool) -> None:
    """Refuse modules whose forward shows only when it runs that it can't be batched.

    A copy of them runs on rows of zeros, as wide as the encoder's first Linear takes them. Where there is none, or the
    modules want other rows or can't be copied, the first batch will show it.

    Args:
        modules: ``encoder``, ``head`` and perhaps ``decoder``.
        stacked: whether each episode will have parameters of its own.

    Raises:
        NotBatchableError: one line with the module's name and the remedy.
    """
    if any(hasattr(module, "_orig_mod") for module in modules.modules()):  # compiles at its first call
        return
    try:
        forward = _Forward(copy.deepcopy(modules))
        rows = forward.rows_of_zeros(2, 3)
        if rows is None:
            return
        values = {name: value.detach() for name, value in (*forward.named_parameters(), *forward.named_buffers())}
        if stacked:
            values = {name: value.expand(2, *value.shape).clone() for name, value in values.items()}
        devices = [rows.device] if rows.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            with _watched(forward.parts, rows[0]):
                forward(rows[0])
            with batchable(forward.parts, rows):
                vmap(partial(functional_call, forward), in_dims=(0 if stacked else None, 0))(values, rows)
    except NotBatchableError:
        raise
    except Exception:  # of a module that wants other rows
        return


class _Forward(nn.Module):
    """All the modules, one after the other."""

    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        self.parts = parts

    def rows_of_zeros(self, *shape: int) -> Tensor | None:
        """As wide as the encoder's first Linear takes them."""
        linears = (module for module in self.parts["encoder"].modules() if isinstance(module, nn.Linear))
        first = next(linears, None)
        return None if first is None else first.weight.new_zeros(*shape, first.in_features)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [n, d] through all of them."""
        parts, z = self.parts, self.parts["encoder"](rows)
        parts["head"](z, z) if getattr(parts["head"], "takes_support", False) else parts["head"](z)
        decoded: Tensor = parts["decoder"](z) if "decoder" in parts else z
        return decoded


class NotBatchableError(ValueError):
    """A module can't be batched over episodes."""


@contextlib.contextmanager
def batchable(modules: nn.Module, *rows: Tensor) -> Iterator[None]:
    """Refuse modules that can't be batched over episodes while they compute on rows [E, n, d].

    Above all those that write into the rows: later steps, and the caller, read those.

    Raises:
        NotBatchableError: one line with the remedy, and the module's name where that is known.
    """
    before = [_writes(tensor) for tensor in rows]
    try:
        yield
    except RuntimeError as error:
        for words, remedy in _NOT_BATCHED.items():
            if words in str(error):
                raise NotBatchableError(f"{_innermost(modules, error.__traceback__)} {remedy}") from error
        raise
    if [_writes(tensor) for tensor in rows] != before:
        raise NotBatchableError(f"a module {_CHANGES_ROWS}")


@contextlib.contextmanager
def _watched(modules: nn.ModuleDict, rows: Tensor) -> Iterator[None]:
    """Refuse a module that writes into the rows: the one that was running when they had changed."""
    before, running = _writes(rows), [""]

    def enter(name: str, *_: object) -> None:
        look()
        running.append(name)

    def leave(*_: object) -> None:
        look()
        running.pop()

    def look() -> None:
        if _writes(rows) != before:
            raise NotBatchableError(f"{running[-1]} {_CHANGES_ROWS}")

    hooks = [module.register_forward_hook(leave) for module in modules.modules()]
    hooks += [module.register_forward_pre_hook(partial(enter, name)) for name, module in modules.named_modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _innermost(modules: nn.Module, traceback: TracebackType | None) -> str:
    """The name of the module whose forward an error came out of."""
    names, found = {id(module): name for name, module in modules.named_modules() if name}, "a module"
    while traceback:
        found = names.get(id(traceback.tb_frame.f_locals.get("self")), found)
        traceback = traceback.tb_next
    return found


def _writes(tensor: Tensor) -> int:
    """How often the tensor was written to; those of inference mode don't count."""
    return 0 if tensor.is_inference() else tensor._version
