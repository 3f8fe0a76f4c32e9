"""What users hand to the detector, checked: labels, groups, devices and dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mdml_fast.data.labelled import MIN_NORMALS, UNNAMED, Names, check_normals, class_names
from mdml_fast.errors import InputError

DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
# In place of the names of the normal classes: whatever y says, all rows are normal.
ALL_NORMAL = "all"


def resolve_device(name: str) -> torch.device:
    """The torch device of ``auto``, ``cpu`` or ``cuda``.

    Raises:
        InputError: it is none of these, or there is no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but torch finds no GPU; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_dtype(name: str) -> torch.dtype | None:
    """What the networks compute in; None for float32.

    Raises:
        InputError: it is none of `DTYPES`.
    """
    if name not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def named_labels(y: Any, normal: Sequence[Any] | str | None, n_rows: int) -> tuple[Names, tuple[str, ...]]:
    """The class of each row [N], and the names of the normal classes.

    Args:
        y: classes [N], or None: all rows are normal.
        normal: the normal classes; "all": every one; None: the one that is usually normal, where there is one.
        n_rows: N.

    Raises:
        InputError: there are not as many labels as rows, or too few of them are normal.
    """
    labels, normal = _labels(y, normal, "normal", n_rows)
    if normal is None:
        normal = _conventional_normal(set(labels))
    elif isinstance(normal, str):
        normal = _every_class(normal, labels)
    names = tuple(class_names(list(normal), "normal"))
    check_normals(labels, names)
    return labels, names


def further_labels(
    y: Any, normal: Sequence[Any] | str | None, earlier: Sequence[str], anomaly_classes: Sequence[str], n_rows: int
) -> tuple[Names, list[str]]:
    """The class of each of N further rows [N], and the names of the normal classes, earlier ones first.

    Args:
        y: classes [N], or None: all rows are normal.
        normal: the names of further normal classes; "all": every one of y.
        earlier: the normal classes so far.
        anomaly_classes: the anomaly classes so far.
        n_rows: N.

    Raises:
        InputError: there are no rows, not as many labels as rows, or what was an anomaly is to be normal.
    """
    if not n_rows:
        raise InputError("there are no rows to learn from")
    labels, normal = _labels(y, normal, unnamed_normal(earlier), n_rows)
    if isinstance(normal, str):
        normal = _every_class(normal, labels)
    names = class_names(list(normal or []), "normal").tolist()
    for name in names:
        if name in anomaly_classes:
            raise InputError(f"class {name!r} was learned as an anomaly class, it can't become normal; fit anew")
    return labels, list(dict.fromkeys([*earlier, *names]))


def _labels(
    y: Any, normal: Sequence[Any] | str | None, unnamed: str, n_rows: int
) -> tuple[Names, Sequence[Any] | str | None]:
    """The class of each of N rows [N], and the normal ones; without y all rows are of one, the `unnamed` class."""
    if y is None:
        return np.full(n_rows, unnamed, dtype=object), [unnamed]
    labels = class_names(y, "y")
    if len(labels) != n_rows:
        raise InputError(f"y has {len(labels)} labels for {n_rows} rows")
    return labels, normal


def unnamed_normal(classes: Sequence[str]) -> str:
    """The class of further normals that nobody named: the only normal one, or one of its own."""
    return classes[0] if len(classes) == 1 else UNNAMED


def named_groups(groups: Any, n_rows: int) -> Names | None:
    """The group of each row [N], where given; raises InputError where there are not as many as rows."""
    if groups is None:
        return None
    names = class_names(groups, "groups")
    if len(names) != n_rows:
        raise InputError(f"groups has {len(names)} entries for {n_rows} rows")
    return names


def check_count(n_rows: int, purpose: str) -> None:
    """Raise InputError where there are fewer than 20 normals for a purpose."""
    if n_rows < MIN_NORMALS:
        raise InputError(f"only {n_rows} normal rows to {purpose}; at least {MIN_NORMALS} are needed")


def _every_class(normal: str, labels: Names) -> list[str]:
    """The classes of all labels, which ``all`` stands for."""
    if normal != ALL_NORMAL:
        raise InputError(f"normal must be a list of classes, or {ALL_NORMAL!r}; got {normal!r}")
    return sorted(set(labels))


def _conventional_normal(present: set[str]) -> list[str]:
    """The normal class of scikit-learn's 1 / -1 and of the usual 0 / 1; [] where the labels are neither."""
    if "-1" in present and present <= {"1", "-1"}:
        return ["1"]
    return ["0"] if "0" in present and present <= {"0", "1"} else []
