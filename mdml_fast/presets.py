"""The named configurations of the detector, and the algorithm that each belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mdml_fast.errors import InputError
from mdml_fast.meta.default import DefaultConfig, DefaultModel
from mdml_fast.meta.paper import PaperConfig, PaperModel

Config = DefaultConfig | PaperConfig
ModelClass = type[DefaultModel] | type[PaperModel]

PRESETS: dict[str, Config] = {"default": DefaultConfig(), "paper": PaperConfig()}


def preset_config(preset: str | Config) -> Config:
    """The constants of a preset, given by name or as they are.

    Raises:
        InputError: there is no preset of that name.
    """
    if not isinstance(preset, str):
        return preset
    if preset not in PRESETS:
        raise InputError(f"there is no preset {preset!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[preset]


def algorithm(config: Config) -> str:
    """The preset whose algorithm the constants belong to."""
    return "default" if isinstance(config, DefaultConfig) else "paper"


def model_class(config: Config) -> Any:
    """The model that these constants are of: `fit` and `from_tensors` take them."""
    return DefaultModel if isinstance(config, DefaultConfig) else PaperModel


def config_from_json(name: str, document: Mapping[str, Any]) -> Config:
    """The inverse of `dataclasses.asdict` for the algorithm of that name, also after a way through JSON.

    Raises:
        KeyError, TypeError: there is none, or it has other constants.
    """
    readers: dict[str, Callable[[Mapping[str, Any]], Config]] = {
        "default": DefaultConfig.from_json,
        "paper": PaperConfig.from_json,
    }
    return readers[name](document)
