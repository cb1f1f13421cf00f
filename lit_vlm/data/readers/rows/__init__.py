"""Random access to rows of files that do not fit into memory.

JSON is read by byte offsets, tar files by the offsets of their members; parquet and Arrow are memory-mapped. One pass
over a file finds the offsets. With a cache folder they are stored, so no later run repeats this pass (`stored`).
"""

from lit_vlm.data.readers.rows.base import JoinedRows, Rows

__all__ = ["JoinedRows", "Rows"]
