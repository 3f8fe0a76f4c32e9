"""Every case of `mdml_kernels.benchmark`: checked against float64, then timed in turns; run by `pytest --benchmark`.

pytest-benchmark times ours once more, alone: what its options store can be compared between commits.
"""

import pytest
from mdml_kernels import benchmark as kernels


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("case", kernels.CASES, ids=lambda case: case.name)
def test_kernel(case, measure):
    measure(kernels, case)
