"""Benchmark of the index: samples/s per core over LLaVA records with JPEG files, and memory by number of records.

    python -m benchmarks.index [--records 100000] [--photos 300] [--workers 1] [--memory 100000 1000000 10000000]
    python -m benchmarks.index --other WORKTREE [--records 10000] [--repeats 5]    speed beside another build, in turn

Speed is measured on a LLaVA JSONL file in Korean and English with one 640 x 480 JPEG per record: `--photos` different
files, hard-linked under one name per record. The tokenizer is the tiny one: byte-level BPE with few merges, so the same text
has about three times the tokens of Qwen's tokenizer. Memory is that of a process that builds the index of text-only
records, generated as they are read, and then loads it. Each number of records has a separate process. `--memory` without a
number leaves the memory's figures as they are. The result goes to benchmarks/results/index.json with versions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

import numpy as np
from PIL import Image, ImageFilter

from lit_vlm.config.schema import ModelConfig, SourceConfig
from lit_vlm.data.index.build import build_index
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.data.index.verify import verify_images
from lit_vlm.data.processor import Processor
from lit_vlm.data.sources import open_source
from lit_vlm.distributed.trainer import disable_library_warnings
from lit_vlm.model.spec import load_model_spec
from lit_vlm.model.tiny import make_tiny_parts
from lit_vlm.runs.run_folder import get_package_versions
from lit_vlm.types import Language, Message, Role, Sample, SampleKind

KOREAN = "사진 거리 사람 자동차 빨간 파란 건물 나무 하늘 가게 앞에 서 있는 모습이 보입니다 왼쪽 오른쪽 아침 시장 간판 글자".split()
ENGLISH = (
    "the a picture street people car red blue building tree sky shop front standing left right morning sign".split()
)
TURNS = (1, 1, 2, 3, 5)  # number of turns of a record, sampled uniformly
NUM_VERIFIED = 2000  # number of records whose images are decoded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--photos", type=int, default=300)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--memory", type=int, nargs="*", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument(
        "--other", type=Path, help="root of another build; its figures are printed, and no file is written here"
    )
    parser.add_argument("--repeats", type=int, default=5, help="with --other")
    # child process: measure the memory of one size in this folder
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    disable_library_warnings()
    if arguments.child:
        print(json.dumps(measure_memory(arguments.memory[0], arguments.child)))
        return
    if arguments.other:
        print(compare_builds(arguments.other, arguments.records, arguments.photos, arguments.repeats))
        return
    out = Path(__file__).parent / "results" / "index.json"
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "speed": measure_speed(Path(folder), arguments.records, arguments.photos, arguments.workers),
            "memory": [measure_memory_in_subprocess(number) for number in arguments.memory]
            or json.loads(out.read_text())["memory"],
            "machine": describe_machine(),
            "versions": get_package_versions(),
        }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print_result(result)


def compare_builds(other: Path, records: int, photos: int, repeats: int) -> str:
    """Measure the speed of this build and of another one in turn; return a Markdown table of medians and ratios.

    Each build measures itself, in copies of both trees, because this module writes its result beside itself.
    """
    found: dict[str, list[dict[str, Any]]] = {"here": [], "other": []}
    with tempfile.TemporaryDirectory() as folder:
        roots = {"here": Path(folder) / "here", "other": Path(folder) / "other"}
        for name, root in (("here", Path(__file__).resolve().parents[1]), ("other", other.resolve())):
            for part in ("lit_vlm", "benchmarks", "conf"):
                shutil.copytree(root / part, roots[name] / part)
        for number in range(2 * repeats):
            name = list(roots)[number % 2]
            command = [
                sys.executable,
                "-m",
                "benchmarks.index",
                "--records",
                str(records),
                "--photos",
                str(photos),
                "--memory",
            ]
            environment = {**os.environ, "PYTHONPATH": str(roots[name])}
            subprocess.run(command, check=True, cwd=roots[name], env=environment, capture_output=True)
            result = json.loads((roots[name] / "benchmarks/results/index.json").read_text())["speed"]
            found[name].append({key: value for key, value in result.items() if key.endswith("per_second_and_core")})
    lines = ["| samples or images/s per core | here | other | ratio |", "|---|---|---|---|"]
    for key in found["here"][0]:
        here, there = (statistics.median(one[key] for one in found[name]) for name in ("here", "other"))
        lines.append(
            f"| {key.removesuffix('_per_second_and_core')} | {here:,.0f} | {there:,.0f} | {here / there:.2f} |"
        )
    return "\n".join(lines)


def measure_speed(folder: Path, records: int, photos: int, workers: int) -> dict[str, Any]:
    """Measure samples/s per core: first pass, next start, recheck of all files, and decoding."""
    make_dataset(folder / "data", records, photos)
    processor, store = make_processor(folder), folder / "store"

    def open_by_name(name: str = "llava"):
        return open_source(name, SourceConfig(path=str(folder / "data" / f"{name}.jsonl")), max_image_pixels=10**8)

    open_seconds, source = measure_seconds(open_by_name)
    build_seconds, index = measure_seconds(lambda: build_index([source], processor, store=store, workers=workers))
    restart_seconds, same_index = measure_seconds(
        lambda: build_index([source], processor, store=store, workers=workers)
    )
    recheck_seconds, _ = measure_seconds(
        lambda: build_index([source], processor, store=store, workers=workers, recheck=True)
    )
    assert len(index) == records and index.compute_digest() == same_index.compute_digest() and not index.errors
    few_source = open_by_name("few")
    decode_seconds, errors = measure_seconds(lambda: verify_images([few_source], store, workers=workers))
    assert not errors
    return {
        "records": records,
        "different_photos": photos,
        "workers": workers,
        "mean_tokens": float(index.tokens.mean()),
        "mean_image_tokens": float(index.image_tokens.mean()),
        "open_source_seconds": open_seconds,
        "index_samples_per_second_and_core": records / build_seconds / workers,
        "recheck_samples_per_second_and_core": records / recheck_seconds / workers,
        "verify_images_per_second_and_core": len(few_source) / decode_seconds / workers,
        "next_start_seconds": restart_seconds,
    }


def make_dataset(folder: Path, records: int, photos: int) -> None:
    """Write llava.jsonl with its images, and few.jsonl with its first records."""
    (folder / "originals").mkdir(parents=True)
    for i in range(photos):
        make_photo(i).save(folder / "originals" / f"{i}.jpg", quality=90)
    rng = random.Random(0)
    with open(folder / "llava.jsonl", "w", encoding="utf-8") as all_file, open(folder / "few.jsonl", "w") as few_file:
        for i in range(records):
            name = f"images/{i // 1000:05}/{i:09}.jpg"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / "originals" / f"{i % photos}.jpg", folder / name)
            line = json.dumps({"id": str(i), "image": name, "conversations": make_turns(rng)}, ensure_ascii=False)
            print(line, file=all_file)
            if i < NUM_VERIFIED:
                print(line, file=few_file)


def make_photo(seed: int) -> Image.Image:
    """Make an image of soft shapes with fine grain, which has about as many bytes as a photograph of its size."""
    rng = np.random.default_rng(seed)
    shapes = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    grain = rng.normal(0, 12, (480, 640, 1))
    pixels = np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.7))


def make_turns(draw: random.Random) -> list[dict[str, str]]:
    """Make a random conversation in Korean or English."""
    words = KOREAN if draw.random() < 0.5 else ENGLISH
    conversation = []
    for i in range(draw.choice(TURNS)):
        question, answer = (
            " ".join(draw.choices(words, k=draw.randint(*length_range))) for length_range in ((5, 15), (10, 60))
        )
        conversation.append({"from": "human", "value": ("<image>\n" if i == 0 else "") + question + "?"})
        conversation.append({"from": "gpt", "value": answer + "."})
    return conversation


class SyntheticSource:
    """Source of synthetic text-only records, made from their index."""

    def __init__(self, count: int) -> None:
        self.name, self.digest, self._count = "made", f"made-{count}", count

    def __len__(self) -> int:
        return self._count

    def origin(self, index: int) -> str:
        return f"made[{index}]"

    def digest_of(self, start: int, stop: int) -> str:
        return hashlib.sha256(f"made {start} {stop}".encode()).hexdigest()

    def __getitem__(self, index: int) -> Sample:
        messages = (
            Message(Role.user, (f"What is the number of this record, {index % 97} or {index}?",)),
            Message(Role.assistant, (f"It is {index}.",)),
        )
        return Sample(str(index), self.name, self.origin(index), SampleKind.text, Language.en, messages)


def measure_memory_in_subprocess(records: int) -> dict[str, Any]:
    """Run `measure_memory` in a subprocess."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.index", "--memory", str(records), "--child", folder]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure_memory(records: int, folder: Path) -> dict[str, Any]:
    """Measure the peak RssAnon + RssFile in MiB: before, while records are read, and while their index is loaded."""
    processor, source = make_processor(folder), SyntheticSource(records)
    build_index([SyntheticSource(1)], processor)  # creates caches that are made once, e.g. the layouts of the template
    peak, before, building = PeakMemory(), read_resident_mib(), 0.0

    def on_progress(name: str, done: int, whole: int) -> None:
        nonlocal building
        building = peak.max_mib

    with peak:
        seconds, index = measure_seconds(
            lambda: build_index([source], processor, store=folder / "store", on_progress=on_progress)
        )
        peak_loaded = peak.max_mib
    assert len(index) == records
    return {
        "records": records,
        "mib_before": before,
        "mib_peak_building": building,
        "mib_peak_with_index_loaded": peak_loaded,
        "mib_of_columns": measure_columns(index),
        "samples_per_second": records / seconds,
        "next_start_seconds": measure_seconds(lambda: build_index([source], processor, store=folder / "store"))[0],
    }


