"""The public functions: they check their arguments, choose the backend, and reduce over episodes."""

from __future__ import annotations

from torch import Tensor

from mdml_kernels import checks, dispatch, losses, odds, reference
from mdml_kernels.dispatch import Backend
from mdml_kernels.native import loader
from mdml_kernels.reference import Confidence, Form, Reduction, Scalar


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
    validate: bool = False,
) -> Tensor:
    """Widen the softmax confidence margin between normal (ID) and anomalous (OOD) rows.

    With S the confidence of a row (`softmax_confidence`), the loss of an episode is

    - ``hinge``: ``relu(margin - (mean_ID S - mean_OOD S))``
    - ``pairwise``: ``mean_{i in ID, j in OOD} relu(margin - (S_i - S_j))``, in O(N log N)
    - ``bce``: ``mean_ID(-log S) + mean_OOD(-log(1 - S))``

    Roy, Mili, Boker, arXiv 2601.19833 (outer level). An episode without ID or without OOD rows gives 0 for
    ``hinge`` and ``pairwise``; ``bce`` keeps the term that exists.

    Differentiable any number of times in logits, temperature and background, in reverse and in forward mode, under
    `torch.func` transforms, `torch.autocast` and `torch.compile`.

    Args:
        logits: float [..., N, K]; leading dims are episodes. half and bfloat16 accumulate in float32.
        is_ood: bool [..., N]; True marks an anomalous row.
        margin: the confidence gap aimed at, in [0, 1]; unused by ``bce``.
        temperature: T > 0, a float or a tensor (scalar, or one per episode [...]), differentiable.
        background: an extra logit b in the softmax denominator, likewise; needed by ``confidence="mass"``.
        confidence: ``max``, the largest softmax probability, or ``mass``, one minus the background's.
        form: see above.
        reduction: over episodes: ``mean``, ``sum`` or ``none``.
        backend: ``auto``, ``reference``, ``cpu`` or ``triton``; `explain` says which one ``auto`` is.
        validate: also check the tensors' values, which waits for the device: NaN, infinities, temperature > 0.

    Returns:
        A scalar, or [...] for ``reduction="none"``; float32 for half and bfloat16 logits, else the logits' dtype.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape, device or value, or the backend cannot serve the call.
    """
    checks.logits(logits, temperature, background, confidence)
    checks.labels(is_ood, logits)
    checks.form_of_loss(form)
    checks.reduction_of_episodes(reduction)
    checks.margin(margin)
    chosen = _chosen(logits, temperature, background, backend, validate)
    if chosen == "reference":
        value = reference.softmax_margin_loss(logits, is_ood, margin, temperature, background, confidence, form)
    else:
        ahead = 1 / max(1, logits.shape[:-2].numel()) if reduction == "mean" else 1.0
        value = odds.margin_loss(logits, is_ood, margin, temperature, background, confidence, form, chosen, ahead)
    return reference.reduce_episodes(value, reduction)


def one_class_loss(
    logits: Tensor,
    *,
    temperature: Scalar = 1.0,
    background: Scalar | None = None,
    confidence: Confidence = "max",
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    validate: bool = False,
) -> Tensor:
    """``mean_N(-log S)`` of normal rows: BCE(S, 1), the inner level of arXiv 2601.19833.

    Args and errors as in `softmax_margin_loss`; logits [..., N, K] are all normal.
    """
    checks.reduction_of_episodes(reduction)
    log_s = _log_s(logits, temperature, background, confidence, backend, validate)
    return reference.reduce_episodes(-log_s.mean(dim=-1), reduction)


def softmax_confidence(
    logits: Tensor,
    *,
    temperature: Scalar = 1.0,
    background: Scalar | None = None,
    confidence: Confidence = "max",
    backend: Backend = "auto",
    validate: bool = False,
) -> Tensor:
    """The confidence S [..., N] in [0, 1] that a row is normal, of logits [..., N, K].

    Args and errors as in `softmax_margin_loss`.
    """
    return _log_s(logits, temperature, background, confidence, backend, validate).exp()


