"""Rows by position, out of files that do not fit into memory.

JSON is read by byte offsets, tar files by the offsets of their members, parquet and Arrow are memory-mapped. The
offsets are found in one pass and, given a folder to keep them in, in one pass for good (`stored`).
"""

from lit_vlm.data.readers.rows.base import JoinedRows, Rows

__all__ = ["JoinedRows", "Rows"]
