"""From the public arguments to an operator of the chosen backend: one dim of episodes, 1/T and background tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mdml_kernels import autograd, cpu_loss, losses, rows
from mdml_kernels.autograd import RowOp
from mdml_kernels.linear import CpuLinearLogOdds, TritonLinearLogOdds
from mdml_kernels.native import loader as native
from mdml_kernels.native.loss import NativeMarginLoss
from mdml_kernels.reference import Confidence, Form, Scalar, accumulation_dtype
from mdml_kernels.rows import CpuLogOdds


def of_logits(
    logits: Tensor, temperature: Scalar, background: Scalar | None, confidence: Confidence, backend: str
) -> Tensor:
    """The log-odds [..., N] of logits [..., N, K]."""
    tau = _per_episode(_inverse(temperature, logits), logits)
    log_background = None if background is None else _per_episode(background, logits)
    return _unflat(_apply(rows.operator(backend, confidence), _flat(logits, 2), tau, log_background), logits.shape[:-1])


def margin_loss(
    logits: Tensor,
    is_ood: Tensor,
    margin: float,
    temperature: Scalar,
    background: Scalar | None,
    confidence: Confidence,
    form: Form,
    backend: str,
    ahead: float = 1.0,
) -> Tensor:
    """The loss of each episode [...], by way of the odds or by what is faster.

    ahead: what the losses will be multiplied by, as far as is known: a gradient for that costs least.
    """
    op: RowOp
    if backend == "cpu" and confidence == "max" and form != "bce" and not torch.compiler.is_compiling():
        keeps = logits.requires_grad and torch.is_grad_enabled()
        if native.serves(logits):
            op = NativeMarginLoss(margin, form, ahead if keeps else None)
        elif cpu_loss.is_small(logits):
            s = cpu_loss.textbook_confidence(logits, temperature, background)
            return losses.of_confidence(s, is_ood, margin, form)
        else:
            unscaled = not isinstance(temperature, Tensor) and temperature == 1
            op = cpu_loss.CpuMarginLoss(margin, form, unscaled, keeps)
    elif backend == "triton" and form == "hinge" and not torch.compiler.is_compiling():
        from mdml_kernels.triton_hinge import TritonHingeLoss  # only here: Triton may not be installed

        op = TritonHingeLoss(margin, confidence)
    else:
        return losses.of_odds(of_logits(logits, temperature, background, confidence, backend), is_ood, margin, form)
    tau = _per_episode(_inverse(temperature, logits), logits)
    log_background = None if background is None else _per_episode(background, logits)
    loss = autograd.apply(op, _flat(logits, 2), tau, log_background, _flat(is_ood, 1))
    return _unflat(loss, logits.shape[:-2])


def of_head(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    centers: Tensor | None,
    scale: Scalar,
    temperature: Scalar,
    background: Scalar | None,
    confidence: Confidence,
    backend: str,
) -> Tensor:
    """The log-odds [..., N] of embeddings z [..., N, H] under a linear or a prototype head.

    A prototype head is a linear one, with ``1/T' = 1/(T scale²)``, weight c, bias ``-|c|²/2``, up to the row constant
    ``-|z|²/(2 T scale²)``, which only the background sees: it moves there with the opposite sign.
    """
    shape = z.shape[:-1]
    tau = _per_episode(_inverse(temperature, z), z).view(*shape[:-1], 1)
    log_background = None if background is None else _per_episode(background, z).view(*shape[:-1], 1)
    if centers is not None:
        tau = tau / torch.as_tensor(scale, dtype=tau.dtype, device=tau.device) ** 2
        weight, bias = centers, centers.to(tau.dtype).square().sum(-1) / -2
        if log_background is not None:
            log_background = log_background + tau * z.to(tau.dtype).square().sum(-1) / 2
    assert weight is not None
    if torch.is_autocast_enabled(z.device.type):
        z, weight = (value.to(torch.get_autocast_dtype(z.device.type)) for value in (z, weight))
    odds = _apply(
        CpuLinearLogOdds(confidence) if backend == "cpu" else TritonLinearLogOdds(confidence),
        z.reshape(1, math.prod(shape), z.shape[-1]),
        weight.unsqueeze(0),
        None if bias is None else bias.unsqueeze(0),
        tau.expand(shape).reshape(1, math.prod(shape)),
        None if log_background is None else log_background.expand(shape).reshape(1, math.prod(shape)),
    )
    return odds.view(shape)


def _apply(op: CpuLogOdds | CpuLinearLogOdds, *inputs: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        from mdml_kernels import compiled  # registers custom ops: only where they are needed

        return compiled.apply(op, *inputs)
    return autograd.apply(op, *inputs)


def _flat(rows: Tensor, n_last: int) -> Tensor:
    """[..., *last] as [E, *last]; where it is so already, without the node that a view is to autograd."""
    if rows.ndim == n_last + 1:
        return rows
    return rows.reshape(math.prod(rows.shape[:-n_last]), *rows.shape[-n_last:])


def _unflat(values: Tensor, shape: torch.Size) -> Tensor:
    return values if values.shape == shape else values.view(shape)


def _per_episode(value: Scalar, rows: Tensor) -> Tensor:
    """A scalar, or one value per episode [...], as [E] in the dtype that rows [..., N, K] accumulate in."""
    episodes, dtype = rows.shape[:-2], accumulation_dtype(rows)
    if not isinstance(value, Tensor):
        return torch.full((math.prod(episodes),), value, dtype=dtype, device=rows.device)
    return value.to(dtype).expand(episodes).reshape(math.prod(episodes))


def _inverse(temperature: Scalar, rows: Tensor) -> Scalar:
    """1/T, taken in the accumulation dtype: a half tensor would round it."""
    return 1 / (temperature.to(accumulation_dtype(rows)) if isinstance(temperature, Tensor) else temperature)
