"""The meta-learning: engine, networks and the training of a preset."""

from mdml_fast.meta.engine import MetaEngine
from mdml_fast.meta.gradients import MetaGradients
from mdml_fast.meta.scheduler import MetaScheduler

__all__ = ["MetaEngine", "MetaGradients", "MetaScheduler"]
