"""Which backend a call takes, and what the public functions say to bad input."""

import re

import pytest
import torch
from mdml_kernels import (
    explain,
    linear_softmax_confidence,
    one_class_loss,
    softmax_confidence,
    softmax_margin_loss,
)
from mdml_kernels.dispatch import resolve

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
LOGITS, OOD = torch.randn(3, 6, 5), torch.zeros(3, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "triton", "linear", "backend"),
    [
        ("auto", "cpu", F32, "compiler", False, "cpu"),
        ("auto", "cpu", F32, None, False, "cpu"),
        ("auto", "cpu", F64, "interpreter", True, "cpu"),
        ("auto", "cuda", BF16, "compiler", False, "triton"),
        ("auto", "cuda", F64, "compiler", False, "triton"),
        ("auto", "cuda", F64, "compiler", True, "reference"),
        ("auto", "cuda", F32, None, False, "reference"),
        ("auto", "mps", F32, None, False, "reference"),
        ("reference", "cpu", F32, None, False, "reference"),
        ("triton", "cpu", F32, "interpreter", False, "triton"),
    ],
)
def test_resolve(requested, device, dtype, triton, linear, backend):
    assert resolve(requested, device, dtype, triton, linear=linear).backend == backend


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("cpu", "cuda", F32, "compiler"),
            "backend 'cpu' cannot serve .* on 'cuda'.* available: 'triton', 'reference'",
        ),
        (("triton", "cpu", F32, "compiler"), "needs a GPU .*available: 'cpu', 'reference'"),
        (("triton", "cuda", F32, None), "Triton is not installed; available: 'reference'"),
        (("triton", "cuda", F64, "compiler", True), "it has no float64; available: 'reference'"),
        (("cuda", "cpu", F32, None), "backend must be one of 'auto', 'reference', 'cpu', 'triton', got 'cuda'"),
    ],
)
def test_what_cannot_be_served(arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve(*arguments[:4], linear=len(arguments) == 5)


def test_explain():
    assert re.fullmatch(r"cpu: float32 logits on a CPU: .*", explain(LOGITS))
    assert explain(LOGITS, backend="reference") == "reference: asked for"
    assert explain(LOGITS.to("meta")).startswith("reference: plain PyTorch, because the logits are on 'meta'")


BAD = {
    "integer logits": (lambda: one_class_loss(LOGITS.long()), TypeError, "logits must be a floating point .*int64"),
    "no tensor": (lambda: one_class_loss([[1.0, 2.0]]), TypeError, "logits must be a floating point tensor, got list"),
    "one dim": (lambda: one_class_loss(LOGITS[0, 0]), ValueError, r"logits must be \[..., N, K\].*got \[5\]"),
    "no classes": (lambda: one_class_loss(LOGITS[..., :0]), ValueError, r"K >= 1, got \[3, 6, 0\]"),
    "one class": (lambda: one_class_loss(LOGITS[..., :1]), ValueError, "K = 1, whose softmax is always 1"),
    "mass": (lambda: softmax_confidence(LOGITS, confidence="mass"), ValueError, "give background="),
    "confidence": (lambda: softmax_confidence(LOGITS, confidence="min"), ValueError, "confidence must be one of"),
    "integer labels": (lambda: softmax_margin_loss(LOGITS, OOD.long()), TypeError, "is_ood must be a bool .*int64"),
    "labels": (lambda: softmax_margin_loss(LOGITS, OOD[:2]), ValueError, r"is_ood must have .*\[3, 6\], got \[2, 6\]"),
    "form": (lambda: softmax_margin_loss(LOGITS, OOD, form="relu"), ValueError, "form must be one of .*got 'relu'"),
    "reduction": (lambda: one_class_loss(LOGITS, reduction="max"), ValueError, "reduction must be one of"),
    "margin": (lambda: softmax_margin_loss(LOGITS, OOD, margin=2), ValueError, r"margin must be in \[0, 1\].*got 2"),
    "learned margin": (
        lambda: softmax_margin_loss(LOGITS, OOD, margin=torch.tensor(0.5)),
        TypeError,
        "margin must be a float",
    ),
    "temperature": (lambda: one_class_loss(LOGITS, temperature=0.0), ValueError, "temperature must be positive, got 0"),
    "temperature as a word": (
        lambda: one_class_loss(LOGITS, temperature="a"),
        TypeError,
        "temperature must be a number or a tensor, got 'a'",
    ),
    "no temperature": (
        lambda: softmax_margin_loss(LOGITS, OOD, temperature=None),
        TypeError,
        "temperature must be a number or a tensor, got None",
    ),
    "background as a word": (
        lambda: one_class_loss(LOGITS, background="a"),
        TypeError,
        "background must be a number or a tensor, got 'a'",
    ),
    "margin as a word": (
        lambda: softmax_margin_loss(LOGITS, OOD, margin="a"),
        TypeError,
        "margin must be a number, got 'a'",
    ),
    "NaN temperature": (lambda: one_class_loss(LOGITS, temperature=float("nan")), ValueError, "must be positive"),
    "temperature's shape": (
        lambda: one_class_loss(LOGITS, temperature=torch.ones(2)),
        ValueError,
        r"temperature must be a scalar or one per episode \[3\], got \[2\]",
    ),
    "background's dtype": (
        lambda: one_class_loss(LOGITS, background=torch.tensor(1)),
        TypeError,
        "background must be a floating point tensor, got torch.int64",
    ),
    "devices": (
        lambda: softmax_margin_loss(LOGITS, OOD.to("meta")),
        ValueError,
        "is_ood is on meta, but logits on cpu",
    ),
    "validate logits": (
        lambda: softmax_margin_loss(LOGITS / 0, OOD, validate=True),
        ValueError,
        "logits must be finite, got 90 of 90 values",
    ),
    "validate temperature": (
        lambda: softmax_margin_loss(LOGITS, OOD, temperature=torch.tensor(-1.0), validate=True),
        ValueError,
        "temperature must be positive, got a smallest value of -1.0",
    ),
    "validate background": (
        lambda: softmax_margin_loss(LOGITS, OOD, background=float("nan"), validate=True),
        ValueError,
        "background must be finite, got nan",
    ),
    "validate confidence": (
        lambda: softmax_confidence(LOGITS / 0, validate=True),
        ValueError,
        "logits must be finite, got 90 of 90 values",
    ),
    "validate one class": (
        lambda: one_class_loss(LOGITS, temperature=torch.tensor(-1.0), validate=True),
        ValueError,
        "temperature must be positive, got a smallest value of -1.0",
    ),
    "validate head": (
        lambda: linear_softmax_confidence(LOGITS, torch.ones(4, 5) / 0, validate=True),
        ValueError,
        "weight must be finite, got 20 of 20 values",
    ),
    "validate scale": (
        lambda: linear_softmax_confidence(LOGITS, centers=torch.ones(4, 5), scale=torch.tensor(0.0), validate=True),
        ValueError,
        "scale must be positive, got a smallest value of 0.0",
    ),
    "no head": (lambda: linear_softmax_confidence(LOGITS), ValueError, "give either weight .* or centers"),
    "head": (lambda: linear_softmax_confidence(LOGITS, torch.ones(4, 3)), ValueError, r"weight must be \[K, 5\]"),
    "bias": (
        lambda: linear_softmax_confidence(LOGITS, torch.ones(4, 5), torch.ones(5)),
        ValueError,
        r"bias must be \[4\]",
    ),
    "bias of centers": (
        lambda: linear_softmax_confidence(LOGITS, bias=torch.ones(4), centers=torch.ones(4, 5)),
        ValueError,
        "bias belongs to weight",
    ),
    "head's dtype": (
        lambda: linear_softmax_confidence(LOGITS, torch.ones(4, 5).double()),
        TypeError,
        "weight must have the dtype of z",
    ),
    "scale": (
        lambda: linear_softmax_confidence(LOGITS, centers=LOGITS[0], scale=-1.0),
        ValueError,
        "scale must be pos",
    ),
    "scale's shape": (
        lambda: linear_softmax_confidence(LOGITS, centers=LOGITS[0], scale=torch.ones(3)),
        ValueError,
        "scale must be a scalar",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_without_validate_values_are_not_read():
    assert softmax_margin_loss(LOGITS / 0, OOD).isnan()
    assert softmax_margin_loss(LOGITS, OOD, validate=True) == softmax_margin_loss(LOGITS, OOD)
