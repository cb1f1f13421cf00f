"""What a run tells others about itself while it trains: `metrics.csv` always, Weights & Biases and TensorBoard when asked."""

from lit_vlm.engine.tracking.metrics_csv import MetricsCsv
from lit_vlm.engine.tracking.tracking import Tracking

__all__ = ["MetricsCsv", "Tracking"]
