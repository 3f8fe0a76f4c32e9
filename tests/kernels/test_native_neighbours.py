"""The nearest of many references by the compiled kernels, against all distances in float64."""

import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mdml_kernels.native import loader, neighbours
from mdml_kernels.native.neighbours import NeighbourSearch

WIDTHS = st.integers(1, 40)


def clusters(n, d, seed=0):
    """Rows around few centres, in few dimensions and then in many."""
    generator = torch.Generator().manual_seed(seed)
    centres = 5 * torch.randn(20, 4, generator=generator)
    inner = centres[torch.randint(20, (n,), generator=generator)] + 0.3 * torch.randn(n, 4, generator=generator)
    mixed = inner @ torch.randn(4, d, generator=generator)
    return mixed + 0.1 * torch.randn(n, d, generator=generator)


def exact_distances(x, references, k, families=None, others=None):
    distances = torch.cdist(x.double(), references.double(), compute_mode="donot_use_mm_for_euclid_dist")
    if families is not None:
        distances = distances.masked_fill(families[:, None] == others, torch.inf)
    nearest = distances.topk(min(k, len(references)), largest=False).values
    return nearest.where(nearest.isfinite(), torch.nan).nanmean(-1)


@settings(deadline=None, max_examples=60)
@given(
    n_rows=st.integers(1, 40),
    n=st.sampled_from([1, 2, 7, 63, 64, 65, 511, 512, 513, 1100]),
    d=WIDTHS,
    k=st.integers(1, 6),
    grouped=st.booleans(),
    data=st.data(),
)
def test_neighbour_distances(n_rows, n, d, k, grouped, data):
    """On a grid many distances are equal, and some rows are references themselves."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x, references = (torch.randint(-3, 4, (m, d), generator=generator) / 2 for m in (n_rows, n))
    families, others = (torch.randint(0, 3, (m,), generator=generator) for m in (n_rows, n))
    codes = (families, others) if grouped else ()
    found = NeighbourSearch(references).distances(x, k, *codes)
    expected = exact_distances(x, references, k, *codes)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@settings(deadline=None, max_examples=40)
@given(
    d=st.sampled_from([70, 118, 300]),
    rank=st.integers(1, 20),
    noise=st.sampled_from([0.0, 1e-3, 0.1]),
    far=st.sampled_from([0.0, 10.0, 1e3]),
    near=st.sampled_from([1e-4, 1.0]),
    seed=st.integers(0, 99),
)
@example(d=70, rank=1, noise=0.0, far=0.0, near=1e-4, seed=1)  # rounded to bfloat16, far more than they are apart
def test_short_coordinates_lose_no_neighbour(d, rank, noise, far, near, seed):
    """Rows near few dimensions are told apart by them; some lie close together, some are copies, some lie far out."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randn(30, rank, generator=generator).repeat(30, 1) + near * torch.randn(
        900, rank, generator=generator
    )
    everything = inner @ torch.randn(rank, d, generator=generator) + far
    everything += near * noise * torch.randn(900, d, generator=generator)
    x, references = everything[:60], everything[50:].clone()
    references[::97] *= 50.0
    search = NeighbourSearch(references)
    assert noise or far or search.width <= 64
    # A step is rounded as its ends are.
    torch.testing.assert_close(search.distances(x, 3).double(), exact_distances(x, references, 3), rtol=2e-6, atol=2e-6)


