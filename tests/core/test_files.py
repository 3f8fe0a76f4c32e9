"""Files and folders appear whole or not at all."""

from pathlib import Path

import pytest

from mdml_fast.files import replace_file, replace_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_replaces_another_only_when_it_is_done(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text("old")
    with pytest.raises(FileExistsError), replace_file(path) as temporary:
        temporary.touch(exist_ok=False)
    assert path.read_text() == "old"
    with replace_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["scores.csv"]


def test_a_folder_replaces_another_only_when_it_is_done(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for content in ("old", "new"):
        with replace_folder(path) as temporary:
            (temporary / content).write_text(content)
    assert names(path) == ["new"]
    with pytest.raises(RuntimeError), replace_folder(path) as temporary:
        raise RuntimeError
    assert names(path) == ["new"]
    assert names(tmp_path) == ["model"]


def test_the_old_folder_is_put_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    with replace_folder(path) as temporary:
        (temporary / "old").write_text("old")
    rename = Path.rename

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="no"), replace_folder(path) as temporary:
        (temporary / "new").write_text("new")
    assert names(path) == ["old"]
    assert names(tmp_path) == ["model"]
