"""Access to private parts of other packages, one module for each package; `tests/compat` checks them for the pinned releases.

No other code of this project may read a private attribute of another package (`tests/test_layers.py`).
"""
