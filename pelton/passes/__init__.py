"""Rewrites of the graph. See docs/add-a-pass.md."""

from .bind_types import bind_types
from .pipeline import PIPELINE, Pass, pipeline, run_passes

__all__ = ["PIPELINE", "Pass", "bind_types", "pipeline", "run_passes"]
