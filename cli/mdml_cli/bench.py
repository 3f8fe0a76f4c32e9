"""`mdml-fast bench`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from mdml_cli import output
from mdml_cli.options import JsonOption


class Part(StrEnum):
    """What can be measured."""

    KERNELS = "kernels"
    ALL = "all"


def bench(
    part: Annotated[Part, typer.Argument(help="What to measure.")] = Part.ALL,
    case: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Only cases whose name holds this; repeat for more.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, metavar="N", help="Rounds of every case; its own.")] = None,
    threads: Annotated[int, typer.Option(min=1, metavar="N", help="CPU threads.")] = 1,
    json: JsonOption = False,
) -> None:
    """Measure ours against what one would use instead, in turns, each first checked; prints ratios."""
    import torch

    torch.set_num_threads(threads)
    measure = {Part.KERNELS: _kernels}
    chosen = measure if part is Part.ALL else {part: measure[part]}
    documents = {name.value: function(case or [], rounds, json) for name, function in chosen.items()}
    if json:
        output.print_json(documents)


def _kernels(parts: list[str], rounds: int | None, json: bool) -> dict[str, Any]:
    import torch
    from mdml_kernels import benchmark

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = benchmark.run_all(device, parts, rounds)
    if not rows:
        names = ", ".join(case.name for case in benchmark.CASES)
        raise typer.BadParameter(f"no case is named like {' or '.join(parts)}; the cases are {names}")
    if not json:
        typer.echo(benchmark.table(rows))
    return benchmark.document(rows, device)
