"""The state of a training run on disk, so that `--resume` goes on where a run was cut off."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mdml_fast.errors import ArtifactError
from mdml_fast.files import replace_file
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

    def restore(self, params: Mapping[str, nn.Parameter], optimizer: torch.optim.Adam, history: History) -> None:
        """Fill parameters, optimiser and the history of the steps done from the file, where there is one.

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
        state = {}
        for index, (name, param) in enumerate(params.items()):
            param.data.copy_(tensors[f"param.{name}"])
            state[index] = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        losses, by_direction = json.loads(metadata["history"])
        history.losses.extend(losses)
        history.by_direction.extend(by_direction)

    def save_sometimes(self, params: Mapping[str, nn.Parameter], optimizer: torch.optim.Adam, history: History) -> None:
        """Write the file, unless that was done less than two seconds ago."""
        if time.monotonic() - self._last_save < SECONDS_BETWEEN_SAVES:
            return
        tensors: dict[str, Tensor] = {}
        for name, param in params.items():
            tensors[f"param.{name}"] = param.detach()
            tensors |= {f"{key}.{name}": value for key, value in optimizer.state[param].items()}
        metadata = {"fingerprint": self.fingerprint, "history": json.dumps([history.losses, history.by_direction])}
        with replace_file(self.path) as temporary:
            temporary.write_bytes(save(tensors, metadata))
        self._last_save = time.monotonic()
