"""Write 200 records in each supported data format, with images made from a seed."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

NUM_RECORDS, NUM_PICTURES = 200, 24
QUESTIONS = ("무엇이 보이나요?", "What is in the picture?", "글자를 읽어 주세요.", "How many are there?", "색은요?")
ANSWERS = (
    "빨간 원 하나와 별 두 개",
    "A cat sits beside a box.",
    "대한민국 서울특별시",
    "three",
    "파란색입니다. 조금 어두워요.",
)


def write_forms(folder: Path) -> dict[str, dict]:
    """Write every format below `folder`. Return format -> settings of a source that reads it."""
    names = write_pictures(folder)
    forms = {
        "llava": write_llava(folder, names),
        "sharegpt": write_sharegpt(folder, names),
        "messages_parts": write_messages_in_parts(folder, names),
        "messages_parquet": write_messages_in_parquet(folder, names),
        "openai": write_openai(folder, names),
        "preference_text": write_preference_text(folder, names),
        "preference_messages": write_preference_messages(folder, names),
        "caption": write_captions(folder, names),
        "webdataset": write_webdataset(folder, names),
        "zipped_pictures": write_zipped_pictures(folder, names),
        "markup": write_markup(folder, names),
    }
    return forms


def write_pictures(folder: Path) -> list[str]:
    """Write PNG images, of which every decoder gives the same pixels; from one tile to many, wide and tall."""
    rng = np.random.default_rng(7)
    (folder / "pictures").mkdir(parents=True)
    names = []
    for number in range(NUM_PICTURES):
        height, width = (int(side) for side in rng.integers(20, 260, 2))
        coarse = rng.integers(0, 256, (max(1, height // 8), max(1, width // 8), 3), dtype=np.uint8)
        name = f"그림 {number}.png" if number % 5 == 0 else f"{number}.png"
        Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST).save(folder / "pictures" / name)
        names.append(name)
    return names


def sample_turns(rng: Random) -> list[tuple[str, str]]:
    return [
        (rng.choice(QUESTIONS), " ".join(rng.choices(ANSWERS, k=rng.randint(1, 6)))) for _ in range(rng.randint(1, 3))
    ]


def sample_pictures(rng: Random, names: list[str]) -> list[str]:
    return rng.sample(names, rng.choice((0, 1, 1, 1, 2)))


def write_lines(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, records: list[dict]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(records), path)
    return str(path)


def write_llava(folder: Path, names: list[str]) -> dict:
    rng, records = Random(1), []
    for number in range(NUM_RECORDS):
        pictures, turns = sample_pictures(rng, names), []
        for index, (question, answer) in enumerate(sample_turns(rng)):
            marks = "<image>" * len(pictures) + "\n" if index == 0 and pictures else ""
            turns += [{"from": "human", "value": marks + question}, {"from": "gpt", "value": answer}]
        if number % 7 == 0:
            turns.insert(0, {"from": "system", "value": "짧게 답하세요."})
        images = {"image": pictures[0] if len(pictures) == 1 else pictures} if pictures else {}
        records.append({"id": str(number), **images, "conversations": turns})
    path = folder / "llava.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return {"path": str(path), "image_root": str(folder / "pictures")}


def write_sharegpt(folder: Path, names: list[str]) -> dict:
    rng, records = Random(2), []
    for number in range(NUM_RECORDS):
        pictures, turns = sample_pictures(rng, names), []
        for index, (question, answer) in enumerate(sample_turns(rng)):
            marks = "<image>" * len(pictures) if index == 0 else ""
            turns += [{"from": "human", "value": marks + question}, {"from": "gpt", "value": answer}]
        record = {"images": pictures, "conversations": turns}
        records.append(record | ({"system": "Answer briefly."} if number % 3 == 0 else {}))
    path = write_lines(folder / "sharegpt.jsonl", records)
    return {"path": path, "image_root": str(folder / "pictures"), "format": "sharegpt"}


def make_messages(rng: Random, parts: list[dict]) -> list[dict]:
    messages = []
    for index, (question, answer) in enumerate(sample_turns(rng)):
        prompt_parts = [*(parts if index == 0 else []), {"type": "text", "text": question}]
        messages += [
            {"role": "user", "content": prompt_parts},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    return messages


def write_messages_in_parts(folder: Path, names: list[str]) -> dict:
    rng = Random(3)
    records = [
        {"messages": make_messages(rng, [{"type": "image", "path": name} for name in sample_pictures(rng, names)])}
        for _ in range(NUM_RECORDS)
    ]
    return {"path": write_lines(folder / "parts.jsonl", records), "image_root": str(folder / "pictures")}


def write_messages_in_parquet(folder: Path, names: list[str]) -> dict:
    """Write messages whose content is plain text, with images as bytes in a column."""
    rng, records = Random(4), []
    for _ in range(NUM_RECORDS):
        pictures, messages = sample_pictures(rng, names), []
        for question, answer in sample_turns(rng):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        images = [{"bytes": (folder / "pictures" / name).read_bytes(), "path": None} for name in pictures]
        records.append({"messages": messages, "images": images})
    return {"path": write_parquet(folder / "messages.parquet", records)}


def write_openai(folder: Path, names: list[str]) -> dict:
    rng = Random(5)
    records = [
        {
            "messages": make_messages(
                rng, [{"type": "image_url", "image_url": {"url": name}} for name in sample_pictures(rng, names)]
            )
        }
        for _ in range(NUM_RECORDS)
    ]
    return {"path": write_lines(folder / "openai.jsonl", records), "image_root": str(folder / "pictures")}


def write_preference_text(folder: Path, names: list[str]) -> dict:
    rng, records = Random(6), []
    for _ in range(NUM_RECORDS):
        answer = rng.choice(ANSWERS)
        pair = {"prompt": rng.choice(QUESTIONS), "chosen": answer, "rejected": f"{answer} {rng.choice(ANSWERS)}"}
        records.append({"image": rng.choice(names), **pair})
    return {"path": write_lines(folder / "pairs.jsonl", records), "image_root": str(folder / "pictures")}


def write_preference_messages(folder: Path, names: list[str]) -> dict:
    rng, records = Random(8), []
    for _ in range(NUM_RECORDS):
        pictures, answer = sample_pictures(rng, names), rng.choice(ANSWERS)
        prompt_parts = [*({"type": "image"} for _ in pictures), {"type": "text", "text": rng.choice(QUESTIONS)}]
        answers = {"chosen": answer, "rejected": rng.choice([each for each in ANSWERS if each != answer])}
        sampled_answers = {key: [{"role": "assistant", "content": text}] for key, text in answers.items()}
        records.append({"images": pictures, "prompt": [{"role": "user", "content": prompt_parts}], **sampled_answers})
    path = write_lines(folder / "pairs_of_messages.jsonl", records)
    return {"path": path, "image_root": str(folder / "pictures")}


def write_captions(folder: Path, names: list[str]) -> dict:
    rng = Random(9)
    records = [{"image": rng.choice(names), "caption": f"{rng.choice(ANSWERS)} {n}"} for n in range(NUM_RECORDS)]
    path = write_lines(folder / "captions.jsonl", records)
    return {"path": path, "image_root": str(folder / "pictures"), "prompts": [*QUESTIONS[:2]]}


def write_webdataset(folder: Path, names: list[str]) -> dict:
    rng = Random(10)
    (folder / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(folder / "shards" / f"{shard:03}.tar", "w") as archive:
            for number in range(NUM_RECORDS // 2):
                picture = (folder / "pictures" / rng.choice(names)).read_bytes()
                for ending, content in (("png", picture), ("txt", rng.choice(ANSWERS).encode())):
                    member = tarfile.TarInfo(f"{number:06}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return {"path": str(folder / "shards"), "prompts": [QUESTIONS[0]]}


def write_zipped_pictures(folder: Path, names: list[str]) -> dict:
    (folder / "zips").mkdir()
    with zipfile.ZipFile(folder / "zips" / "pictures.zip", "w") as archive:
        for name in names:
            archive.write(folder / "pictures" / name, name)
    mapping = {"labels": None, "answer": "{@stem}"}  # each picture is a record
    return {"path": str(folder / "zips"), "format": "mapped", "mapping": mapping, "prompts": [*QUESTIONS]}


def write_markup(folder: Path, names: list[str]) -> dict:
    rng, records = Random(11), []
    for _ in range(NUM_RECORDS):
        x, y = round(rng.uniform(0, 0.4), 3), round(rng.uniform(0, 0.4), 3)
        box = f"<bbox>{x}, {y}, {round(x + 0.3, 3)}, {round(y + 0.2, 3)}</bbox>"
        turns = [
            {"from": "human", "value": f"<image>\n<gro> {rng.choice(QUESTIONS)}"},
            {"from": "gpt", "value": f"<obj>{rng.choice(ANSWERS)}</obj>{box}가 있습니다."},
        ]
        records.append({"image": rng.choice(names), "conversations": turns})
    path = write_lines(folder / "markup.jsonl", records)
    return {"path": path, "image_root": str(folder / "pictures"), "kind": "grounding", "markup": "on"}
