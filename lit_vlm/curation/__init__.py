"""Curation of training data: which records of a mixture stay, found without a model."""
