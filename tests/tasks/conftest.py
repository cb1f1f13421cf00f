"""The cases that tests/data makes (bad pictures, deliveries, hostile tars) serve the tasks' tests as well."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))
