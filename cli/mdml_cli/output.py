"""What commands print: results, on standard output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(document, indent=1, allow_nan=False))


def print_results(results: Mapping[str, Any]) -> None:
    """The table of an evaluation: for each method the metrics on unseen and on seen classes."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="Anomaly classes never labelled (unseen) and labelled (seen)",
        caption="mean ± spread over splits; FPR95: false alarms where 95 % are found",
    )
    table.add_column("method")
    table.add_column("classes")
    for name in ("AUROC", "AUPRC", "FPR95", "fit, s"):
        table.add_column(name, justify="right")
    for method, result in results.items():
        for side in ("unseen", "seen"):
            cells = [_cell(result[side][metric]) for metric in ("auroc", "auprc", "fpr95")]
            table.add_row(method, side, *cells, f"{result['fit_seconds']:.2f}" if side == "unseen" else "")
        table.add_section()
    Console().print(table)


def print_differences(differences: Mapping[str, Any]) -> None:
    """How much better ours is than each other method on unseen classes, paired over splits."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="Gain on unseen classes", caption="mean [95 % interval] over the same splits; positive is better"
    )
    table.add_column("mdml against")
    for name in ("AUROC", "worst split", "won", "lost", "FPR95"):
        table.add_column(name, justify="right")
    for method, sides in differences.items():
        auroc, fpr = sides["unseen"]["auroc"], sides["unseen"]["fpr95"]
        worst = "–" if auroc["worst"] is None else f"{auroc['worst']:+.3f}"
        table.add_row(method, _gain(auroc), worst, str(auroc["wins"]), str(auroc["losses"]), _gain(fpr))
    Console().print(table)


def print_summary(summary: Mapping[str, Any], n_tables: int) -> None:
    """The mean over tables of what ours gains on each other method."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Mean gain over {n_tables} table(s)", caption="mean [95 % interval]; positive is better")
    table.add_column("mdml against")
    for name in ("unseen AUROC", "lost", "seen AUROC", "unseen FPR95"):
        table.add_column(name, justify="right")
    for method, gains in summary.items():
        unseen, seen, alarms = gains["unseen"], gains["seen"], gains["fewer false alarms"]
        table.add_row(method, _gain(unseen), f"{unseen['losses']}/{unseen['splits']}", _gain(seen), _gain(alarms))
    Console().print(table)


def _gain(difference: Mapping[str, Any]) -> str:
    if difference["mean"] is None:
        return "–"
    interval = "" if difference["low"] is None else f" [{difference['low']:+.3f}, {difference['high']:+.3f}]"
    return f"{difference['mean']:+.3f}{interval}"


def _cell(spread: Mapping[str, float | None]) -> str:
    return "–" if spread["mean"] is None else f"{spread['mean']:.3f} ± {spread['std']:.3f}"
