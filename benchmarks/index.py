"""The index: samples/s on one core over LLaVA records with real JPEG files, and memory while it is built, by number of records.

    python -m benchmarks.index [--records 100000] [--photos 300] [--workers 1] [--memory 100000 1000000 10000000]

The speed is that of a LLaVA JSONL file in Korean and English with one 640 x 480 JPEG a record: `--photos` different
ones under hard-linked names, one name a record. The tokenizer is the tiny one: byte-level BPE with few merges, hence
some three times the tokens of Qwen's for the same text. The memory is that of a process that builds the index of
text-only records, made as they are read, and then loads it; each number of records in a process of its own. The result
goes to benchmarks/results/index.json with versions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
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
from lit_vlm.data.index.columns import Index
from lit_vlm.data.index.store import build_index
from lit_vlm.data.index.verify import verify
from lit_vlm.data.processor import Processor
from lit_vlm.data.sources import open_source
from lit_vlm.engine.run_folder import versions
from lit_vlm.engine.trainer import quiet
from lit_vlm.model.build import draw_up
from lit_vlm.model.tiny import tiny_parts
from lit_vlm.types import Kind, Language, Message, Role, Sample

KOREAN = "사진 거리 사람 자동차 빨간 파란 건물 나무 하늘 가게 앞에 서 있는 모습이 보입니다 왼쪽 오른쪽 아침 시장 간판 글자".split()
ENGLISH = (
    "the a picture street people car red blue building tree sky shop front standing left right morning sign".split()
)
TURNS = (1, 1, 2, 3, 5)  # of a record, drawn evenly
VERIFIED = 2000  # records of which the pictures are decoded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--photos", type=int, default=300)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--memory", type=int, nargs="*", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # measures the memory of one size in this folder
    arguments = parser.parse_args()
    quiet()
    if arguments.child:
        print(json.dumps(memory_of(arguments.memory[0], arguments.child)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "speed": speed(Path(folder), arguments.records, arguments.photos, arguments.workers),
            "memory": [in_a_process(number) for number in arguments.memory],
            "machine": machine(),
            "versions": versions(),
        }
    out = Path(__file__).parent / "results" / "index.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    show(result)


def speed(folder: Path, records: int, photos: int, workers: int) -> dict[str, Any]:
    """Samples/s and core of the first pass, of the next start, of a look at all files, and of decoding."""
    make_dataset(folder / "data", records, photos)
    processor, store = processor_of(folder), folder / "store"

    def opened(name: str = "llava"):
        return open_source(name, SourceConfig(path=str(folder / "data" / f"{name}.jsonl")), max_image_pixels=10**8)

    opening, source = timed(opened)
    first, index = timed(lambda: build_index([source], processor, store=store, workers=workers))
    again, same = timed(lambda: build_index([source], processor, store=store, workers=workers))
    recheck, _ = timed(lambda: build_index([source], processor, store=store, workers=workers, recheck=True))
    assert len(index) == records and index.digest() == same.digest() and not index.errors
    few = opened("few")
    decoding, broken = timed(lambda: verify([few], store, workers=workers))
    assert not broken
    return {
        "records": records,
        "different_photos": photos,
        "workers": workers,
        "mean_tokens": float(index.tokens.mean()),
        "mean_image_tokens": float(index.image_tokens.mean()),
        "open_source_seconds": opening,
        "index_samples_per_second_and_core": records / first / workers,
        "recheck_samples_per_second_and_core": records / recheck / workers,
        "verify_images_per_second_and_core": len(few) / decoding / workers,
        "next_start_seconds": again,
    }


def make_dataset(folder: Path, records: int, photos: int) -> None:
    """llava.jsonl and its pictures, and few.jsonl with its first records."""
    (folder / "originals").mkdir(parents=True)
    for number in range(photos):
        photo(number).save(folder / "originals" / f"{number}.jpg", quality=90)
    draw = random.Random(0)
    with open(folder / "llava.jsonl", "w", encoding="utf-8") as whole, open(folder / "few.jsonl", "w") as few:
        for number in range(records):
            name = f"images/{number // 1000:05}/{number:09}.jpg"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / "originals" / f"{number % photos}.jpg", folder / name)
            line = json.dumps({"id": str(number), "image": name, "conversations": turns(draw)}, ensure_ascii=False)
            print(line, file=whole)
            if number < VERIFIED:
                print(line, file=few)


def photo(seed: int) -> Image.Image:
    """Soft shapes under fine grain: about as many bytes as a photograph of its size."""
    draw = np.random.default_rng(seed)
    shapes = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    grain = draw.normal(0, 12, (480, 640, 1))
    pixels = np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.7))


def turns(draw: random.Random) -> list[dict[str, str]]:
    words = KOREAN if draw.random() < 0.5 else ENGLISH
    conversation = []
    for number in range(draw.choice(TURNS)):
        question, answer = (" ".join(draw.choices(words, k=draw.randint(*most))) for most in ((5, 15), (10, 60)))
        conversation.append({"from": "human", "value": ("<image>\n" if number == 0 else "") + question + "?"})
        conversation.append({"from": "gpt", "value": answer + "."})
    return conversation


class Made:
    """Text-only records out of their numbers."""

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
        return Sample(str(index), self.name, self.origin(index), Kind.text, Language.en, messages)


def in_a_process(records: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.index", "--memory", str(records), "--child", folder]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def memory_of(records: int, folder: Path) -> dict[str, Any]:
    """Peaks of RssAnon + RssFile in MiB: before, while records are read, and while their index is loaded."""
    processor, source = processor_of(folder), Made(records)
    build_index([Made(1)], processor)  # what is made once, like the template's layouts
    peak, before, building = Peak(), resident(), 0.0

    def on_progress(name: str, done: int, whole: int) -> None:
        nonlocal building
        building = peak.so_far

    with peak:
        seconds, index = timed(
            lambda: build_index([source], processor, store=folder / "store", on_progress=on_progress)
        )
        in_all = peak.so_far
    assert len(index) == records
    return {
        "records": records,
        "mib_before": before,
        "mib_peak_building": building,
        "mib_peak_with_index_loaded": in_all,
        "mib_of_columns": columns_of(index),
        "samples_per_second": records / seconds,
        "next_start_seconds": timed(lambda: build_index([source], processor, store=folder / "store"))[0],
    }


class Peak:
    """The most memory that was resident while it is entered, sampled twenty times a second."""

    def __init__(self) -> None:
        self._most, self._over = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def so_far(self) -> float:
        self._most = max(self._most, resident())
        return self._most

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self._most = max(self._most, resident())


def resident() -> float:
    """RssAnon + RssFile of this process in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile"))) / 1024


def columns_of(index: Index) -> float:
    return (sum(column.nbytes for column in index.columns.values()) + index.source_of.nbytes) / 2**20


def processor_of(folder: Path) -> Processor:
    tower, language = tiny_parts(folder / "parts")
    blueprint = draw_up(ModelConfig(vision_tower=tower, language_model=language))
    return Processor(blueprint.tokenizer, blueprint.images)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": model, "cores": os.cpu_count()}


def show(result: dict[str, Any]) -> None:
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
