"""Loggers of a run: `metrics.csv` always, Weights & Biases and TensorBoard on request."""
