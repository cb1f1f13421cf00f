"""Curation of training data: which records of a mixture stay, and new turns for them."""
