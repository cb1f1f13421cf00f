"""Benchmark of task=view: seconds until the first page of its list, over an index of many samples.

    python -m benchmarks.viewer [--samples 10000000]

The index is synthetic, with the columns of a real one, and in memory as after loading; no record is read. The application answers
in this process, without a network: `settings`, `flags` and the first page of 50 rows are what the browser asks before it shows
the list. The result goes to benchmarks/results/viewer.json with versions.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
from fastapi.testclient import TestClient

from lit_vlm.data.index.sample_index import COLUMNS, KINDS, LENGTH_POLICY_COLUMNS, SampleIndex
from lit_vlm.viewer.curated import CuratedList
from lit_vlm.viewer.flags import FlaggedSource, RecordFlags
from lit_vlm.viewer.pages import create_view_app
from lit_vlm.viewer.samples import SampleTable

RESULT = Path(__file__).parent / "results" / "viewer.json"
NUM_SOURCES = 8
NUM_FOUND = 100_000  # records in a list of task=curate


class CountedSource:
    """Source that has a number of records and reads none."""

    def __init__(self, name: str, num_records: int) -> None:
        self.name, self.digest, self._num_records = name, name, num_records

    def __len__(self) -> int:
        return self._num_records

    def __getitem__(self, position: int) -> Any:
        raise AssertionError("a record was read")


def make_index(num_samples: int) -> SampleIndex:
    """Make an index of samples of `NUM_SOURCES` sources of equal size."""
    rng = np.random.default_rng(0)
    share = num_samples // NUM_SOURCES
    columns: dict[str, np.ndarray] = {
        name: np.zeros(num_samples, kind) for name, kind in (COLUMNS | LENGTH_POLICY_COLUMNS).items()
    }
    columns["position"][:] = np.arange(num_samples) % share
    columns["tokens"][:] = rng.integers(20, 4096, num_samples, dtype=np.int32)
    columns["kind"][:] = rng.integers(0, len(KINDS), num_samples, dtype=np.uint8)
    columns["language"][:] = rng.integers(0, 2, num_samples, dtype=np.uint8)
    columns["digest"][:] = rng.integers(0, 2**63, num_samples, dtype=np.uint64)
    sources: list[Any] = [CountedSource(f"source_{number}", share) for number in range(NUM_SOURCES)]
    return SampleIndex(sources, np.minimum(np.arange(num_samples) // share, NUM_SOURCES - 1).astype(np.int16), columns)


def measure(num_samples: int, folder: Path) -> dict[str, float]:
    """Measure the seconds of each request, in the order of the page."""
    index = make_index(num_samples)
    flags = RecordFlags(folder, {source.name: FlaggedSource(source) for source in index.sources})
    positions = np.random.default_rng(1).choice(num_samples // NUM_SOURCES, min(NUM_FOUND, num_samples // 16), False)
    found = CuratedList.from_lines({"source": "source_3", "position": each, "evidence": "same"} for each in positions)
    table = SampleTable({"training": index}, None, flags, {"duplicates": found})  # type: ignore[arg-type]
    requests = {
        "settings": "settings",
        "flags": "flags",
        "first page": "samples?limit=50",
        "last page": f"samples?limit=50&offset={num_samples - 50}",
        "by kind, language and length": "samples?kind=ocr&language=ko&min_tokens=1000&limit=50",
        "by a list of task=curate": "samples?curated=duplicates&limit=50",
        "duplicates of the index": "samples?duplicates=true&limit=50",
    }
    seconds = {}
    with TestClient(create_view_app(table, "benchmark")) as client:
        client.get("/")
        for name, path in requests.items():
            start = time.perf_counter()
            assert client.get(f"/view/{path}").status_code == 200, path
            seconds[name] = round(time.perf_counter() - start, 4)
    return seconds | {"until the list is shown": round(sum(list(seconds.values())[:3]), 4)}


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000)
    num_samples = parser.parse_args().samples
    seconds = measure(num_samples, RESULT.parent / "no_flags")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    result = {"samples": num_samples, "seconds": seconds, "peak_memory_gb": round(peak, 2)}
    result["versions"] = {"python": platform.python_version(), "numpy": np.__version__}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, value in seconds.items():
        print(f"{name:32} {value:8.3f} s")
    print(f"{num_samples:,} samples, peak memory {peak:.2f} GB")


if __name__ == "__main__":
    main()
