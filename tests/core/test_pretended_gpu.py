"""The detector with its tensors on a GPU, as far as a machine without one can tell: nothing mixes devices."""

import warnings
from pathlib import Path

import numpy as np
import pretended_gpu
import pytest
import torch
from pretended_gpu import PretendedGpu, WrongDeviceError, is_on_gpu
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from mdml_fast import MDMLDetector
from mdml_fast.meta.default import DefaultConfig
from mdml_fast.meta.ensemble import EnsembleConfig
from mdml_fast.meta.paper import PaperConfig
from mdml_fast.presets import Config

# Few steps: each takes as long as on a CPU.
DEFAULT, PAPER = DefaultConfig(EnsembleConfig(steps=10)), PaperConfig(outer_steps=20)
NORMAL = ["0", "1", "2", "3", "4"]
ROWS, LABELS = (values[:700] for values in load_digits(return_X_y=True))
CLASSES = LABELS.astype(str)
SEEN = np.isin(CLASSES, ["5", "6"]) & (np.arange(len(CLASSES)) % 10 == 0)
TRAINING = (np.isin(CLASSES, NORMAL) & (np.arange(len(CLASSES)) % 3 > 0)) | SEEN
TEST, UNSEEN = ROWS[~TRAINING], np.isin(CLASSES[~TRAINING], ["7", "8", "9"])


def test_the_mode_tells_devices_apart() -> None:
    with PretendedGpu() as mode:
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert (here.device.type, there.device.type, (2 * there).device.type) == ("cpu", "cuda", "cuda")
        assert (there.cpu().device.type, here.to(there).device.type, here.device.type) == ("cpu", "cuda", "cpu")
        assert torch.arange(3, device=there.device).is_cuda
        module = torch.nn.Linear(3, 2).to("cuda")
        assert module(there).is_cuda
        assert (there[torch.tensor([0, 2])] + torch.tensor(1.0)).is_cuda
        for wrong in (
            lambda: here + there,
            lambda: module(here),
            lambda: torch.cat([here, there]),
            lambda: here[there.long()],
            lambda: there.numpy(),
            lambda: np.asarray(there),
            lambda: there.__setitem__(slice(2), here[:2]),
        ):
            with pytest.raises(WrongDeviceError, match=r"both devices|can't convert"):
                wrong()
        mode.capturing = True
        assert there[there.long()].where(there > 0, 0.0).repeat_interleave(2).is_cuda
        assert (there.to(torch.float64).copy_(there) * there.new_zeros(3)).is_cuda
        for wrong in (
            lambda: there.sum().item(),
            lambda: bool(there.any()),
            lambda: there[there > 0],
            lambda: there[[0, 1]],
            lambda: there[torch.tensor([0, 1])],
            lambda: torch.where(there > 0),
            lambda: there.repeat_interleave(there.long()),
            lambda: torch.allclose(there, there),
            lambda: f"{there.sum():.2f}",
            lambda: there.cpu(),
            lambda: there.copy_(here),
            lambda: torch.as_tensor(np.ones(3), device="cuda"),
        ):
            with pytest.raises(WrongDeviceError, match="captured"):
                wrong()
    assert "torch.Tensor.mul" in mode.seen
    assert not is_on_gpu(torch.ones(3))


@pytest.mark.parametrize(("preset", "dtype"), [(DEFAULT, "float32"), (DEFAULT, "bfloat16"), (PAPER, "float32")])
def test_a_detector_there_finds_what_one_here_finds(
    preset: Config, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"preset": preset, "normal": NORMAL, "random_state": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        here = MDMLDetector(**given, device="cpu").fit(ROWS[TRAINING], CLASSES[TRAINING])
        with pretended_gpu.pretended_gpu(monkeypatch) as mode:
            there = MDMLDetector(**given, dtype=dtype).fit(ROWS[TRAINING], CLASSES[TRAINING])
            scores = there.score_samples(TEST)
            there.save(tmp_path / "model")
            loaded = MDMLDetector.load(tmp_path / "model", device="cuda")
            assert np.array_equal(loaded.score_samples(TEST), scores)
            assert np.isfinite(loaded.p_value(TEST)).all()
            why = loaded.explain(TEST[:5])
            loaded.recalibrate(ROWS[np.isin(CLASSES, NORMAL)])
            if preset is DEFAULT:
                loaded.adapt(ROWS[CLASSES == "9"][:40])
                of_nines = CLASSES[~TRAINING] == "9"
                assert loaded.p_value(TEST[of_nines]).mean() > 2 * there.p_value(TEST[of_nines]).mean()
    assert {"torch.Tensor.matmul", "torch.baddbmm", "torch.bmm"} & mode.seen
    assert mode.captured
    assert why.contributions.shape == (5, ROWS.shape[1])
    by_cpu, by_gpu = (roc_auc_score(UNSEEN, -found) for found in (here.score_samples(TEST), scores))
    assert by_gpu == pytest.approx(by_cpu, abs=0.005 if preset is DEFAULT else 0.03)
