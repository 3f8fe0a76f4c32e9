"""The row kernels in Triton's interpreter against the float64 reference."""

import pytest
import torch
from mdml_kernels import launch, parity, reference, triton_rows

CONFIDENCES = [("max", False), ("max", True), ("mass", True)]
NAMES = ("odds", "logits", "1/T", "dd logits", "dd 1/T", "along", "b", "dd b")


def make(shape, dtype, with_background, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    episodes, rows, _ = shape
    small = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "logits": randn(*shape) * spread,
        "inv_temperature": randn(episodes).to(small).exp(),
        "background": randn(episodes).to(small) if with_background else None,
        "grad": randn(episodes, rows).to(small),
        "v_logits": randn(*shape),
        "v_inv_temperature": randn(episodes).to(small),
        "v_background": randn(episodes).to(small) if with_background else None,
    }


def by_reference(case, confidence, dtype):
    """Values, gradients and second-order gradients from autograd through the reference, in the given dtype."""

    def leaf(tensor, to):
        return tensor.detach().to(to).requires_grad_()

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [leaf(case["logits"], dtype), leaf(case["inv_temperature"], wide)]
    if case["background"] is not None:
        inputs.append(leaf(case["background"], wide))
    log_s, log_not_s = reference.log_confidence(inputs[0], 1 / inputs[1], (*inputs, None)[2], confidence)
    odds, weight = log_s - log_not_s, leaf(case["grad"], wide)
    grads = torch.autograd.grad(odds, inputs, weight, create_graph=True)
    tangents = [case["v_logits"].to(dtype), case["v_inv_temperature"].to(wide)]
    if case["background"] is not None:
        tangents.append(case["v_background"].to(wide))
    second = torch.autograd.grad(grads, [*inputs, weight], tangents)
    values = [odds, grads[0], grads[1], second[0], second[1], second[-1]]
    if case["background"] is not None:
        values += [grads[2], second[2]]
    return [value.detach() for value in values]


def by_kernels(case, confidence, fenced, strided=False):
    logits = fenced(case["logits"], strided=strided)
    v_logits = fenced(case["v_logits"], strided=strided)
    small = {
        name: fenced(value) for name, value in case.items() if name not in ("logits", "v_logits") and value is not None
    }
    background = small.get("background")
    odds, *saved = triton_rows.odds_forward(logits, small["inv_temperature"], background, confidence)
    inputs = (logits, small["inv_temperature"], background, confidence, *saved, small["grad"])
    first = triton_rows.odds_backward(*inputs)
    second = triton_rows.odds_double_backward(*inputs, v_logits, small["v_inv_temperature"], small.get("v_background"))
    values = [odds, first[0], first[1].sum(1), second[0], second[1].sum(1), second[3]]
    if background is not None:
        values += [first[2].sum(1), second[2].sum(1)]
    return values


def relative_error(value, truth):
    return ((value.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30)).item()


def by_order(values):
    """As `parity` takes them: value, first and second derivatives, those in the logits first; and J v."""
    odds, logits, tau, second_logits, second_tau, along, *background = values
    return [[odds], [logits, tau, *background[:1]], [second_logits, second_tau, *background[1:]], [along]]


def assert_as_good_as_eager(cases, confidence, fenced, slack=1e-6):
    """The worst relative error of each order over all cases is at most that of eager in the same dtype, plus slack."""
    ours, eager = [], []
    for case in cases:
        truth = by_order(by_reference(case, confidence, torch.float64))
        plain, value = by_reference(case, confidence, case["logits"].dtype), by_kernels(case, confidence, fenced)
        assert [tensor.dtype for tensor in value] == [tensor.dtype for tensor in plain]
        ours.append(parity._errors(by_order(value), truth))
        eager.append(parity._errors(by_order(plain), truth))
    worst = torch.tensor(ours).amax(0), torch.tensor(eager).amax(0)  # amax keeps a NaN, and then nothing is at most it
    assert (worst[0] <= worst[1] + slack).all(), worst


