"""Sweeps without a server: W&B's sweep files, the search for values, the trials as processes, the page about them."""
