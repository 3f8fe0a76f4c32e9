"""`mdml-fast score` on a large table: memory, and rows per second against what the machine could do.

    MDML_DATA=FOLDER python benchmarks/score_stream.py --rows 10000000 --threads 2

trains on nsl_kdd, repeats its rows with noise into a Parquet file of so many rows, scores the file in a process of its
own, and measures in the same run, on the same rows and normals and with as many threads:

- the machine's sgemm rate, and from it the rows per second of the model's matrix products alone, if every row were
  compared with every normal in all its features; it is not, so a share may be larger than 1;
- scikit-learn's NearestNeighbors (brute force, 5 neighbours) on a sample of the rows.

Prints the ratios and writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import torch
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from mdml_fast import MDMLDetector
from mdml_fast.data.open_sets import open_sets
from mdml_fast.data.views import VIEWS

ROOT = Path(__file__).parent.parent
CHUNK_ROWS = 100_000
# The table is scored by a command like a user's, which then tells its own memory. What the interpreter holds with
# torch loaded is no part of it.
SCORE = """
import json, sys, time, torch
from mdml_cli.app import run
from mdml_fast.resources import PeakMemory
memory, start = PeakMemory(), time.perf_counter()
code = run(sys.argv[1:])
print(json.dumps({"code": code, "seconds": time.perf_counter() - start, "bytes": memory.bytes()}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-rows", type=int, default=20_000, help="rows that scikit-learn is timed on")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "score-stream.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(arguments.threads):
        document = measure(Path(folder), arguments.rows, arguments.threads, arguments.peer_rows)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    for name, value in document.items():
        print(f"{name:>28}  {value:,.4g}" if isinstance(value, float) else f"{name:>28}  {value}")


def measure(folder: Path, n_rows: int, n_threads: int, n_peer_rows: int) -> dict[str, Any]:
    labelled = open_sets()["nsl_kdd"]()
    detector = MDMLDetector(random_state=0).fit(labelled.features, labelled.labels, normal=labelled.normal)
    detector.save(folder / "model")
    write_noisy_rows(labelled.features, folder / "data.parquet", n_rows)

    flops = flops_per_row(detector)
    before = sgemm_rate()
    ours = score(folder, n_threads)
    rate = (before + sgemm_rate()) / 2
    rows = detector.encoder_.transform(next(batches(folder / "data.parquet", n_peer_rows)))
    normals = detector.encoder_.transform(labelled.features)[labelled.is_normal]
    peer = nearest_neighbours_rate(normals, rows)
    ours_rate, bound = n_rows / ours["seconds"], rate / flops
    return {
        "machine": platform.machine(),
        "threads": n_threads,
        "rows": n_rows,
        "columns": labelled.features.num_columns,
        "features": rows.shape[1],
        "peak_gib_above_torch": ours["bytes"] / 2**30,
        "rows_per_second": ours_rate,
        "gflop_per_row": flops / 1e9,
        "sgemm_gflops": rate / 1e9,
        "matrix_products_rows_per_second": bound,
        "share_of_matrix_products": ours_rate / bound,
        "sklearn_rows_per_second": peer,
        "times_sklearn": ours_rate / peer,
    }


def write_noisy_rows(features: pa.Table, path: Path, n_rows: int) -> None:
    """Rows drawn with replacement; each number moves by a hundredth of its column's standard deviation."""
    rng = np.random.default_rng(0)
    spread = {
        field.name: float(np.std(features[field.name].to_numpy()))
        for field in features.schema
        if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
    }
    schema = pa.schema([(f.name, pa.float32() if f.name in spread else f.type) for f in features.schema])
    with pa_parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, n_rows, CHUNK_ROWS):
            size = min(CHUNK_ROWS, n_rows - start)
            chunk = features.take(pa.array(rng.integers(features.num_rows, size=size)))
            columns = {
                name: chunk[name].to_numpy() + 0.01 * spread[name] * rng.standard_normal(size)
                if name in spread
                else chunk[name]
                for name in features.column_names
            }
            writer.write_table(pa.table(columns).cast(schema))


def batches(path: Path, n_rows: int) -> Any:
    for batch in pa_parquet.ParquetFile(path).iter_batches(n_rows):
        yield pa.Table.from_batches([batch])


def flops_per_row(detector: MDMLDetector) -> float:
    """Of the products with the normals, with the encoders' weights and with the whitening matrix."""
    tensors = detector.model_.to_tensors()
    anchors, d = tensors["normals0.rows"].shape
    embedded = min(anchors, detector.model_.config.neighbourhood.references)
    inner = tensors["encoders.inner.weight"].numel()
    return 2.0 * (anchors * d + len(VIEWS) * embedded * d + 2 * inner + d * d)


def sgemm_rate(size: int = 2048, rounds: int = 5) -> float:
    """Operations per second of a large float32 product; the best of some rounds."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    a @ b
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(times)


def score(folder: Path, n_threads: int) -> dict[str, Any]:
    out = ["--out", str(folder / "out.parquet")]
    command = ["score", str(folder / "model"), str(folder / "data.parquet"), *out, "--threads", str(n_threads)]
    process = subprocess.run([sys.executable, "-c", SCORE, *command], stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    assert result["code"] == 0
    return result


def nearest_neighbours_rate(normals: np.ndarray, rows: np.ndarray) -> float:
    search = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(normals)
    search.kneighbors(rows[:500])
    start = time.perf_counter()
    search.kneighbors(rows)
    return len(rows) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
