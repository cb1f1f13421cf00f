"""Make a parquet file of ICDAR 2013 or 2015 from the two folders that its organisers give out.

    python prepare_icdar.py PICTURES GROUND_TRUTH icdar2015.parquet

`img_1.jpg` belongs to `gt_img_1.txt`. The file has the columns image and ground_truth, as the YAML beside this script needs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PICTURES = {".jpg", ".jpeg", ".png"}


def prepare_icdar(pictures: Path, ground_truth: Path, target: Path) -> int:
    """Write the parquet file and return its number of rows.

    Raises:
        SystemExit: there is no picture, or a picture has no ground truth.
    """
    found = sorted(path for path in pictures.iterdir() if path.suffix.lower() in PICTURES)
    texts = [ground_truth / f"gt_{path.stem}.txt" for path in found]
    missing = [text.name for text in texts if not text.is_file()]
    if missing or not found:
        reason = (
            f"{len(missing)} of {len(found)} pictures lack their file, first {missing[0]}" if missing else "no picture"
        )
        raise SystemExit(f"{pictures}, {ground_truth}: {reason}. Each img_1.jpg needs gt_img_1.txt.")
    rows = [
        {
            "image": {"bytes": path.read_bytes(), "path": path.name},
            "ground_truth": text.read_text(encoding="utf-8-sig"),
        }
        for path, text in zip(found, texts, strict=True)
    ]
    features = (
        '{"info": {"features": {"image": {"_type": "Image"}, "ground_truth": {"dtype": "string", "_type": "Value"}}}}'
    )
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": features}), target)
    return len(rows)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(f"usage: python {sys.argv[0]} PICTURES GROUND_TRUTH OUT.parquet")
    print(f"{prepare_icdar(*map(Path, sys.argv[1:]))} rows in {sys.argv[3]}")
