"""The loss as a module: its settings, and where asked a temperature and a background that are learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mdml_kernels import checks, functional
from mdml_kernels.dispatch import Backend
from mdml_kernels.reference import Confidence, Form, Reduction


class SoftmaxMarginLoss(nn.Module):
    """`softmax_margin_loss` and its companions with one set of settings.

    Args:
        margin: the confidence gap aimed at.
        temperature: T > 0; with learn_temperature its initial value.
        background: the background logit, or None; with learn_background its initial value.
        confidence: ``max`` or ``mass``.
        form: ``hinge``, ``pairwise`` or ``bce``.
        reduction: over episodes: ``mean``, ``sum`` or ``none``.
        learn_temperature: make log T a parameter (``log_temperature``).
        learn_background: make the background a parameter (``background``).
        backend: ``auto``, ``reference``, ``cpu`` or ``triton``, as in `softmax_margin_loss`.

    Example:
        >>> loss = SoftmaxMarginLoss(margin=0.5)
        >>> value = loss(torch.randn(8, 32, 10), torch.arange(32).expand(8, 32) > 24)
    """

    def __init__(
        self,
        *,
        margin: float = 0.5,
        temperature: float = 1.0,
        background: float | None = None,
        confidence: Confidence = "max",
        form: Form = "hinge",
        reduction: Reduction = "mean",
        learn_temperature: bool = False,
        learn_background: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if learn_background and background is None:
            raise ValueError("learn_background needs a value to start from: give background")
        checks.settings(margin, temperature, background, confidence, form, reduction, backend)
        self.margin = margin
        self.background: float | nn.Parameter | None = background
        if learn_background and background is not None:
            self.background = nn.Parameter(torch.tensor(float(background)))
        self.confidence: Confidence = confidence
        self.form: Form = form
        self.reduction: Reduction = reduction
        self.backend: Backend = backend
        self.fixed_temperature = temperature
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature))) if learn_temperature else None

    @property
    def temperature(self) -> float | Tensor:
        """T, a float, or a tensor that carries the gradient to ``log_temperature``."""
        return self.fixed_temperature if self.log_temperature is None else self.log_temperature.exp()

    def forward(self, logits: Tensor, is_ood: Tensor) -> Tensor:
        """The margin loss of logits [..., N, K] and is_ood bool [..., N]."""
        return functional.softmax_margin_loss(
            logits,
            is_ood,
            margin=self.margin,
            temperature=self.temperature,
            background=self.background,
            confidence=self.confidence,
            form=self.form,
            reduction=self.reduction,
            backend=self.backend,
        )

    def one_class(self, logits: Tensor) -> Tensor:
        """`one_class_loss` of the same settings: the inner loop's loss on normal rows [..., N, K]."""
        return functional.one_class_loss(
            logits,
            temperature=self.temperature,
            background=self.background,
            confidence=self.confidence,
            reduction=self.reduction,
            backend=self.backend,
        )

    def log_odds(self, logits: Tensor) -> Tensor:
        """`softmax_log_odds` of the same settings: a score [..., N], higher for more normal rows."""
        return functional.softmax_log_odds(
            logits,
            temperature=self.temperature,
            background=self.background,
            confidence=self.confidence,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The settings, for repr(); of what is learned that it is."""
        shown = {
            "margin": self.margin,
            "temperature": self.fixed_temperature if self.log_temperature is None else "learned",
            "background": "learned" if isinstance(self.background, nn.Parameter) else self.background,
            **{name: repr(getattr(self, name)) for name in ("confidence", "form", "reduction", "backend")},
        }
        return ", ".join(f"{name}={value}" for name, value in shown.items())
