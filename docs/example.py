"""The made-up tables that the pages work on: `python docs/example.py` writes flows.parquet, new.parquet and new.csv.

Rows are connections of a small network. Normal ones are `ok`. `scan`, `flood` and `leak` are labelled anomalies.
`tunnel` occurs in the new ones alone: each of its values is usual, what they are together is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

# For each service the usual size of a connection, in bytes, and how it is spread on a log scale.
SERVICES = {"http": (9000, 0.9), "ssh": (3000, 0.6), "dns": (180, 0.3), "mail": (20000, 0.7)}
PROTOCOLS = {"http": "tcp", "ssh": "tcp", "dns": "udp", "mail": "tcp"}


def connections(counts: Mapping[str, int], seed: int) -> pa.Table:
    """So many rows of each class, in a random order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(list(counts), list(counts.values())))
    n = len(labels)
    service = rng.choice(list(SERVICES), n, p=[0.45, 0.15, 0.3, 0.1])
    service[labels == "tunnel"] = "dns"
    centre, spread = np.array([SERVICES[name] for name in service]).T
    size = centre * np.exp(spread * rng.normal(size=n))
    per_packet = np.clip(rng.normal(600, 120, n), 60, 1400)
    seconds = rng.gamma(2.0, 0.4, n) * (1 + size / 2e4)
    failed = rng.poisson(0.1, n)

    size[labels == "scan"] *= 0.05
    failed[labels == "scan"] += rng.poisson(6, np.sum(labels == "scan")) + 2
    per_packet[labels == "flood"] = rng.normal(64, 4, np.sum(labels == "flood"))
    size[labels == "flood"] *= 5
    size[labels == "leak"] *= 12
    seconds[labels == "leak"] *= 6
    tunnel = labels == "tunnel"
    size[tunnel] = 12000 * np.exp(0.4 * rng.normal(size=tunnel.sum()))

    seconds[rng.random(n) < 0.02] = np.nan
    return pa.table(
        {
            "id": np.arange(n),
            "host": [f"host{number}" for number in rng.integers(1, 9, n)],
            "service": service,
            "protocol": [PROTOCOLS[name] for name in service],
            "bytes": size.round(),
            "packets": np.maximum(1, size / per_packet).round(),
            "seconds": pa.array(seconds.round(3), from_pandas=True),
            "failed": failed,
            "class": labels,
        }
    )


def write(folder: Path) -> None:
    """Write the tables; new.csv has the rows of new.parquet."""
    pq.write_table(connections({"ok": 2000, "scan": 30, "flood": 30, "leak": 30}, 1), folder / "flows.parquet")
    new = connections({"ok": 480, "scan": 10, "tunnel": 10}, 2)
    pq.write_table(new, folder / "new.parquet")
    pa.csv.write_csv(new, folder / "new.csv")


if __name__ == "__main__":
    write(Path())
