"""`mdml-fast bench`."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import partial
from importlib import import_module
from typing import Annotated, Any

import typer

from mdml_cli import log, output
from mdml_cli.options import JsonOption, ThreadsOption, set_threads

Measure = Callable[[list[str], int | None, bool], dict[str, Any]]
"""Parts of the names of cases, rounds, and whether JSON is asked for; gives a document with `rows`."""


class Benchmark(StrEnum):
    """What can be measured."""

    KERNELS = "kernels"
    ENGINE = "engine"
    DETECTOR = "detector"
    ALL = "all"


def bench(
    what: Annotated[Benchmark, typer.Argument(help="What to measure.")] = Benchmark.ALL,
    case: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Only cases whose name holds this; repeat for more.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, metavar="N", help="Rounds of every case; its own.")] = None,
    threads: ThreadsOption = 1,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="detector: ours with one part taken out each, in place of the peers.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Measure this machine: ours against its peers, each first checked to compute the same.

    One CPU thread unless --threads says more. Ratios count, not times: contenders take turns within one run.
    `detector` runs on the digits and on the tables of the folder that MDML_DATA names; its cases are tables, its rounds
    splits.
    """
    set_threads(threads)
    measure: dict[Benchmark, Measure] = {
        Benchmark.KERNELS: partial(_timed, "mdml_kernels.benchmark"),
        Benchmark.ENGINE: partial(_timed, "mdml_fast.bench.engine"),
        Benchmark.DETECTOR: partial(_detector, ablate),
    }
    chosen = measure if what is Benchmark.ALL else {what: measure[what]}
    documents = {name.value: function(case or [], rounds, json) for name, function in chosen.items()}
    if not any(document["rows"] for document in documents.values()):
        raise typer.BadParameter(f"no case has a name with {' or '.join(case or [])} in it")
    if json:
        output.print_json(documents)


def _timed(module: str, parts: list[str], rounds: int | None, json: bool) -> dict[str, Any]:
    """A benchmark of times: its module has run_all(device, parts, rounds), table(rows) and document(rows, device)."""
    benchmark, device = import_module(module), _device()
    rows = benchmark.run_all(device, parts, rounds)
    if rows and not json:
        typer.echo(benchmark.table(rows))
    document: dict[str, Any] = benchmark.document(rows, device)
    return document


def _detector(ablate: bool, parts: list[str], rounds: int | None, json: bool) -> dict[str, Any]:
    from mdml_fast.bench import detector
    from mdml_fast.data.open_sets import open_sets

    methods = detector.without_parts("auto", "float32") if ablate else detector.peers("auto", "float32")
    tables = {name: load for name, load in open_sets().items() if not parts or any(part in name for part in parts)}
    with log.progress("detector") as update:
        documents = detector.run(
            tables, methods, rounds or 5, lambda table, done, of, method: update(done, of, f"{table}: {method}")
        )
    if not documents:
        return {"rows": {}}
    total = detector.summary(list(documents.values()))
    if not json:
        for name, document in documents.items():
            typer.echo(name)
            output.print_results(document["results"])
            output.print_differences(document["differences"])
        output.print_summary(total, len(documents))
    return {"environment": detector.environment(_device()), "rows": documents, "summary": total}


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
