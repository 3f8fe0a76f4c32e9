"""The meta-learning: engine, networks and the training of a preset."""

from mdml_fast.meta.engine import MetaEngine, MetaGradients

__all__ = ["MetaEngine", "MetaGradients"]
