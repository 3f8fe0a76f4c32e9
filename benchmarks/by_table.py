"""What the benchmarks over random splits of the open tables share: their command line and their JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mdml_fast.data import LabelledTable
from mdml_fast.data.open_sets import open_sets

Measure = Callable[[str, LabelledTable, int], Any]
"""Takes a table's name, the table and the number of splits; prints and gives what it found, None where it can't."""


def run(description: str | None, splits: int, measure: Measure) -> None:
    """Measure the tables that the command line names, all by default; write JSON where it asks for it.

    Args:
        description: for `--help`.
        splits: how many, where the command line does not say.
        measure: of one table.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=splits)
    parser.add_argument("--table", action="append", help="by name; all that are found (MDML_DATA names their folder)")
    parser.add_argument("--out", type=Path, help="write JSON there")
    chosen = parser.parse_args()
    found = {
        name: measure(name, load(), chosen.splits)
        for name, load in open_sets().items()
        if not chosen.table or name in chosen.table
    }
    if chosen.out:
        tables = {name: of_table for name, of_table in found.items() if of_table is not None}
        chosen.out.write_text(json.dumps({"splits": chosen.splits, "tables": tables}, indent=1) + "\n")
