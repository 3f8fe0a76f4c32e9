"""Every case of `mdml_fast.bench.engine`: checked against float64, then timed in turns; run by `pytest --benchmark`."""

import pytest

from mdml_fast.bench import engine


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("case", engine.CASES, ids=lambda case: case.name)
def test_engine(case, rows_of, device):
    rows_of(engine).append(engine.run(case, device))
