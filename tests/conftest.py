"""What tests of several folders share: real tables, a small one, and the command as a user starts it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mdml_kernels.native import loader
from support import COMMAND, DATA, OPEN_SETS, Run, protocol

from mdml_fast import MDMLDetector
from mdml_fast.data import label_table, read_table


@pytest.fixture(autouse=True, scope="session")
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that tests measure is left in the user's cache folder, nor read from it. What was compiled is kept."""
    cache, kernels = tmp_path_factory.mktemp("cache"), loader.cache_folder()
    kernels.mkdir(parents=True, exist_ok=True)
    (cache / kernels.name).symlink_to(kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield


@pytest.fixture
def mdml_fast(tmp_path: Path) -> Run:
    """Run `mdml-fast` in a process of its own, in an empty folder."""

    def run(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [str(COMMAND), *map(str, args)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, **options)

    return run


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """As `mdml_fast`, but in this process, which spares the seconds that imports take."""
    # Not above: where torch is imported so early, it does not find again what another process compiled for it.
    import torch
    from mdml_cli import app
    from threadpoolctl import threadpool_limits

    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        threads = torch.get_num_threads()
        with threadpool_limits(None):  # what --threads sets is put back
            exit_code = app.run([*map(str, args)])
        torch.set_num_threads(threads)
        said = capfd.readouterr()
        return subprocess.CompletedProcess(args, exit_code, said.out, said.err)

    return run


@pytest.fixture(params=OPEN_SETS)
def open_set(request: pytest.FixtureRequest) -> tuple[Path, list[str]]:
    """A real table, and the options that name its classes and columns."""
    spec = protocol(request.param)
    options = ["--label", spec["label"]]
    for name in spec["normal"]:
        options += ["--normal", name]
    for name in spec["ignore"]:
        if name != spec.get("group"):
            options += ["--ignore", name]
    if "group" in spec:
        options += ["--group", spec["group"]]
    return DATA / spec["file"], options


@pytest.fixture
def small_csv(tmp_path: Path) -> Path:
    """See `write_small_csv`."""
    return write_small_csv(tmp_path)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the default model of that table, fitted once: copy it rather than change it."""
    folder = tmp_path_factory.mktemp("small")
    data = label_table(read_table(write_small_csv(folder)), "class", ["ok"])
    MDMLDetector(random_state=0).fit(data.features, data.labels, normal=["ok"]).save(folder / "model")
    return folder / "model"


def write_small_csv(folder: Path) -> Path:
    """300 rows with a number, a heavy tail, a category, gaps, a constant; two anomaly classes of 30 rows."""
    rng = np.random.default_rng(0)
    lines = ["size,bytes,kind,constant,class"]
    for row in range(300):
        label = "ok" if row < 240 else ("odd" if row < 270 else "worse")
        shift = {"ok": 0.0, "odd": 4.0, "worse": -4.0}[label]
        size = "" if row % 50 == 7 else f"{rng.normal(shift):.5f}"
        lines.append(f"{size},{np.exp(rng.normal(5, 4)):.3f},{'ab'[row % 2]},1,{label}")
    path = folder / "small.csv"
    path.write_text("\n".join(lines) + "\n")
    return path