@pytest.mark.parametrize(("confidence", "with_background"), CONFIDENCES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 5, 3), (3, 7, 16), (2, 3, 130)])
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_float64(shape, confidence, with_background, strided, fenced):
    case = make(shape, torch.float64, with_background)
    ours = by_kernels(case, confidence, fenced, strided)
    for name, value, exact in zip(NAMES, ours, by_reference(case, confidence, torch.float64), strict=False):
        assert relative_error(value, exact) < 1e-12, name


@pytest.mark.parametrize(("confidence", "with_background"), CONFIDENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 40, 10), (2, 6, 512), (1, 2, 1000)])
def test_error_is_that_of_eager(shape, dtype, confidence, with_background, fenced):
    # In half precision both round the same number; but the interpreter cuts bfloat16 off where a GPU rounds it.
    slack = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 2**-7}[dtype]
    seeds = range(5 if dtype == torch.float32 else 1)
    assert_as_good_as_eager([make(shape, dtype, with_background, seed) for seed in seeds], confidence, fenced, slack)


@pytest.mark.parametrize(("confidence", "with_background"), CONFIDENCES)
@pytest.mark.parametrize("n_cols", [4097, 65536])
def test_rows_of_many_tiles(n_cols, confidence, with_background, fenced):
    seeds = range(5 if n_cols < 10_000 else 2)
    cases = [make((1, 2, n_cols), torch.float32, with_background, seed) for seed in seeds]
    assert_as_good_as_eager(cases, confidence, fenced)


@pytest.mark.parametrize("confidence", ["max", "mass"])
def test_one_logit_and_a_background(confidence, fenced):
    assert_as_good_as_eager([make((3, 4, 1), torch.float32, True, seed) for seed in range(3)], confidence, fenced)


def test_transposed_logits(fenced):
    case = make((2, 6, 5), torch.float32, True)
    expected = by_kernels(case, "max", fenced)
    transposed = {**case, "logits": case["logits"].mT.contiguous().mT, "v_logits": case["v_logits"].mT.contiguous().mT}
    for value, same in zip(by_kernels(transposed, "max", lambda tensor, **_: tensor), expected, strict=True):
        assert torch.equal(value, same)


def test_missing_tangents_are_zero():
    case = make((2, 6, 5), torch.float64, True)
    ours = (case["logits"], case["inv_temperature"], case["background"], "max")
    _, *saved = triton_rows.odds_forward(*ours)
    names = ("v_logits", "v_inv_temperature", "v_background")
    for missing in names:
        absent = [None if name == missing else case[name] for name in names]
        zero = [torch.zeros_like(case[name]) if name == missing else case[name] for name in names]
        values = triton_rows.odds_double_backward(*ours, *saved, case["grad"], *absent)
        expected = triton_rows.odds_double_backward(*ours, *saved, case["grad"], *zero)
        assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))


@pytest.mark.parametrize("gap", [50.0, 300.0])
def test_nothing_saturates(gap):
    """The log-odds of a row whose S rounds to 1 is the gap between its two logits; so for S that rounds to 0."""
    logits = torch.tensor([[[gap, 0.0], [0.0, gap]]])
    odds, _, argmax = triton_rows.odds_forward(logits, torch.ones(1), None, "max")
    assert odds.tolist() == [[gap, gap]]
    assert argmax.tolist() == [[0, 1]]
    odds, _, _ = triton_rows.odds_forward(logits, torch.ones(1), torch.tensor([2 * gap]), "mass")
    assert odds.tolist() == [[-gap, -gap]]


@pytest.mark.parametrize("n_cols", [6, 5000])
def test_first_of_tied_maxima(n_cols):
    """Across tiles too: the maximum stands at 2, at 4, and again at the end of the row."""
    logits = torch.zeros(1, 1, n_cols)
    logits[..., 2] = logits[..., 4] = logits[..., -1] = 3.0
    ones = torch.ones(1)
    _, *saved = triton_rows.odds_forward(logits, ones, None, "max")
    assert saved[1].item() == 2
    grad, _, _ = triton_rows.odds_backward(logits, ones, None, "max", *saved, torch.ones(1, 1))
    assert grad[0, 0, 2] == 1
    assert grad[0, 0, 4] == grad[0, 0, -1] < 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("confidence", ["max", "mass"])