class PeakMemory:
    """Peak resident memory inside the context, sampled twenty times per second."""

    def __init__(self) -> None:
        self._max_mib, self._stopped = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._sample_memory, daemon=True)

    @property
    def max_mib(self) -> float:
        self._max_mib = max(self._max_mib, read_resident_mib())
        return self._max_mib

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample_memory(self) -> None:
        while not self._stopped.wait(0.05):
            self._max_mib = max(self._max_mib, read_resident_mib())


def read_resident_mib() -> float:
    """Read RssAnon + RssFile of this process in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile"))) / 1024


def measure_columns(index: SampleIndex) -> float:
    """Measure the size of the index columns in MiB."""
    return (sum(column.nbytes for column in index.columns.values()) + index.source_ids.nbytes) / 2**20


def make_processor(folder: Path) -> Processor:
    tower, language = make_tiny_parts(folder / "parts")
    blueprint = load_model_spec(ModelConfig(vision_tower=tower, language_model=language))
    return Processor(blueprint.tokenizer, blueprint.images)


def measure_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Measure the wall seconds of a call; return them with its result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def describe_machine() -> dict[str, Any]:
    """Describe the processor: model and number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": model, "cores": os.cpu_count()}


def print_result(result: dict[str, Any]) -> None:
    for name, value in result["speed"].items():
        print(f"{name:40} {value:12,.1f}")
    for row in result["memory"]:
        print(
            f"{row['records']:>12,} records: {row['mib_before']:,.0f} MiB before, {row['mib_peak_building']:,.0f} at most while "
            f"building, {row['mib_peak_with_index_loaded']:,.0f} with the index ({row['mib_of_columns']:,.0f} of columns) loaded; "
            f"{row['samples_per_second']:,.0f} samples/s, next start {row['next_start_seconds']:.1f} s"
        )


if __name__ == "__main__":
    main()
