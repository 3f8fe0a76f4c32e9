"""The named configurations of the detector."""

from __future__ import annotations

from mdml_fast.errors import InputError
from mdml_fast.meta.paper import PaperConfig

# "default" names the recommended algorithm. There is one so far, and it is the paper's.
PRESETS = {"default": PaperConfig(), "paper": PaperConfig()}


def preset_config(preset: str | PaperConfig) -> PaperConfig:
    """The constants of a preset, given by name or as they are.

    Raises:
        InputError: there is no preset of that name.
    """
    if isinstance(preset, PaperConfig):
        return preset
    if preset not in PRESETS:
        raise InputError(f"there is no preset {preset!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[preset]
