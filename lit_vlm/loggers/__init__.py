"""Loggers of a run: `metrics.csv` always, Weights & Biases and TensorBoard on request."""

from lit_vlm.loggers.metrics_csv import MetricsCsv
from lit_vlm.loggers.tracker import RunTracker

__all__ = ["MetricsCsv", "RunTracker"]