def test_short_coordinates_are_taken_where_they_pay():
    generator = torch.Generator().manual_seed(0)
    scattered = torch.randn(2000, 200, generator=generator)
    assert NeighbourSearch(scattered).width == 200
    assert NeighbourSearch(scattered * 0.7 ** torch.arange(200)).width == (32 if loader.multiplies_bfloat16() else 16)
    spread = scattered * 0.9 ** torch.arange(200)
    search = NeighbourSearch(spread)
    assert search.width < search._fine.shape[1] < 200
    x = spread[:50] + 0.01 * torch.randn(50, 200, generator=generator)
    coarse, fine = search._shortened(x)
    # The same rows, measured along fewer directions: all of them lie as far from the centre.
    torch.testing.assert_close(coarse.norm(dim=1), fine.norm(dim=1))
    torch.testing.assert_close(fine[:, : search.width - 1], coarse[:, :-1], rtol=0, atol=0)
    torch.testing.assert_close(search.distances(x, 3).double(), exact_distances(x, spread, 3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [1, 33, 47, 48, 63, 64, 80, 94, 95, 96])
@pytest.mark.parametrize("d", [17, 65, 118])
def test_few_references_have_few_directions(n, d):
    everything = torch.randn(n + 9, 3, generator=torch.Generator().manual_seed(n)) @ torch.randn(3, d)
    x, references = everything[n:], everything[:n]
    search = NeighbourSearch(references)
    assert search.width == d or search.width <= n - 32
    torch.testing.assert_close(search.distances(x, 2).double(), exact_distances(x, references, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("d", [4, 70])
def test_a_row_with_a_nan_has_no_neighbours_and_is_none(d):
    generator = torch.Generator().manual_seed(0)
    x, references = torch.randn(3, d, generator=generator), torch.randn(200, d, generator=generator)
    clean = NeighbourSearch(references[1:]).distances(x, 2)
    references[0, 1] = torch.nan
    torch.testing.assert_close(NeighbourSearch(references).distances(x, 2), clean)
    x[1, 2] = torch.nan
    assert NeighbourSearch(references).distances(x, 2).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("d", [4, 118])
def test_near_rows_follow_each_other_and_rows_that_can_not_be_compared_are_somewhere(d):
    everything = clusters(2500, d)
    search, x = NeighbourSearch(everything[:2000]), everything[2000:]
    order = search.order(x)
    assert sorted(order.tolist()) == list(range(500))
    steps = [rows.diff(dim=0).norm(dim=1).mean() for rows in (x[order], x)]
    assert steps[0] < 0.5 * steps[1]
    x[::7], x[1::7, 0], x[2::7, 1] = torch.nan, torch.inf, -1e38
    assert sorted(search.order(x).tolist()) == list(range(500))
    assert search.order(x[:1]).tolist() == [0]
    for wrong in (x.double(), x[:, :3]):
        with pytest.raises(ValueError, match="rows must be"):
            search.order(wrong)


def test_large_rows_and_copies_have_neighbours():
    generator = torch.Generator().manual_seed(0)
    references = 1e12 * torch.randn(400, 4, generator=generator) @ torch.randn(4, 70, generator=generator)
    x = references[:5] + 1e9
    found = NeighbourSearch(references).distances(x, 1)
    torch.testing.assert_close(found.double(), exact_distances(x, references, 1), rtol=1e-5, atol=0)
    copies = references[:1].repeat(300, 1)
    assert NeighbourSearch(copies).distances(copies[:2], 2).tolist() == [0, 0]


def test_kernels_keep_to_float32_whatever_is_the_default():
    x, references = torch.randn(9, 40), torch.randn(300, 40)
    search = NeighbourSearch(references)
    expected = search.distances(x, 2)
    torch.set_default_dtype(torch.float64)
    try:
        again = NeighbourSearch(references).distances(x, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again, expected)


def test_what_no_search_can_be_made_of_is_told():
    search = NeighbourSearch(torch.randn(100, 5))
    for arguments, message in {
        (torch.zeros(2, 4), 2): r"as wide as the references, 5, got \[2, 4\]",
        (torch.zeros(5), 2): r"as wide as the references, 5, got \[5\]",
        (torch.zeros(2, 5, dtype=torch.float64), 2): "must be float32, got torch.float64",
        (torch.zeros(2, 5), 65): "k must be 1 at least and 64 at most, got 65",
        (torch.zeros(2, 5), 0): "k must be 1 at least",
        (torch.zeros(2, 5), 2, torch.zeros(2)): "need the reference_families",
        (torch.zeros(2, 5), 2, torch.zeros(1), torch.zeros(100)): "2 rows need as many families, got 1",
    }.items():
        with pytest.raises(ValueError, match=message):
            search.distances(*arguments)


@pytest.mark.parametrize("d", [3, 16, 90])
def test_the_order_of_references_changes_no_bit(d):
    """In balls that are put together otherwise, rows find the same neighbours."""
    x, references = clusters(300, d, seed=1), clusters(5000, d, seed=1)[300:]
    families, others = torch.arange(300) % 7, torch.arange(4700) % 7
    order = torch.randperm(4700, generator=torch.Generator().manual_seed(2))
    search, another = NeighbourSearch(references), NeighbourSearch(references[order])
    assert not torch.equal(search._order, order[another._order])
    assert torch.equal(search.distances(x, 5), another.distances(x, 5))
    own = search.distances(x, 5, families, others)
    assert torch.equal(own, another.distances(x, 5, families, others[order]))
    torch.testing.assert_close(own.double(), exact_distances(x, references, 5, families, others), rtol=1e-5, atol=1e-5)


def test_blocks_of_rows_change_nothing(monkeypatch):
    everything = clusters(400, 20)
    x, references = everything[:100], everything[100:]
    families, others = torch.arange(100) % 7, torch.arange(300) % 7
    search = NeighbourSearch(references)
    apart, nearest = search.distances(x, 3, families, others), search.nearest(x)
    monkeypatch.setattr(neighbours, "_ROWS", 33)
    assert torch.equal(search.distances(x, 3, families, others), apart)
    assert all(map(torch.equal, search.nearest(x), nearest))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_ball_is_not_passed_by_for_what_rounding_adds(sign):
    """Half way between two numbers of bfloat16: the nearest is rounded away from the row, what is farther to it."""
    middle, ulp = 1.0 + 2.0**-8, 2.0**-23
    x = torch.tensor([[sign * (middle + ulp)]])
    nearest, others = torch.full((16, 1), sign * (middle - ulp)), torch.full((16, 1), sign * (middle + 0.002))
    which, distance = NeighbourSearch(torch.cat([others, nearest])).nearest(x)
    assert which >= 16
    assert distance == 2 * ulp


@settings(deadline=None, max_examples=40)
@given(n_rows=st.integers(1, 300), n=st.sampled_from([1, 15, 16, 17, 700]), d=WIDTHS, seed=st.integers(0, 99))
def test_which_reference_is_the_nearest(n_rows, n, d, seed):
    everything = clusters(n_rows + n, d, seed)
    x, references = everything[:n_rows], everything[n_rows:]
    which, distances = NeighbourSearch(references).nearest(x)
    apart = torch.cdist(x.double(), references.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(distances.double(), apart.amin(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(apart.gather(1, which.unsqueeze(1)).squeeze(1), apart.amin(1), rtol=1e-6, atol=1e-6)


def test_nothing_is_nearest_where_nothing_can_be_measured():
    x, references = torch.zeros(4, 3), torch.zeros(40, 3)
    x[0, 1] = torch.nan
    references[:39] = torch.tensor([torch.inf, torch.nan, 1e30]).repeat(13).unsqueeze(1)
    which, distances = NeighbourSearch(references).nearest(x)
    assert which.tolist() == [-1, 39, 39, 39]
    assert distances.isnan().tolist() == [True, False, False, False]
    for none in (references[:39], references[:0]):
        search = NeighbourSearch(none)
        assert search.nearest(x)[0].tolist() == [-1] * 4
        assert search.distances(x, 2).isnan().all()


@pytest.mark.parametrize("power", [-15, -20, 12])
def test_rows_of_any_size_have_neighbours(power):
    """Products of bfloat16 take the smallest numbers for nothing."""
    everything = 10.0**power * clusters(600, 40)
    x, references = everything[:60], everything[60:]
    apart = (x.unsqueeze(1).double() - references.double()).square().sum(-1).sqrt()
    found = NeighbourSearch(references).distances(x, 3) if power > -19 else NeighbourSearch(references).nearest(x)[1]
    expected = apart.topk(3, largest=False).values.mean(1) if power > -19 else apart.amin(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5 if power > -19 else 0.1, atol=0)


@pytest.mark.parametrize("d", [10, 30, 70])
def test_far_from_the_origin_nothing_more_is_measured(d):
    """What rounding adds is a share of how far rows are from the references' centre."""
    everything = clusters(4000, d)
    search, far = NeighbourSearch(everything), NeighbourSearch(everything + 1e4)
    torch.testing.assert_close(far._balls[0][:, 2].mean(), search._balls[0][:, 2].mean(), rtol=0.5, atol=0)
    x = everything[:50] + 1e4
    expected = exact_distances(x, everything + 1e4, 2)
    torch.testing.assert_close(far.distances(x, 2).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("d", [20, 70])
def test_a_reference_that_is_far_too_large_hides_no_other(d):
    everything = clusters(400, d)
    x, references = everything[:50], everything[50:].clone()
    clean = NeighbourSearch(references[1:]).distances(x, 2)
    references[0] = 1e30
    assert torch.equal(NeighbourSearch(references).distances(x, 2), clean)


@pytest.mark.parametrize(
    ("compiler", "processor"),
    [
        pytest.param("c++", "x86-64-v2", id="vectors of four floats, nothing but sums and products"),
        pytest.param("clang++", "native", id="another compiler"),
    ],
)
def test_what_is_found_depends_neither_on_the_processor_nor_on_the_compiler(tmp_path, compiler, processor):
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    if processor.startswith("x86") and platform.machine() != "x86_64":
        pytest.skip("another family of processors")
    generator = torch.Generator().manual_seed(0)
    cases = [clusters(3500, 90)]
    for d in (5, 90):  # two places, and about each of them rows that are a few units in the last place apart
        place = 1 + torch.rand(1, d, generator=generator)
        step = torch.randint(-6, 7, (3500, d), generator=generator) * 2.0**-23
        cases.append((place + step) * (2 * torch.randint(2, (3500, 1), generator=generator) - 1))
    paths = [tmp_path / name for name in ("given.pt", "found.pt")]
    torch.save(cases, paths[0])
    code = (
        "import sys, torch; from mdml_kernels.native import loader, neighbours\n"
        "loader._FLAGS = tuple(flag.replace('native', sys.argv[3]) for flag in loader._FLAGS)\n"
        "assert loader.native().kernels is not None, loader.native().reason\n"
        "search = neighbours.NeighbourSearch\n"
        "torch.save([search(case[500:]).distances(case[:500], 2) for case in torch.load(sys.argv[1])], sys.argv[2])"
    )
    environment = os.environ | {"CXX": compiler}
    subprocess.run([sys.executable, "-c", code, *map(str, paths), processor], check=True, env=environment)
    assert loader.native().kernels is not None, loader.native().reason
    for case, found in zip(cases, torch.load(paths[1]), strict=True):
        assert torch.equal(found, NeighbourSearch(case[500:]).distances(case[:500], 2))
        exact = exact_distances(case[:500], case[500:], 2)
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