@pytest.mark.parametrize("n_cols", [3, 5000])
@pytest.mark.parametrize("all_of_it", [False, True])
def test_nan_stays_in_its_row_and_fills_it(confidence, n_cols, bad, all_of_it):
    logits = torch.randn(1, 3, n_cols, generator=torch.Generator().manual_seed(0))
    logits[0, 1, slice(None) if all_of_it else -1] = bad
    ones, background = torch.ones(1), torch.zeros(1)
    odds, *saved = triton_rows.odds_forward(logits, ones, background, confidence)
    inputs = (logits, ones, background, confidence, *saved, torch.ones(1, 3))
    grads = triton_rows.odds_backward(*inputs)
    second = triton_rows.odds_double_backward(*inputs, torch.ones_like(logits), None, None)
    for value in (odds, *grads, *second):
        assert value[0, 1].isnan().all()
        assert not value[0, [0, 2]].isnan().any()


@pytest.mark.parametrize("row", [[torch.nan, 5.0], [5.0, torch.nan], [torch.nan, -torch.inf], [-torch.inf] * 2])
def test_nan_beside_one_logit_or_none(row):
    odds, *_ = triton_rows.odds_forward(torch.tensor([[row]]), torch.ones(1), None, "max")
    assert odds.isnan().all()


def test_a_row_of_forbidden_classes_beside_a_background_moves_nothing():
    logits, ones = torch.tensor([[[-torch.inf] * 3, [1.0, 0.0, 2.0]]]), torch.ones(1)
    odds, *saved = triton_rows.odds_forward(logits, ones, torch.zeros(1), "max")
    assert odds[0, 0] == -torch.inf
    for slope in (0.0, 1.0):
        grad = torch.full((1, 2), slope)
        by_logits, by_scale, by_background = triton_rows.odds_backward(
            logits, ones, torch.zeros(1), "max", *saved, grad
        )
        assert by_scale[0, 0] == 0
        assert by_background[0, 0] == -slope
        assert (by_logits[0, 0, 1:] == 0).all()


@pytest.mark.parametrize(("confidence", "with_background"), CONFIDENCES)
def test_what_all_logits_share_costs_no_digits(confidence, with_background, fenced):
    """Far from zero, as a prototype's are: eager rounds x / T there, and what differs is lost."""
    case = make((2, 6, 50), torch.float32, with_background)
    case["logits"] = (case["logits"] + 1000).round(decimals=2)
    if with_background:
        case["background"] = case["background"] + 1000 * case["inv_temperature"]
    truth = by_order(by_reference(case, confidence, torch.float64))
    ours = parity._errors(by_order(by_kernels(case, confidence, fenced)), truth)
    eager = parity._errors(by_order(by_reference(case, confidence, torch.float32)), truth)
    assert ours[0] <= eager[0] + 1e-6
    assert all(our <= 0.2 * other for our, other in zip(ours[1:], eager[1:], strict=True)), (ours, eager)


def test_one_logit_at_an_infinite_temperature():
    odds, *_ = triton_rows.odds_forward(torch.tensor([[[3.0]]]), torch.zeros(1), torch.tensor([0.5]), "max")
    assert odds.item() == pytest.approx(-0.5)


@pytest.mark.parametrize("n_cols", [3, 80, 130, 600])
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_the_tiles_of_a_gpu(n_cols, arch, fenced, monkeypatch):
    config = launch.rows_config
    monkeypatch.setattr(triton_rows, "rows_config", lambda n, dtype, _, held: config(n, dtype, arch, held))
    assert_as_good_as_eager([make((2, 3, n_cols), torch.float32, True)], "max", fenced)


