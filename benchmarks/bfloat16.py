"""Does training in bfloat16 find what float32 finds? MDML_DATA=FOLDER python benchmarks/bfloat16.py [--splits 3]

On every open table the default detector is trained in both, on the same splits of rows and classes: mean AUROC of
unseen and of seen classes, and their largest differences. Prints them and writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from mdml_fast.baselines import mdml
from mdml_fast.data.open_sets import open_sets
from mdml_fast.evaluation import EvaluationProtocol, evaluate

DTYPES = ("float32", "bfloat16")
OUT = Path(__file__).parent / "results" / "bfloat16.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    protocol = EvaluationProtocol(splits=arguments.splits, seeds=1)
    methods = {dtype: mdml("default", "cpu", dtype) for dtype in DTYPES}
    found = {}
    for name, table in open_sets().items():
        results = evaluate(table(), methods, protocol)["results"]
        found[name] = {kind: compared(results, f"auroc_{kind}") for kind in ("unseen", "seen")}
        print(name, json.dumps(found[name]), flush=True)
    arguments.out.write_text(json.dumps({"splits": arguments.splits, "auroc": found}, indent=1) + "\n")


def compared(results: dict[str, dict[str, list[dict[str, float]]]], key: str) -> dict[str, float]:
    """The mean of each dtype over the splits, their difference, and the largest of a single split."""
    by_split = {dtype: np.array([split[key] for split in results[dtype]["splits"]]) for dtype in DTYPES}
    difference = by_split["bfloat16"] - by_split["float32"]
    means = {dtype: round(float(values.mean()), 5) for dtype, values in by_split.items()}
    return means | {
        "difference": round(float(difference.mean()), 5),
        "largest": round(float(np.abs(difference).max()), 5),
    }


if __name__ == "__main__":
    main()
