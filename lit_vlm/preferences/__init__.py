"""Curation of training data with a model: preference pairs."""
