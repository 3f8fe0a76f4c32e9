"""Files and folders appear whole or not at all."""

import os
from pathlib import Path

import pytest

from mdml_fast import InputError
from mdml_fast.files import check_file, replace_file, replace_folder


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


def test_what_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "file").write_text("old")
    for name in ("file", "folder", "nothing"):
        (tmp_path / name).symlink_to(tmp_path / "to" / name)
    with replace_file(tmp_path / "file") as file, replace_folder(tmp_path / "folder") as folder:
        file.write_text("new")
        (folder / "new").write_text("new")
    with replace_folder(tmp_path / "folder") as folder:
        (folder / "newer").write_text("newer")
    assert names(tmp_path) == ["file", "folder", "nothing", "to"]
    assert all(path.is_symlink() for path in tmp_path.iterdir() if path.name != "to")
    assert (tmp_path / "to" / "file").read_text() == "new"
    assert names(tmp_path / "to" / "folder") == ["newer"]


def test_a_pipe_or_a_folder_is_no_file_to_write(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    check_file(tmp_path / "new")
    for path, what in (
        (tmp_path / "pipe", "no regular file"),
        (tmp_path, "a folder"),
        (tmp_path / "a" / "b", "no such"),
    ):
        with pytest.raises(InputError, match=what):
            check_file(path)


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
