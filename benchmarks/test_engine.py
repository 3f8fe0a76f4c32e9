"""Every case of `mdml_fast.bench.engine`: checked against float64, then timed in turns; run by `pytest --benchmark`.

pytest-benchmark times ours once more, alone: what its options store can be compared between commits.
"""

import pytest

from mdml_fast.bench import engine


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("case", engine.CASES, ids=lambda case: case.name)
def test_engine(case, measure):
    measure(engine, case)
