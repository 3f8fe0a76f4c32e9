"""`mdml-fast bench`."""

from __future__ import annotations

from enum import StrEnum
from importlib import import_module
from typing import Annotated, Any

import typer

from mdml_cli import output
from mdml_cli.options import JsonOption, set_threads


class Part(StrEnum):
    """What can be measured."""

    KERNELS = "kernels"
    ENGINE = "engine"
    ALL = "all"


# Each module has CASES, run_all(device, parts of names, rounds), table(rows) and document(rows, device).
MODULES = {Part.KERNELS: "mdml_kernels.benchmark", Part.ENGINE: "mdml_fast.bench.engine"}


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

    set_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    modules = {name: import_module(module) for name, module in MODULES.items() if part in (name, Part.ALL)}
    names = [known.name for module in modules.values() for known in module.CASES]
    if case and not any(text in name for text in case for name in names):
        raise typer.BadParameter(f"no case is named like {' or '.join(case)}; the cases are {', '.join(names)}")
    documents: dict[str, Any] = {}
    for name, module in modules.items():
        rows = module.run_all(device, case or (), rounds)
        documents[name.value] = module.document(rows, device)
        if rows and not json:
            typer.echo(module.table(rows))
    if json:
        output.print_json(documents)
