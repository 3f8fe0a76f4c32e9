"""Real tables with a protocol: what `MDML_DATA` names, and the embedded digits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from mdml_fast.data.digits import DIGITS_LABEL, DIGITS_NORMAL, digits_table
from mdml_fast.data.labelled import LabelledTable, label_table
from mdml_fast.data.tables import read_table
from mdml_fast.errors import InputError

Loader = Callable[[], LabelledTable]


def open_sets(folder: Path | None = None) -> dict[str, Loader]:
    """Labelled tables by name, each read when it is called.

    Args:
        folder: holds `protocol.json`: {name: {"file", "label", "normal", "ignore", "group"?}}; None takes the folder
            that the environment variable MDML_DATA names. Without either there are the digits alone.

    Raises:
        InputError: the folder has no readable protocol.
    """
    named = os.environ.get("MDML_DATA")
    folder = folder or (Path(named) if named else None)
    sets: dict[str, Loader] = {"digits": lambda: label_table(digits_table(), DIGITS_LABEL, DIGITS_NORMAL)}
    if folder is None:
        return sets
    try:
        protocol = json.loads((folder / "protocol.json").read_text())
        return sets | {name: _loader(folder, spec) for name, spec in protocol.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder / 'protocol.json'} can't be read as a protocol: {error}") from error


def _loader(folder: Path, spec: dict[str, object]) -> Loader:
    file, label, normal = str(spec["file"]), str(spec["label"]), [str(name) for name in _listed(spec["normal"])]
    group = None if spec.get("group") is None else str(spec["group"])
    ignore = [str(name) for name in _listed(spec.get("ignore")) if name != group]
    return lambda: label_table(read_table(folder / file), label, normal, ignore, group)


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else []
