"""Loggers of a run: `metrics.csv` always, Weights & Biases and TensorBoard on request."""

from lit_vlm.engine.tracking.metrics_csv import MetricsCsv
from lit_vlm.engine.tracking.tracking import RunTracker

__all__ = ["MetricsCsv", "RunTracker"]
