"""`mdml-fast bench`."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any

import typer

from mdml_cli import output
from mdml_cli.options import JsonOption, ThreadsOption, set_threads


class Benchmark(StrEnum):
    """What can be measured."""

    KERNELS = "kernels"
    ENGINE = "engine"
    ALL = "all"


def bench(
    what: Annotated[Benchmark, typer.Argument(help="What to measure.")] = Benchmark.ALL,
    case: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Only cases whose name holds this; repeat for more.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, metavar="N", help="Rounds of every case; its own.")] = None,
    threads: ThreadsOption = 1,
    json: JsonOption = False,
) -> None:
    """Measure this machine: ours against its peers, each first checked to compute the same.

    One CPU thread unless --threads says more. Ratios count, not times: contenders take turns within one run.
    """
    set_threads(threads)
    measure = {Benchmark.KERNELS: _kernels, Benchmark.ENGINE: _engine}
    chosen = measure if what is Benchmark.ALL else {what: measure[what]}
    documents = {name.value: function(case or [], rounds, json) for name, function in chosen.items()}
    if not any(document["rows"] for document in documents.values()):
        raise typer.BadParameter(f"no case has a name with {' or '.join(case or [])} in it")
    if json:
        output.print_json(documents)


def _kernels(parts: list[str], rounds: int | None, json: bool) -> dict[str, Any]:
    from mdml_kernels import benchmark

    device = _device()
    rows = benchmark.run_all(device, parts, rounds)
    if rows and not json:
        typer.echo(benchmark.table(rows))
    return benchmark.document(rows, device)


def _engine(parts: list[str], rounds: int | None, json: bool) -> dict[str, Any]:
    from mdml_fast.bench import engine

    device = _device()
    cases = [case for case in engine.CASES if not parts or any(part in case.name for part in parts)]
    rows = []
    with output.progress_bar("engine") as update:
        for number, case in enumerate(cases):
            update(number, len(cases), case.name)
            rows.append(engine.run(case, device, rounds))
    if rows and not json:
        typer.echo(engine.table(rows))
    return {"environment": engine.environment(device), "rows": [asdict(row) for row in rows]}


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
