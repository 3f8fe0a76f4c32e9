"""Tables of measurements in the pages, from benchmarks/results: `python docs/measured.py` writes them anew.

A page has a place for one between `<!-- measured: NAME -->` and `<!-- end -->`. The files are what
`mdml-fast bench NAME --json` printed; each says on what machine.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
PLACE = re.compile(r"(<!-- measured: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def results(benchmark: str) -> dict[str, Any]:
    """The document of a benchmark: its environment and its rows."""
    document: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{benchmark}-amd-epyc.json").read_text())
    return document


def machine(benchmark: str) -> str:
    """Where it was measured, in a line."""
    found = results(benchmark)["environment"]
    threads = f"{found['threads']} thread{'s' * (found['threads'] > 1)}"
    return f"Measured on an {found['device']}, {threads}, torch {found['torch']}.\n"


def methods() -> str:
    """Every method's means over the tables."""
    tables = results("detector")["rows"]
    names = next(iter(tables.values()))["results"]
    lines = [
        machine("detector"),
        "| method | AUROC unseen | AUROC seen | FPR95 unseen | fit, s |",
        "| --- | --- | --- | --- | --- |",
    ]

    def mean(name: str, side: str, metric: str) -> float:
        return float(np.mean([table["results"][name][side][metric]["mean"] for table in tables.values()]))

    for name in sorted(names, key=lambda name: -mean(name, "unseen", "auroc")):
        values = [f"{mean(name, *what):.3f}" for what in (("unseen", "auroc"), ("seen", "auroc"), ("unseen", "fpr95"))]
        seconds = np.mean([table["results"][name]["fit_seconds"] for table in tables.values()])
        lines.append(f"| {name} | {' | '.join(values)} | {seconds:.1f} |")
    return "\n".join(lines)


def tables() -> str:
    """On each table, how much ours gains on k-NN and on the strongest other method."""
    lines = [
        "| table | mdml | k-NN | gain on k-NN, 95 % interval | best other | its AUROC |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for table, document in results("detector")["rows"].items():
        auroc = {name: result["unseen"]["auroc"]["mean"] for name, result in document["results"].items()}
        gain = document["differences"]["knn"]["unseen"]["auroc"]
        best = max((name for name in auroc if name not in ("mdml", "knn")), key=auroc.__getitem__)
        lines.append(
            f"| {table} | {auroc['mdml']:.3f} | {auroc['knn']:.3f} | {gain['mean']:+.3f} "
            f"[{gain['low']:+.3f}, {gain['high']:+.3f}] | {best} | {auroc[best]:.3f} |"
        )
    return "\n".join(lines)


def losses() -> str:
    """Time of eager PyTorch and torch.compile over ours, forward and backward."""
    lines = [
        machine("kernels"),
        "| case [episodes, rows, K] | eager / ours | torch.compile / ours |",
        "| --- | --- | --- |",
    ]
    for row in results("kernels")["rows"]:
        ratios = [f"{row['ratios'][name]:.1f}" if name in row["ratios"] else "–" for name in ("eager", "compile")]
        lines.append(f"| {row['case']} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def engines() -> str:
    """Episodes a second of each contender."""
    rows = results("engine")["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["per_second"]))
    cases = " | ".join(row["case"] for row in rows)
    lines = [machine("engine"), f"| episodes a second | {cases} |", "| --- " * (len(rows) + 1) + "|"]
    for name in names:
        values = [f"{row['per_second'][name]:,.0f}" if name in row["per_second"] else "–" for row in rows]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines)


TABLES = {function.__name__: function for function in (methods, tables, losses, engines)}


def filled(page: str) -> str:
    """The page with its tables of today."""
    return PLACE.sub(lambda found: f"{found[1]}\n{TABLES[found['name']]()}\n\n{found[3]}", page)


if __name__ == "__main__":
    for path in (ROOT / "docs").rglob("*.md"):
        path.write_text(filled(path.read_text()))
