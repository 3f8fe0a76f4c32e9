"""What the public functions refuse, each in one line: the argument, what it was, what it must be.

Only `values` reads what is in a tensor; the rest looks at shapes, dtypes and devices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mdml_kernels.dispatch import BACKENDS
from mdml_kernels.reference import Scalar

# Of a temperature or scale: one over less than this is infinite in float32.
_LEAST = torch.finfo(torch.float32).tiny


def logits(values: Tensor, temperature: Scalar, background: Scalar | None, confidence: str) -> None:
    """Logits [..., N, K] and what scales them."""
    _floating("logits", values)
    if values.ndim < 2 or not values.shape[-1]:
        raise ValueError(f"logits must be [..., N, K] with K >= 1, got {list(values.shape)}")
    _scaling(values.shape[:-2], values.shape[-1], values.device, temperature, background, confidence)


def labels(is_ood: Tensor, values: Tensor) -> None:
    """is_ood, bool, one per row of the logits."""
    if not isinstance(is_ood, Tensor) or is_ood.dtype != torch.bool:
        raise TypeError(f"is_ood must be a bool tensor, got {_kind(is_ood)}")
    if is_ood.shape != values.shape[:-1]:
        rows = list(values.shape[:-1])
        raise ValueError(f"is_ood must have the shape of the rows {rows}, got {list(is_ood.shape)}")
    _same_device("is_ood", is_ood, "logits", values.device)


def settings(
    margin_value: float,
    temperature: float,
    background: float | None,
    confidence: str,
    form: str,
    reduction: str,
    backend: str,
) -> None:
    """Of a loss before it has seen logits: all that its calls would refuse whatever these are."""
    margin(margin_value)
    _confidence(confidence, background)
    form_of_loss(form)
    reduction_of_episodes(reduction)
    choice("backend", backend, BACKENDS)
    for name, value in (("temperature", temperature), ("background", background)):
        if isinstance(value, Tensor):
            raise TypeError(f"{name} must be a number, got a tensor: learn_{name}=True makes it a parameter")
    _positive("temperature", temperature, (), torch.device("cpu"))
    if background is not None:
        _number("background", background, "a number")


def form_of_loss(value: str) -> None:
    """One of the forms that `softmax_margin_loss` has."""
    choice("form", value, ("hinge", "pairwise", "bce"))


def reduction_of_episodes(value: str) -> None:
    """One of the ways that losses of episodes become one."""
    choice("reduction", value, ("mean", "sum", "none"))


def margin(value: float) -> None:
    """A number in [0, 1]."""
    if isinstance(value, Tensor):
        raise TypeError("margin must be a float, got a tensor: it is a setting, and no gradient would flow to it")
    _number("margin", value, "a number")
    if not 0 <= value <= 1:
        raise ValueError(f"margin must be in [0, 1], the confidence's range, got {value}")


def head(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    centers: Tensor | None,
    scale: Scalar,
    temperature: Scalar,
    background: Scalar | None,
    confidence: str,
) -> None:
    """Embeddings z [..., N, H] and a linear head (weight, bias) or a prototype head (centers, scale)."""
    _floating("z", z)
    if z.ndim < 2:
        raise ValueError(f"z must be [..., N, H], got {list(z.shape)}")
    if (weight is None) == (centers is None):
        raise ValueError("give either weight (linear head) or centers (prototype head)")
    if bias is not None and weight is None:
        raise ValueError("bias belongs to weight (linear head), got it with centers")
    name, matrix = ("weight", weight) if weight is not None else ("centers", centers)
    assert matrix is not None
    _floating(name, matrix)
    if matrix.ndim != 2 or matrix.shape[1] != z.shape[-1] or not len(matrix):
        raise ValueError(
            f"{name} must be [K, {z.shape[-1]}], z having {z.shape[-1]} features, got {list(matrix.shape)}"
        )
    if bias is not None and bias.shape != matrix.shape[:1]:
        raise ValueError(f"bias must be [{len(matrix)}], one per row of weight, got {list(bias.shape)}")
    for other, value in ((name, matrix), ("bias", bias)):
        if value is not None:
            _same_device(other, value, "z", z.device)
            if value.dtype != z.dtype and not torch.is_autocast_enabled(z.device.type):
                raise TypeError(f"{other} must have the dtype of z, {z.dtype}, got {value.dtype}")
    _positive("scale", scale, (), z.device)
    _scaling(z.shape[:-2], len(matrix), z.device, temperature, background, confidence)


def choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """One of a few words."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def values(**arguments: Scalar | None) -> None:
    """Read the tensors: none may hold NaN or an infinity, temperature and scale must be positive."""
    for name, value in arguments.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
        if isinstance(value, Tensor):
            bad = int((~value.isfinite()).sum())
            if bad:
                raise ValueError(f"{name} must be finite, got {bad} of {value.numel()} values NaN or infinite")
            if name in ("temperature", "scale") and not bool((value > 0).all()):
                raise ValueError(f"{name} must be positive, got a smallest value of {float(value.min())}")


def _scaling(
    episodes: torch.Size,
    n_classes: int,
    device: torch.device,
    temperature: Scalar,
    background: Scalar | None,
    confidence: str,
) -> None:
    _confidence(confidence, background)
    if background is None and n_classes == 1:
        raise ValueError("logits have K = 1, whose softmax is always 1: give background= or K >= 2")
    _positive("temperature", temperature, episodes, device)
    if isinstance(background, Tensor):
        _per_episode("background", background, episodes, device)
    elif background is not None:
        _number("background", background)


def _confidence(value: str, background: Scalar | None) -> None:
    choice("confidence", value, ("max", "mass"))
    if background is None and value == "mass":
        raise ValueError("confidence 'mass' is one minus the background's probability: give background=")


def _positive(name: str, value: Scalar, episodes: tuple[int, ...], device: torch.device) -> None:
    if isinstance(value, Tensor):
        _per_episode(name, value, episodes, device)
        return
    _number(name, value)
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    if isinstance(value, float) and value < _LEAST:
        raise ValueError(f"{name} must be at least {_LEAST:.2g}, got {value}: float32 holds no 1/{value}")


def _number(name: str, value: object, kind: str = "a number or a tensor") -> None:
    if value is None or isinstance(value, str | list | tuple):  # symbolic numbers of a compiler pass
        raise TypeError(f"{name} must be {kind}, got {value!r}")


def _per_episode(name: str, value: Tensor, episodes: tuple[int, ...], device: torch.device) -> None:
    if value.ndim and value.shape != episodes:
        wanted = f"a scalar or one per episode {list(episodes)}" if episodes else "a scalar"
        raise ValueError(f"{name} must be {wanted}, got {list(value.shape)}")
    _floating(name, value)
    _same_device(name, value, "logits", device)


def _floating(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {_kind(value)}")


def _same_device(name: str, value: Tensor, other: str, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, but {other} on {device}: move one of them")


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