def test_the_only_logit_there_is_certain():
    logits, ones = torch.tensor([[[1.0, -torch.inf, -torch.inf]]]), torch.ones(1)
    odds, *saved = triton_rows.odds_forward(logits, ones, None, "max")
    assert odds.item() == torch.inf
    grad, moved, _ = triton_rows.odds_backward(logits, ones, None, "max", *saved, ones[None])
    assert grad.tolist() == [[[1.0, 0.0, 0.0]]]
    assert moved.item() == 1.0


def test_a_negative_temperature_is_no_number():
    """It would turn the order of the logits round, by which the kernels find the largest before they divide."""
    odds, *saved = triton_rows.odds_forward(torch.randn(1, 2, 3), -torch.ones(1), None, "max")
    assert odds.isnan().all()
    grads = triton_rows.odds_backward(torch.randn(1, 2, 3), -torch.ones(1), None, "max", *saved, torch.ones(1, 2))
    assert all(grad.isnan().all() for grad in grads[:2])


def test_a_masked_out_logit_costs_nothing(fenced):
    """-inf, the usual way to forbid a class: a logit without weight, not a NaN."""
    case = make((1, 4, 5), torch.float32, False)
    more = {**case, "logits": torch.cat([case["logits"], torch.full((1, 4, 2), -torch.inf)], dim=-1)}
    more["v_logits"] = torch.cat([case["v_logits"], torch.ones(1, 4, 2)], dim=-1)
    for value, expected in zip(by_kernels(more, "max", fenced), by_kernels(case, "max", fenced), strict=True):
        if value.ndim == 3:
            assert (value[..., 5:] == 0).all()
        assert torch.allclose(value[..., :5] if value.ndim == 3 else value, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("confidence", ["max", "mass"])
@pytest.mark.parametrize("n_cols", [512, 20000])
def test_traffic(n_cols, confidence, dtype, traffic):
    """At most 1.05 times the least: logits once forward; logits once and their gradient once backward.

    And backward the largest of each row, which was just read and is at hand.
    """
    logits = torch.randn(1, 4, n_cols).to(dtype)
    ones, background = torch.ones(1), torch.zeros(1)
    _, *saved = triton_rows.odds_forward(logits, ones, background, confidence)
    one_way = logits.numel() * logits.element_size()
    assert traffic.loaded(logits) == one_way
    assert traffic.loaded() + traffic.stored() <= 1.05 * one_way
    traffic.loads.clear()
    traffic.stores.clear()
    grad_logits, _, _ = triton_rows.odds_backward(logits, ones, background, confidence, *saved, torch.ones(1, 4))
    assert traffic.loaded(logits) == one_way + (4 * logits.element_size() if confidence == "max" else 0)
    assert traffic.stored(grad_logits) == one_way
    assert traffic.loaded() + traffic.stored() <= 1.05 * 2 * one_way


def test_no_rows():
    logits = torch.zeros(2, 0, 3)
    odds, *saved = triton_rows.odds_forward(logits, torch.ones(2), None, "max")
    grads = triton_rows.odds_backward(logits, torch.ones(2), None, "max", *saved, odds)
    assert odds.shape == (2, 0)
    assert grads[0].shape == (2, 0, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.zeros(3, 2), torch.ones(1), None, "max"), ValueError, "logits must be"),
        ((torch.zeros(1, 3, 2, dtype=torch.int32), torch.ones(1), None, "max"), TypeError, "logits must be one of"),
        ((torch.zeros(2, 3, 2), torch.ones(1), None, "max"), ValueError, "inv_temperature"),
        ((torch.zeros(2, 3, 2), torch.ones(2), torch.zeros(3), "max"), ValueError, "background"),
        ((torch.zeros(2, 3, 2), torch.ones(2), None, "mass"), ValueError, "needs a background"),
    ],
)
def test_bad_input_is_named(arguments, error, words):
    with pytest.raises(error, match=words):
        triton_rows.odds_forward(*arguments)
