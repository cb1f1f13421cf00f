"""Checkpoints of an unfinished run, in one layout for every strategy and any number of ranks. See `layout.py`."""

from lit_vlm.engine.checkpoint.belongs import Belongs, Consumed, plan_digest
from lit_vlm.engine.checkpoint.folder import Folder
from lit_vlm.engine.checkpoint.layout import Damaged, Index
from lit_vlm.engine.checkpoint.read import load, read_index
from lit_vlm.engine.checkpoint.write import Writer

__all__ = ["Belongs", "Consumed", "Damaged", "Folder", "Index", "Writer", "load", "plan_digest", "read_index"]
