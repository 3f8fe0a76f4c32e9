"""What a long run has done so far: a folder of small tables, each written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from mdml_fast.data.batches import write_tables
from mdml_fast.errors import ArtifactError, InputError
from mdml_fast.files import replace_file

IDENTITY = "run.json"


class Parts:
    """Tables of one schema in the order they came.

    As a context it removes its folder at the end, except where the run was cut off after a part was written: then the
    folder stays, to be resumed. (Bad input does not count: it would be refused again.)

    Args:
        folder: where the parts are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = sorted(folder.glob("part-*.arrow"))
        self.n_rows = sum(table.num_rows for table in self)

    @classmethod
    @contextlib.contextmanager
    def begin(cls, folder: Path, identity: Mapping[str, Any] | None = None) -> Iterator[Parts]:
        """No parts yet; those of an earlier run are removed.

        Args:
            folder: where to write them.
            identity: of the run, as JSON values; only a run of the same identity can be resumed. None: no run can, and
                nothing stays.

        Raises:
            InputError: there is something else at that path.
        """
        if folder.exists():
            _check_ours(folder)
            shutil.rmtree(folder)
        folder.mkdir()
        with _removed_at_the_end(cls(folder), can_stay=identity is not None) as parts:
            with replace_file(folder / IDENTITY) as file:
                file.write_text(json.dumps(identity))
            yield parts

    @classmethod
    @contextlib.contextmanager
    def resume(cls, folder: Path, identity: Mapping[str, Any]) -> Iterator[Parts]:
        """The parts of the earlier run; none, where there was none.

        Raises:
            ArtifactError: the folder is that of another run.
        """
        if not folder.exists():
            with cls.begin(folder, identity) as parts:
                yield parts
            return
        _check_ours(folder)
        if json.loads((folder / IDENTITY).read_text()) != identity:
            raise ArtifactError(
                f"{folder} is of another model, promise, other data or columns; leave out --resume to start anew"
            )
        with _removed_at_the_end(cls(folder)) as parts:
            yield parts

    def fill(self, tables: Iterable[pa.Table], part_rows: int) -> None:
        """Append tables, `part_rows` rows at least to a part; fewer only in the last."""
        waiting: list[pa.Table] = []
        for table in tables:
            waiting.append(table)
            if sum(one.num_rows for one in waiting) >= part_rows:
                self._append(pa.concat_tables(waiting))
                waiting = []
        if waiting:
            self._append(pa.concat_tables(waiting))

    def __iter__(self) -> Iterator[pa.Table]:
        for file in self._files:
            with pa.OSFile(str(file)) as source:
                yield pa.ipc.open_file(source).read_all()

    def _append(self, table: pa.Table) -> None:
        path = self._folder / f"part-{len(self._files):06}.arrow"
        write_tables([table], path)
        self._files.append(path)
        self.n_rows += table.num_rows


@contextlib.contextmanager
def _removed_at_the_end(parts: Parts, can_stay: bool = True) -> Iterator[Parts]:
    stays = False
    try:
        yield parts
    except InputError:
        raise
    except BaseException:
        stays = can_stay and parts.n_rows > 0
        raise
    finally:
        if not stays:
            shutil.rmtree(parts._folder)


def _check_ours(folder: Path) -> None:
    if not (folder / IDENTITY).is_file():
        raise InputError(f"{folder} exists and is not of an earlier run; move it away")
