"""The measured tables of the pages, from what is under benchmarks/results: `python docs/tables.py` writes them anew.

A page marks the place with `<!-- NAME -->` and `<!-- end -->`; what lies between is the table of that name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from statistics import fmean
from typing import Any

from blocks import ROOT, pages

RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"(?P<start><!-- (?P<name>[a-z]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def peers() -> str:
    """Unseen AUROC of every method on every table, and the means of what else counts."""
    rows = _read("detector-amd-epyc.json")["rows"]
    header = ["", *rows, "mean", "false alarms at 95 % found", "seen classes"]
    lines = [header, ["---"] * len(header)]
    for method in next(iter(rows.values()))["results"]:
        of = [table["results"][method] for table in rows.values()]
        unseen, alarms, seen = (
            [one[side][metric]["mean"] for one in of]
            for side, metric in (("unseen", "auroc"), ("unseen", "fpr95"), ("seen", "auroc"))
        )
        values = [*unseen, fmean(unseen), fmean(alarms), fmean(seen)]
        lines.append([f"`{method}`", *(_number(value) for value in values)])
    return _markdown(lines)


def parts() -> str:
    """What each part adds to the mean over the tables, with 95 % intervals."""
    summary = _read("ablation-amd-epyc.json")["summary"]
    lines = [["variant", "unseen AUROC", "seen AUROC", "fewer false alarms at 95 % found"], ["---"] * 4]
    for name, gains in summary.items():
        lines.append([name, *(_gain(gains[what]) for what in ("unseen", "seen", "fewer false alarms"))])
    return _markdown(lines)


TABLES: dict[str, Callable[[], str]] = {"peers": peers, "parts": parts}


def with_tables(text: str) -> str:
    """A page's text with its tables made anew."""
    return PLACE.sub(lambda found: f"{found['start']}\n{TABLES[found['name']]()}\n{found['end']}", text)


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def _number(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def _gain(gain: dict[str, float]) -> str:
    return f"{gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]"


def _markdown(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    for page in pages():
        page.write_text(with_tables(page.read_text()))
