"""Checkpoints of an unfinished run, in one layout for every strategy and any number of ranks. See `index.py`."""
