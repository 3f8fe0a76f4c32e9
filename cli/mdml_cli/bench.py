"""`mdml-fast bench`."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from importlib import import_module
from typing import Annotated, Any

import typer

from mdml_cli import output
from mdml_cli.options import JsonOption, ThreadsOption, set_threads

# Each module has CASES, run(case, device, rounds) -> a dataclass, table(rows) and environment(device).
BENCHMARKS = {"engine": "mdml_fast.bench.engine"}


class Benchmark(StrEnum):
    """What can be measured."""

    ENGINE = "engine"
    ALL = "all"


def bench(
    what: Annotated[Benchmark, typer.Argument(help="What to measure.")] = Benchmark.ALL,
    case: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Part of a case's name; repeat for more.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, metavar="N", help="Rounds of every case (its own).")] = None,
    threads: ThreadsOption = 1,
    json: JsonOption = False,
) -> None:
    """Measure this machine: ours against its peers, each first checked to compute the same.

    One CPU thread unless --threads says more. Ratios count, not times: contenders take turns within one run.
    """
    set_threads(threads)
    documents = {name: _run(name, case, rounds, json) for name in BENCHMARKS if what in (name, Benchmark.ALL)}
    if not any(document["rows"] for document in documents.values()):
        raise typer.BadParameter(f"no case has a name with {' or '.join(case or [])} in it")
    if json:
        output.print_json(documents)


def _run(name: str, wanted: list[str] | None, rounds: int | None, json: bool) -> dict[str, Any]:
    """One benchmark: its document, and unless that is all that is asked for its table."""
    import torch

    module = import_module(BENCHMARKS[name])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = [case for case in module.CASES if not wanted or any(part in case.name for part in wanted)]
    rows = []
    with output.progress_bar(name) as update:
        for number, case in enumerate(cases):
            update(number, len(cases), case.name)
            rows.append(module.run(case, device, rounds))
    if rows and not json:
        typer.echo(module.table(rows))
    return {"environment": module.environment(device), "rows": [asdict(row) for row in rows]}
