"""The embedded data set: scikit-learn's handwritten digits."""

from __future__ import annotations

import pyarrow as pa
from sklearn.datasets import load_digits

DIGITS_LABEL = "digit"
DIGITS_NORMAL = ("0", "1", "2", "3", "4")


def digits_table() -> pa.Table:
    """1,797 images of 8 x 8 pixels as columns, and the column `digit`; 0-4 are the normals, 5-9 anomaly classes."""
    digits = load_digits()
    columns = {name: digits.data[:, i] for i, name in enumerate(digits.feature_names)}
    return pa.table({**columns, DIGITS_LABEL: [str(digit) for digit in digits.target]})
