"""Hyperparameter sweeps without a server: W&B sweep files, search by Optuna, trials as processes, the report."""
