"""The state of a training run on disk, so that `--resume` goes on where a run was cut off."""

from __future__ import annotations

import json
import time
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mdml_fast.errors import ArtifactError
from mdml_fast.files import replace_file
from mdml_fast.meta.adam import Adam
from mdml_fast.meta.history import History

SECONDS_BETWEEN_SAVES = 2.0


class Checkpoint:
    """One file that holds parameters, Adam's moments and the losses so far; it is replaced whole or not at all.

    Args:
        path: the file.
        fingerprint: what the run is made of (data, settings, versions); a checkpoint of another run is refused.
        resume: go on from the file where there is one; False starts anew.
    """

    def __init__(self, path: Path, fingerprint: str, resume: bool) -> None:
        self.path, self.fingerprint, self.resume = path, fingerprint, resume
        self._last_save = -SECONDS_BETWEEN_SAVES

    def restore(self, optimizer: Adam, history: History) -> None:
        """Fill the parameters, their moments and the history of the steps done from the file, where there is one.

        Raises:
            ArtifactError: the file is damaged, or of another run.
        """
        if not self.resume or not self.path.exists():
            return
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{self.path} is no checkpoint or is damaged; train without --resume") from error
        if metadata.get("fingerprint") != self.fingerprint or "history" not in metadata:
            raise ArtifactError(
                f"{self.path} is of a run with other data, settings or versions; repeat those or train without --resume"
            )
        for name, value in _state(optimizer).items():
            value.copy_(tensors[name])
        losses, by_direction = json.loads(metadata["history"])
        optimizer.n_steps = len(losses)
        history.losses.extend(losses)
        history.by_direction.extend(by_direction)

    def save_sometimes(self, optimizer: Adam, history: History) -> None:
        """Write the file, unless that was done less than two seconds ago."""
        if time.monotonic() - self._last_save < SECONDS_BETWEEN_SAVES:
            return
        metadata = {"fingerprint": self.fingerprint, "history": json.dumps([history.losses, history.by_direction])}
        with replace_file(self.path) as temporary:
            temporary.write_bytes(save(_state(optimizer), metadata))
        self._last_save = time.monotonic()


def _state(optimizer: Adam) -> dict[str, Tensor]:
    """The parameters and their moments, by name."""
    parts = {"param": optimizer.params, "first": optimizer.first, "second": optimizer.second}
    return {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}