def softmax_log_odds(
    logits: Tensor,
    *,
    temperature: Scalar = 1.0,
    background: Scalar | None = None,
    confidence: Confidence = "max",
    backend: Backend = "auto",
    validate: bool = False,
) -> Tensor:
    """log(S / (1 - S)) [..., N]: orders rows as the confidence S does, and still tells them apart where S rounds to 1.

    Args and errors as in `softmax_margin_loss`.
    """
    checks.logits(logits, temperature, background, confidence)
    chosen = _chosen(logits, temperature, background, backend, validate)
    if chosen == "reference":
        log_s, log_not_s = reference.log_confidence(logits, temperature, background, confidence)
        return log_s - log_not_s
    return odds.of_logits(logits, temperature, background, confidence, chosen)


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
    backend: Backend = "auto",
    validate: bool = False,
) -> Tensor:
    """The confidence [..., N] of embeddings z [..., N, H] under a linear or a prototype head.

    But in the reference the logits [..., N, K] are never in memory, neither forward nor backward nor in the second
    derivative: they are made chunk by chunk, and once more where a derivative asks. (The third derivative holds them.)
    Autocast is followed as `torch.nn.functional.linear` follows it, save that the logits are not rounded.

    Args:
        z: float [..., N, H].
        weight: [K, H], with bias [K] or None: the linear head ``ℓ = z Wᵀ + c``.
        bias: see weight.
        centers: [K, H], in place of weight: the prototype head ``ℓ_k = -|z - c_k|² / (2 scale²)``.
        scale: the prototypes' length scale, a float or a scalar tensor, differentiable.
        temperature: as in `softmax_margin_loss`.
        background: as in `softmax_margin_loss`.
        confidence: as in `softmax_margin_loss`.
        backend: as in `softmax_margin_loss`.
        validate: also check the tensors' values, which waits for the device.

    Raises:
        ValueError: neither or both of weight and centers are given, a shape does not fit, or as `softmax_margin_loss`.
        TypeError: a dtype does not fit.
    """
    checks.head(z, weight, bias, centers, scale, temperature, background, confidence)
    chosen = dispatch.choose(backend, z, linear=True).backend
    if validate:
        head = {"weight": weight, "bias": bias, "centers": centers, "scale": scale}
        checks.values(z=z, **head, temperature=temperature, background=background)
    if chosen == "reference":
        logits = reference.head_logits(z, weight, bias, centers, scale)
        log_s, _ = reference.log_confidence(logits, temperature, background, confidence)
        return log_s.exp()
    rows = odds.of_head(z, weight, bias, centers, scale, temperature, background, confidence, chosen)
    return losses.log_sigmoid(rows).exp()


def explain(logits: Tensor, *, linear: bool = False, backend: Backend = "auto") -> str:
    """One line: the backend that a call with these logits takes, and why.

    Args:
        logits: as the call takes them; with linear, the embeddings z.
        linear: whether the call is `linear_softmax_confidence`.
        backend: as the call has it.

    Raises:
        ValueError: the backend cannot serve the call; the message names those that can.
    """
    chosen = dispatch.choose(backend, logits, linear=linear, native=loader.serves(logits))
    return f"{chosen.backend}: {chosen.reason}"


def _chosen(logits: Tensor, temperature: Scalar, background: Scalar | None, backend: Backend, validate: bool) -> str:
    """The backend of a call with these logits; their values are looked at where that is asked for."""
    chosen = dispatch.choose(backend, logits).backend
    if validate:
        checks.values(logits=logits, temperature=temperature, background=background)
    return chosen


def _log_s(
    logits: Tensor,
    temperature: Scalar,
    background: Scalar | None,
    confidence: Confidence,
    backend: Backend,
    validate: bool,
) -> Tensor:
    checks.logits(logits, temperature, background, confidence)
    chosen = _chosen(logits, temperature, background, backend, validate)
    if chosen == "reference":
        return reference.log_confidence(logits, temperature, background, confidence)[0]
    return losses.log_sigmoid(odds.of_logits(logits, temperature, background, confidence, chosen))
