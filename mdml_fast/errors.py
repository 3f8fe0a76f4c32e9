"""What goes wrong for reasons that the user can mend."""


class InputError(ValueError):
    """Bad input: one line that says what is wrong, where, and what to do."""


class ArtifactError(InputError):
    """A model directory or checkpoint that is damaged, foreign or made by another version."""


class MissingValuesWarning(UserWarning):
    """Values are missing where none were in training: what they would tell is not known, and does not look strange."""


def first_line(error: BaseException) -> str:
    """What an exception says, without the lines of detail."""
    return str(error).strip().split("\n")[0]
