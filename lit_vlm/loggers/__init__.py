"""Loggers of a run: `metrics.csv` always, Weights & Biases and TensorBoard on request."""

from lit_vlm.loggers.file_loggers import MetricsCsv
from lit_vlm.loggers.tracker import RunTracker

__all__ = ["MetricsCsv", "RunTracker"]
