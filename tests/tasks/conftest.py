"""Adds tests/data to the path: its cases (bad images, deliveries, hostile tars) are used by the tests of tasks too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))
