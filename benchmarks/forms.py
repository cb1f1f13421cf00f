"""Benchmark of the forms of data: records read and rows per CPU second, against the same file read with `datasets` or pandas.

    python -m benchmarks.forms [--records 10000] [--repeats 3]

Each form is written once, with a few small images that all records share, and opened with `format=auto`. Measured is the CPU
time of this process from opening the file to the last record, without decoding an image: offsets, parsing, all checks, and the
texts in parts. The other library reads the same file and gives each row as a dict, without any check: in order, and (with
`datasets`) by position, as training reads records. Both begin without a cache, so both convert a parquet file to Arrow; by
position `datasets` reads the Arrow file that it wrote before. Medians of several repeats, this project and the other library in
turn. The result goes to benchmarks/results/forms.json with versions.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import json
import os
import random
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

import datasets
import pandas
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from benchmarks.index import ENGLISH, KOREAN, describe_machine
from lit_vlm.config.schema import ColumnsConfig, SourceConfig
from lit_vlm.data.sources import open_source
from lit_vlm.runs.run_folder import get_package_versions

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        rows = [measure_form(form, Path(name, form), arguments.records, arguments.repeats) for form in FORMS]
    result = {"forms": rows, "machine": describe_machine(), "versions": get_package_versions()}
    out = Path(__file__).parent / "results" / "forms.json"
    out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(
        "| form | records | rows per CPU second | in order | ratio | by position | ratio |\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row['form']} | {row['records']:,} | {row['rows_per_cpu_second']:,.0f} | "
            f"{row['library']}: {row['in_order']:,.0f} | {row['rows_per_cpu_second'] / row['in_order']:.2f} | "
            + (
                f"{row['by_position']:,.0f} | {row['rows_per_cpu_second'] / row['by_position']:.2f} |"
                if row["by_position"]
                else "| |"
            )
        )


def measure_form(form: str, folder: Path, num_records: int, repeats: int) -> dict[str, Any]:
    """Measure one form with this project and with the other library."""
    folder.mkdir()
    Image.new("RGB", (64, 48), "red").save(folder / "a.jpg")
    path, settings = FORMS[form](folder, num_records)
    config = SourceConfig(path=str(path), **settings)

    def read_here() -> int:
        source = open_source("mine", config, max_image_pixels=10**8)
        for index in range(len(source)):
            source[index]
        return len(source)

    library, read_there = choose_library(path, "datasets" if form.endswith("datasets") else "pandas")
    times: dict[str, list[float]] = {"here": [], "in order": [], "by position": []}
    for repeat in range(repeats):
        for name, read in (("here", read_here), ("in order", read_there)):
            datasets.config.HF_DATASETS_CACHE = folder.parent / "cache" / f"{form} {name} {repeat}"
            seconds, num_read = measure_cpu_seconds(read)
            assert num_read == num_records, (form, name, num_read)
            times[name].append(seconds)
        if library == "datasets":
            times["by position"].append(measure_cpu_seconds(lambda: read_there(by_position=True))[0])
    records, seconds, in_order = num_records, median(times["here"]), median(times["in order"])
    by_position = median(times["by position"]) if times["by position"] else None
    return {
        "form": form,
        "records": records,
        "cpu_seconds": seconds,
        "rows_per_cpu_second": records / seconds,
        "library": library,
        "in_order": records / in_order,
        "by_position": records / by_position if by_position else None,
    }


def choose_library(path: Path, csv_library: str) -> tuple[str, Callable[..., int]]:
    """Choose how the file is read without this project: every row becomes a dict, images stay encoded."""
    if path.suffix == ".csv" and csv_library == "pandas":
        return "pandas", lambda: len(pandas.read_csv(path).to_dict("records"))

    def read_dataset(by_position: bool = False) -> int:
        if path.is_dir():
            has_tars = any(path.glob("*.tar"))
            pattern = str(path / "*.tar") if has_tars else str(path / "metadata.jsonl")
            builder = "webdataset" if has_tars else "json"
            dataset = datasets.load_dataset(builder, data_files=pattern, split="train")
        elif path.suffix == ".parquet":
            dataset = datasets.Dataset.from_parquet(str(path))
        elif path.suffix == ".csv":
            dataset = datasets.Dataset.from_csv(str(path))
        else:
            dataset = datasets.Dataset.from_json(str(path))
        for column, feature in dataset.features.items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
        if by_position:
            return len([len(dataset[index]) for index in range(len(dataset))])
        return sum(1 for _ in dataset)

    def read_texts() -> int:
        names = sorted(path.glob("**/*.jpg"))
        return len([{"image": str(name), "caption": name.with_suffix(".txt").read_text()} for name in names])

    is_text_folder = path.is_dir() and any(path.glob("**/*.txt"))
    return ("open()", read_texts) if is_text_folder else ("datasets", read_dataset)


def measure_cpu_seconds(function: Callable[[], int]) -> tuple[float, int]:
    """Measure the CPU seconds of a call in this process; return them with its result."""
    gc.collect()
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def make_texts(num_records: int) -> Iterator[tuple[str, str]]:
    """Yield a question and an answer for each record, half of them Korean."""
    rng = random.Random(0)
    for number in range(num_records):
        words = KOREAN if number % 2 else ENGLISH
        yield " ".join(rng.choices(words, k=10)) + "?", " ".join(rng.choices(words, k=40)) + "."


def write_lines(make_row: Callable[[str, str], Row], name: str = "a.jsonl") -> Callable[..., tuple[Path, Row]]:
    """Return a writer of JSON lines with a row for each question and answer."""

    def write(folder: Path, num_records: int) -> tuple[Path, Row]:
        rows = (json.dumps(make_row(*texts), ensure_ascii=False) for texts in make_texts(num_records))
        (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
        return folder if name == "metadata.jsonl" else folder / name, {}

    return write


def write_csv(folder: Path, num_records: int) -> tuple[Path, Row]:
    with open(folder / "a.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "question", "answer"])
        writer.writerows(["a.jpg", *texts] for texts in make_texts(num_records))
    return folder / "a.csv", {}


def write_columns(folder: Path, num_records: int) -> tuple[Path, Row]:
    path, _ = write_lines(lambda question, answer: {"img": "a.jpg", "q": question, "a": answer})(folder, num_records)
    return path, {"columns": ColumnsConfig(image="img", question="q", answer="a")}


def write_parquet(folder: Path, num_records: int) -> tuple[Path, Row]:
    data = (folder / "a.jpg").read_bytes()
    questions, answers = zip(*make_texts(num_records), strict=True)
    image = pa.array([{"bytes": data, "path": "a.jpg"}] * num_records)
    table = pa.table({"image": image, "question": questions, "answer": answers})
    parquet.write_table(table, folder / "a.parquet")
    return folder / "a.parquet", {}


def write_tars(folder: Path, num_records: int) -> tuple[Path, Row]:
    """Write two shards as img2dataset does, with its reports beside them."""
    data, texts = (folder / "a.jpg").read_bytes(), list(make_texts(num_records))
    shards = folder / "shards"
    shards.mkdir()
    for shard in range(2):
        with tarfile.open(shards / f"{shard:05}.tar", "w") as tar:
            for number in range(shard, num_records, 2):
                members = {"jpg": data, "txt": texts[number][1].encode(), "json": b'{"status": "success"}'}
                for ending, content in members.items():
                    entry = tarfile.TarInfo(f"{number:09}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        (shards / f"{shard:05}_stats.json").write_text("{}")
    return shards, {}


def write_text_folder(folder: Path, num_records: int) -> tuple[Path, Row]:
    (folder / "set").mkdir()
    for number, (_, answer) in enumerate(make_texts(num_records)):
        os.link(folder / "a.jpg", folder / "set" / f"{number:09}.jpg")
        (folder / "set" / f"{number:09}.txt").write_text(answer, encoding="utf-8")
    return folder / "set", {}


def make_chat(question: str, answer: str) -> list[Row]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def make_turns(question: str, answer: str) -> list[Row]:
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]


IMAGES = {"images": ["a.jpg"]}
FORMS: dict[str, Callable[[Path, int], tuple[Path, Row]]] = {
    "LLaVA, JSONL": write_lines(lambda q, a: {"image": "a.jpg", "conversations": make_turns(q, a)}),
    "MiniCPM-V": write_lines(lambda q, a: {"image": "a.jpg", "conversations": make_chat(q, a)}),
    "messages": write_lines(lambda q, a: {"messages": make_chat(f"<image>{q}", a), **IMAGES}),
    "CSV of path, question, answer": write_csv,
    "the same CSV, beside datasets": write_csv,
    "question and answer, JSONL": write_lines(lambda q, a: {"image": "a.jpg", "question": q, "answer": a}),
    "columns of other names, JSONL": write_columns,
    "parquet of image, question, answer": write_parquet,
    "Alpaca": write_lines(lambda q, a: {"instruction": q, "input": "", "output": a, **IMAGES}),
    "query and response (ms-swift)": write_lines(lambda q, a: {"query": f"<image>{q}", "response": a, **IMAGES}),
    "prompt and completion (TRL)": write_lines(lambda q, a: {"prompt": q, "completion": a, **IMAGES}),
    "The Cauldron": write_lines(lambda q, a: {"texts": [{"user": q, "assistant": a, "source": "x"}], **IMAGES}),
    "preference (TRL)": write_lines(lambda q, a: {"prompt": q, "chosen": a, "rejected": q, **IMAGES}),
    "preference (LLaMA-Factory)": write_lines(
        lambda q, a: {
            "conversations": make_turns(q, a)[:1],
            "chosen": {"from": "gpt", "value": a},
            "rejected": {"from": "gpt", "value": q},
            **IMAGES,
        }
    ),
    "preference (ms-swift)": write_lines(
        lambda q, a: {"messages": make_chat(f"<image>{q}", a), "rejected_response": q, **IMAGES}
    ),
    "imagefolder, metadata.jsonl": write_lines(lambda q, a: {"file_name": "a.jpg", "text": a}, "metadata.jsonl"),
    "pictures with .txt beside": write_text_folder,
    "img2dataset, tar": write_tars,
}


if __name__ == "__main__":
    main()
