"""A model on disk: a folder with model.safetensors and model.json; nothing in it is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mdml_fast.errors import ArtifactError, InputError
from mdml_fast.files import replace_folder

FORMAT = "mdml-fast model"
SCHEMA_VERSION = 12
WEIGHTS, DOCUMENT = "model.safetensors", "model.json"


def save_artifact(path: Path, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the folder; an earlier model there is replaced, and the new one appears whole or not at all.

    Raises:
        InputError: there is something at `path` that is no model of ours.
        OSError: it cannot be written.
    """
    check_replaceable(path)
    weights = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    header = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "versions": {name: version(name) for name in ("mdml-fast", "torch", "numpy", "scikit-learn", "pyarrow")}
        | {"python": platform.python_version()},
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    with replace_folder(path) as folder:
        (folder / WEIGHTS).write_bytes(weights)
        (folder / DOCUMENT).write_text(json.dumps(header | dict(document), indent=1, allow_nan=False) + "\n")


def load_artifact(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document and the tensors of a model folder.

    Raises:
        InputError: there is no model at `path`.
        ArtifactError: it is damaged, foreign or of a newer version.
    """
    if not path.exists():
        raise InputError(f"no such model: {path}")
    try:
        document = json.loads((path / DOCUMENT).read_text())
        weights = (path / WEIGHTS).read_bytes()
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path} is no model, or a damaged one: cannot read it ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ArtifactError(f"{path / DOCUMENT} is not that of a model made by mdml-fast")
    if document.get("schema_version") != SCHEMA_VERSION:
        found = document.get("schema_version")
        raise ArtifactError(f"{path} has schema version {found}, this mdml-fast reads {SCHEMA_VERSION}; train it again")
    if hashlib.sha256(weights).hexdigest() != document.get("weights_sha256"):
        raise ArtifactError(f"{path / WEIGHTS} is damaged: its sha256 is not the one in {DOCUMENT}; train it again")
    try:
        return document, load(weights)
    except SafetensorError as error:
        raise ArtifactError(f"{path / WEIGHTS} is not a safetensors file: {error}") from error


def check_replaceable(path: Path) -> None:
    """Raise InputError when `path` holds something that is neither a model of ours alone nor an empty folder."""
    if not path.exists():
        return
    if path.resolve() == Path.cwd():
        raise InputError(f"{path} is the folder that you are in; give a folder for the model alone")
    names = sorted(file.name for file in path.iterdir()) if path.is_dir() else None
    if names is None or (names and not _is_model(path)):
        raise InputError(f"{path} exists and is no model of mdml-fast; choose another --out or move it away")
    if others := [name for name in names if name not in (WEIGHTS, DOCUMENT)]:
        raise InputError(f"{path / others[0]} would be lost with the earlier model; move it away")


def _is_model(path: Path) -> bool:
    try:
        return bool(json.loads((path / DOCUMENT).read_text()).get("format") == FORMAT)
    except (OSError, ValueError, AttributeError):
        return False
