"""Which path the engine takes: one pure function of what it is made of, decided once, before anything is computed."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from mdml_kernels import SoftmaxMarginLoss
from mdml_kernels.dispatch import triton_state
from torch import nn

from mdml_fast.meta.fused_heads import read_head
from mdml_fast.meta.fused_layers import Layer, read_encoder

Path = Literal["auto", "generic", "fused"]
PATHS = ("auto", "generic", "fused")

_FUSED_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class Choice(NamedTuple):
    """A path's name and, in a few words, why it was chosen."""

    path: str
    reason: str


def choose_path(
    modules: nn.ModuleDict, device: str, dtype: torch.dtype, first_order: bool, requested: Path = "auto"
) -> Choice:
    """The engine's path.

    Args:
        modules: ``encoder``, ``head``, ``loss`` and perhaps ``decoder``.
        device: the type of the parameters' device.
        dtype: what the networks compute in.
        first_order: whether the inner loop is left out of the outer gradient.
        requested: ``auto`` takes the fused path where it can.

    Raises:
        ValueError: the path is unknown, or can't serve.
    """
    if requested not in PATHS:
        raise ValueError(f"path must be one of {', '.join(map(repr, PATHS))}, got {requested!r}")
    why_not = _why_not_fused(modules, device, dtype, first_order)
    if requested == "fused" and why_not:
        raise ValueError(f"path 'fused' can't serve this engine: {why_not}; leave it 'auto'")
    if requested == "generic":
        return Choice("generic", "asked for")
    if why_not:
        return Choice("generic", why_not)
    return Choice("fused", f"an MLP in {str(dtype).removeprefix('torch.')} on {device}, first order")


def _why_not_fused(modules: nn.ModuleDict, device: str, dtype: torch.dtype, first_order: bool) -> str:
    """What stands against the fused path; "" where nothing does."""
    encoder, head, loss = modules["encoder"], modules["head"], modules["loss"]
    if not first_order:
        return "second order needs a graph through the inner loop"
    if "decoder" in modules:
        return "there is a decoder"
    if len(dict(modules.named_parameters())) < len(dict(modules.named_parameters(remove_duplicate=False))):
        return "modules share a parameter"
    network, read = read_encoder(encoder), read_head(head)
    if network is None:
        return f"the encoder ({type(encoder).__name__}) is no Sequential of Linear, ReLU, GELU and Tanh"
    if read is None:
        return f"the head ({type(head).__name__}) is neither Linear nor PrototypeHead"
    if any(_is_altered(module) for module in modules.modules()):
        return "a module has hooks, or a forward of its own"
    layers = {*network.names, *(read.names if isinstance(read, Layer) else [])}
    if layers != {name for name, _ in modules.named_parameters() if not name.startswith("loss.")}:
        return "a module has other parameters than its type"
    if type(loss) is not SoftmaxMarginLoss or loss.backend not in ("auto", "cpu"):
        return "the loss is no SoftmaxMarginLoss with backend 'auto'"
    if device not in ("cpu", "cuda") or dtype not in _FUSED_DTYPES:
        return f"{str(dtype).removeprefix('torch.')} on {device} has only the generic path"
    if device == "cuda" and triton_state() is None:
        return "Triton, whose kernels the fused path takes on a GPU, is not installed"
    return ""


def _is_altered(module: nn.Module) -> bool:
    """Whether calling it does something else than its type does."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
