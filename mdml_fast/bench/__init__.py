"""Benchmarks of the package against its peers; `mdml-fast bench` and `pytest --benchmark` run them."""
