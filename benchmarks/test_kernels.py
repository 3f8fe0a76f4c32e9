"""Every case of `mdml_kernels.benchmark`: checked against float64, then timed in turns; run by `pytest --benchmark`."""

import pytest
from mdml_kernels import benchmark


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("case", benchmark.CASES, ids=lambda case: case.name)
def test_kernel(case, rows_of, device):
    rows_of(benchmark).append(benchmark.run(case, device))
