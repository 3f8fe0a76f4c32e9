"""What goes wrong for reasons that the user can mend."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input: one line that says what is wrong, where, and what to do."""


class RowError(InputError):
    """Bad input that is first met in one row.

    Args:
        what: is wrong, and where.
        row: the first, counted from 1.
        advice: the rest of the line.
    """

    def __init__(self, what: str, row: int, advice: str) -> None:
        super().__init__(what, row, advice)
        self.what, self.row, self.advice = what, row, advice

    def __str__(self) -> str:
        return f"{self.what} (first in row {self.row}){self.advice}"


@contextlib.contextmanager
def rows_of(source: object, n_before: int, n_rows: int) -> Iterator[None]:
    """Bad input within is in this batch of rows of a source; the rows that it names are counted in that."""
    try:
        yield
    except InputError as error:
        if isinstance(error, RowError):
            error = RowError(error.what, n_before + error.row, error.advice)
        where = f"in rows {n_before + 1} to {n_before + n_rows} of {source}: " if n_before else ""
        raise InputError(f"{where}{error}") from error


class ArtifactError(InputError):
    """A model directory or checkpoint that is damaged, foreign or made by another version."""


class MissingValuesWarning(UserWarning):
    """Values are missing where none were in training: what they would tell is not known, and does not look strange."""


def first_line(error: BaseException) -> str:
    """What an exception says, without the lines of detail."""
    return str(error).strip().split("\n")[0]
