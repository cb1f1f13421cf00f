"""Mixtures of every format on real photographs, and helpers to prepare and read them."""

import io
import json
import os
import tarfile
from pathlib import Path

from delivery import label, make_zip
from run_helpers import (
    PHOTOS,
    TINY,
    RunOutput,
    build_data,
    make_conversations,
    make_llava_record,
    save_photos,
    write_records,
)

from lit_vlm.config import parse
from lit_vlm.data.datamodule import DataModule
from lit_vlm.tasks.prepare import prepare

SIZES = {"llava": 24, "messages": 12, "bytes": 8, "sharegpt": 16, "tar": 8, "zips": 8}


def make_files(folder: Path) -> Path:
    """Write files in six formats over the four photographs, in both languages, with `SIZES` records."""
    photos = save_photos(folder / "images")
    write_records(folder / "llava.json", make_conversations(SIZES["llava"]))
    write_records(folder / "messages.jsonl", [_make_messages_record(i) for i in range(SIZES["messages"])])
    write_records(folder / "bytes.parquet", [_make_messages_record(i, photos) for i in range(SIZES["bytes"])])
    talk = [make_llava_record(f"{i} 더하기 {i}?", f"{2 * i}입니다.", "Sure?", "Yes.") for i in range(SIZES["sharegpt"])]
    write_records(folder / "sharegpt.jsonl", [{"system": "Be brief."} | record for record in talk])
    with tarfile.open(folder / "shard.tar", "w") as shard:
        for i in range(SIZES["tar"]):
            photo = photos / PHOTOS[i % 4]
            for name, data in ((f"{i:03}{photo.suffix}", photo.read_bytes()), (f"{i:03}.txt", f"{i}번 사진".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
    pictures = [(f"그림/{i}.jpg", (photos / PHOTOS[0]).read_bytes()) for i in range(SIZES["zips"])]
    labels = [(f"그림/{i}.json", label({"q": f"{i}번은?", "answer": f"{i}층 탑"})) for i in range(SIZES["zips"])]
    make_zip(folder / "delivery" / "TS_사진.zip", pictures, "cp949")
    make_zip(folder / "delivery" / "TL_사진.zip", labels, "cp949")
    return folder


def _make_messages_record(number: int, photos: Path | None = None) -> dict:
    name = PHOTOS[number % 4]
    question = [{"type": "image", "text": None}, {"type": "text", "text": f"Number {number}?"}]
    image = name if photos is None else {"bytes": (photos / name).read_bytes(), "path": None}
    answer = [{"type": "text", "text": f"It is {number}."}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [image]}


def build_sources(folder: Path, **changes: dict) -> dict[str, dict]:
    """Return the settings of the six sources, each updated with its `changes`."""
    images = str(folder / "images")
    mapping = {"questions": ["{q}"], "answer": "{answer}"}
    sources = {
        "llava": {"path": str(folder / "llava.json"), "image_root": images},
        "messages": {"path": str(folder / "messages.jsonl"), "image_root": images},
        "bytes": {"path": str(folder / "bytes.parquet")},
        "sharegpt": {"path": str(folder / "sharegpt.jsonl"), "format": "sharegpt"},
        "tar": {"path": str(folder / "shard.tar"), "prompts": ["무엇인가요?"]},
        "zips": {"path": str(folder / "delivery"), "format": "mapped", "mapping": mapping},
    }
    return {name: source | changes.get(name, {}) for name, source in sources.items()}


def parse_sft_run(*overrides: str):
    return parse([*TINY, "stage=sft", *overrides])


def run_prepare(*overrides: str) -> RunOutput:
    """Run `python run.py task=prepare <overrides>` in this process."""
    job = parse_sft_run(*overrides, "task=prepare")
    prepare(job)
    return RunOutput(job.dir)


def build_datamodule(*overrides: str) -> DataModule:
    """Build the data module as task=train does."""
    job = parse_sft_run(*overrides)
    return build_data(job).training_data


def list_sample_names(index, samples) -> list[str]:
    """Return `source/position` of each sample."""
    return [f"{index.sources[index.source_ids[i]].name}/{index.position[i]}" for i in samples]


def read_json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def zero_second_half(path: Path) -> None:
    """Overwrite half of the file with zeros. Size and time stay, so the damage shows only when it is decoded."""
    length = path.stat().st_size
    write_zeros(path, length // 2, length - length // 2)


def write_zeros(path: Path, at: int, length: int) -> None:
    status, data = path.stat(), bytearray(path.read_bytes())
    data[at : at + length] = bytes(length)
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
