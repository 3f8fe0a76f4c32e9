"""The public functions: they check shapes and dtypes, choose the backend, and reduce over episodes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mdml_kernels import reference
from mdml_kernels.reference import Confidence, Form, Reduction, Scalar

Backend = Literal["auto", "reference"]


def softmax_margin_loss(
    logits: Tensor,
    is_ood: Tensor,
    *,
    margin: float = 0.5,
    temperature: Scalar = 1.0,
    background: Scalar | None = None,
    confidence: Confidence = "max",
    form: Form = "hinge",
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Widen the softmax confidence margin between normal (ID) and anomalous (OOD) rows.

    With S the confidence of a row (`softmax_confidence`), the loss of an episode is

    - ``hinge``: ``relu(margin - (mean_ID S - mean_OOD S))``
    - ``pairwise``: ``mean_{i in ID, j in OOD} relu(margin - (S_i - S_j))``
    - ``bce``: ``mean_ID(-log S) + mean_OOD(-log(1 - S))``

    Roy, Mili, Boker, arXiv 2601.19833 (outer level). An episode without ID or without OOD rows gives 0 for
    ``hinge`` and ``pairwise``; ``bce`` keeps the term that exists.

    Args:
        logits: float [..., N, K]; leading dims are episodes. half and bfloat16 accumulate in float32.
        is_ood: bool [..., N]; True marks an anomalous row.
        margin: the confidence gap aimed at, in [0, 1]; unused by ``bce``.
        temperature: T > 0, a float or a tensor (scalar, or one per episode [...]), differentiable.
        background: an extra logit b in the softmax denominator, likewise; needed by ``confidence="mass"``.
        confidence: ``max``, the largest softmax probability, or ``mass``, one minus the background's.
        form: see above.
        reduction: over episodes: ``mean``, ``sum`` or ``none``.
        backend: ``auto`` or ``reference``.

    Returns:
        A scalar, or [...] for ``reduction="none"``; float32 for half and bfloat16 logits, else the logits' dtype.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape or an unknown value.
    """
    _check_logits(logits, temperature, background, confidence)
    _check_choice("form", form, ("hinge", "pairwise", "bce"))
    _check_choice("reduction", reduction, ("mean", "sum", "none"))
    _check_choice("backend", backend, ("auto", "reference"))
    if is_ood.dtype != torch.bool:
        raise TypeError(f"is_ood must be a bool tensor, got {is_ood.dtype}")
    if is_ood.shape != logits.shape[:-1]:
        raise ValueError(f"is_ood must have the shape of the rows {list(logits.shape[:-1])}, got {list(is_ood.shape)}")
    losses = reference.softmax_margin_loss(logits, is_ood, margin, temperature, background, confidence, form)
    return reference.reduce_episodes(losses, reduction)


def one_class_loss(
    logits: Tensor,
    *,
    temperature: Scalar = 1.0,
    background: Scalar | None = None,
    confidence: Confidence = "max",
    reduction: Reduction = "mean",
) -> Tensor:
    """``mean_N(-log S)`` of normal rows: BCE(S, 1), the inner level of arXiv 2601.19833.

    Args and errors as in `softmax_margin_loss`; logits [..., N, K] are all normal.
    """
    _check_logits(logits, temperature, background, confidence)
    _check_choice("reduction", reduction, ("mean", "sum", "none"))
    log_s, _ = reference.log_confidence(logits, temperature, background, confidence)
    return reference.reduce_episodes(-log_s.mean(dim=-1), reduction)


def softmax_confidence(
    logits: Tensor, *, temperature: Scalar = 1.0, background: Scalar | None = None, confidence: Confidence = "max"
) -> Tensor:
    """The confidence S [..., N] in [0, 1] that a row is normal, of logits [..., N, K].

    Args and errors as in `softmax_margin_loss`.
    """
    _check_logits(logits, temperature, background, confidence)
    log_s, _ = reference.log_confidence(logits, temperature, background, confidence)
    return log_s.exp()


def softmax_log_odds(
    logits: Tensor, *, temperature: Scalar = 1.0, background: Scalar | None = None, confidence: Confidence = "max"
) -> Tensor:
    """log(S / (1 - S)) [..., N]: orders rows as the confidence S does, and still tells them apart where S rounds to 1.

    Args and errors as in `softmax_margin_loss`.
    """
    _check_logits(logits, temperature, background, confidence)
    log_s, log_not_s = reference.log_confidence(logits, temperature, background, confidence)
    return log_s - log_not_s


def linear_softmax_confidence(
    z: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    centers: Tensor | None = None,
    scale: Scalar = 1.0,
    temperature: Scalar = 1.0,
    background: Scalar | None = None,
    confidence: Confidence = "max",
) -> Tensor:
    """The confidence [..., N] of embeddings z [..., N, H] under a linear or a prototype head.

    Args:
        z: float [..., N, H].
        weight: [K, H], with bias [K] or None: the linear head ``ℓ = z Wᵀ + c``.
        bias: see weight.
        centers: [K, H], in place of weight: the prototype head ``ℓ_k = -|z - c_k|² / (2 scale²)``.
        scale: the prototypes' length scale.
        temperature: as in `softmax_margin_loss`.
        background: as in `softmax_margin_loss`.
        confidence: as in `softmax_margin_loss`.

    Raises:
        ValueError: neither or both of weight and centers are given, or a shape does not fit.
    """
    if (weight is None) == (centers is None):
        raise ValueError("give either weight (linear head) or centers (prototype head)")
    if weight is not None:
        logits = torch.nn.functional.linear(z, weight, bias)
    else:
        assert centers is not None
        # |z - c|² expanded, so that a prototype head is a linear head plus a row constant.
        squared = z.square().sum(-1, keepdim=True) - 2 * z @ centers.mT + centers.square().sum(-1)
        logits = -squared / (2 * torch.as_tensor(scale) ** 2)
    return softmax_confidence(logits, temperature=temperature, background=background, confidence=confidence)


def _check_logits(logits: Tensor, temperature: Scalar, background: Scalar | None, confidence: str) -> None:
    _check_choice("confidence", confidence, ("max", "mass"))
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.ndim < 2:
        raise ValueError(f"logits must be [..., N, K], got {list(logits.shape)}")
    if background is None and confidence == "mass":
        raise ValueError("confidence 'mass' is one minus the background's probability: give background=")
    if background is None and logits.shape[-1] == 1:
        raise ValueError("logits have K = 1, whose softmax is always 1: give background= or K >= 2")
    for name, value in (("temperature", temperature), ("background", background)):
        if isinstance(value, Tensor) and value.ndim and value.shape != logits.shape[:-2]:
            episodes = list(logits.shape[:-2])
            raise ValueError(f"{name} must be a scalar or one per episode {episodes}, got {list(value.shape)}")
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
