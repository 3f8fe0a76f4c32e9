"""A trained detector in other people's formats: ONNX, a torch program, an MLflow model."""

from __future__ import annotations

from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mdml_fast.errors import InputError
from mdml_fast.files import check_file, check_parent, replace_file, replace_folder

if TYPE_CHECKING:
    from mdml_fast.detector import MDMLDetector


class ExportFormat(StrEnum):
    """What a detector can become.

    - onnx: one file, raw columns to score, p-value and alarm; needs the extra ``onnx``.
    - torch: one file, a `torch.export` program of the same.
    - mlflow: a folder, an MLflow pyfunc model with a signature; needs the extra ``mlflow``.
    """

    ONNX = "onnx"
    TORCH = "torch"
    MLFLOW = "mlflow"


# The modules that a format's extra brings.
_NEEDED = {ExportFormat.ONNX: "onnx", ExportFormat.MLFLOW: "mlflow"}


def export(detector: MDMLDetector, form: ExportFormat, path: Path) -> None:
    """Write the detector; the file or folder appears whole or not at all, and replaces an earlier one.

    Raises:
        InputError: the format's extra is not installed, the detector can't be written in it, or the path is taken by
            something else.
        OSError: it cannot be written.
    """
    if (module := _NEEDED.get(form)) and find_spec(module) is None:
        raise InputError(f"the format {form} needs the package {module}: pip install 'mdml-fast[{form}]'")
    _check_path(form, path)
    if form is ExportFormat.ONNX:
        from mdml_fast.export.onnx_model import onnx_model

        content = onnx_model(detector).SerializeToString()
        with replace_file(path) as file:
            file.write_bytes(content)
    elif form is ExportFormat.TORCH:
        from mdml_fast.export.torch_program import save_program

        with replace_file(path) as file:
            save_program(detector, file)
    else:
        from mdml_fast.export.mlflow_model import save_mlflow

        with replace_folder(path) as folder:
            save_mlflow(detector, folder)


def _check_path(form: ExportFormat, path: Path) -> None:
    if form is not ExportFormat.MLFLOW:
        check_file(path)
        return
    check_parent(path)
    taken = path.exists() and not (path / "MLmodel").exists()
    if taken and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} exists and is no MLflow model; choose another --out or move it away")
