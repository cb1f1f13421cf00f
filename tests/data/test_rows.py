"""Rows by position: files of any size are scanned once, in little memory, and have a digest by content."""

import csv
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_cases import GPT, make_llava, open_path, write
from waiting import PATIENCE

from lit_vlm.data.readers.context import split_at_markers
from lit_vlm.data.readers.rows import csv_files, json_files
from lit_vlm.data.readers.rows.base import split_range
from lit_vlm.types import Fault, RecordError, UserError

QUESTION = {"from": "human", "value": "q"}


def generate_records(count, seed=0):
    """Generate records that can confuse a scanner: brackets and quotes in text, escapes, NFC and NFD, deep and empty values."""
    rng = random.Random(seed)
    texts = ['"[{,}]" \\', "줄\n바꿈\t", "가", "\u1100\u1161", "é😀", "\\u0041", "}", "a" * 200]
    for number in range(count):
        text = "".join(rng.choice(texts) for _ in range(rng.randint(0, 12)))
        yield {"n": number, text: [text, {"x": [1, -2.5e10, None, True, [[]], {}]}], "big": 10**40}


@pytest.mark.parametrize("window", [1, 7, 64, 1000, 1 << 22])
def test_a_list_is_scanned_the_same_with_any_window_size(tmp_path, monkeypatch, window):
    monkeypatch.setattr(json_files, "_WINDOW_BYTES", window)
    for indent, ascii_, bom in ((None, True, ""), (2, False, "\ufeff"), (None, False, " \r\n\t")):
        rows = list(generate_records(40))
        (tmp_path / "a.json").write_text(bom + json.dumps(rows, indent=indent, ensure_ascii=ascii_) + " \n", "utf-8")
        found = json_files.open_json_list(tmp_path / "a.json")
        assert [found[index] for index in range(len(found))] == rows
    numbers = [1234567890, "text", True, None, [1, [2]], -1.5e-7, {}]
    (tmp_path / "b.json").write_text(json.dumps(numbers))
    spans = json_files.open_json_list(tmp_path / "b.json")._spans.array
    text = (tmp_path / "b.json").read_bytes()
    assert [json.loads(text[start:end]) for start, end in spans] == numbers


@pytest.mark.parametrize("window", [1, 5, 1 << 22])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[\n {"a": 1},\n {"가": x}]', "Expecting value at line 3, column 8"),
        ('[{"a": 1}', "Expecting ',' at line 1, column 10"),
        ('[{"a": 1},]', "Expecting value at line 1, column 11"),
        ('[{"a": 1}] x', "Extra data behind the list at line 1, column 12"),
        ('[{"a": "open]', "Unterminated string starting at at line 1, column 8"),
        ('[{"a" 1}]', "Expecting ':' delimiter at line 1, column 7"),
        ('\ufeff\n{"a": 1}', "Expecting '[' at line 2, column 1"),
        ('["a\tb"]', "Invalid control character at at line 1, column 4"),
        ("[1, 2", "Expecting ',' at line 1, column 6"),
    ],
)
def test_a_broken_list_is_refused_with_line_and_column_with_any_window_size(tmp_path, monkeypatch, window, text, words):
    monkeypatch.setattr(json_files, "_WINDOW_BYTES", window)
    (tmp_path / "a.json").write_text(text, "utf-8")
    with pytest.raises(UserError, match="a.json: not a JSON list of records") as caught:
        json_files.open_json_list(tmp_path / "a.json")
    assert words in str(caught.value)


@pytest.mark.parametrize("block", [1, 2, 3, 10, 1 << 22])
def test_lines_are_found_the_same_with_any_block_size(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_files, "_BLOCK_BYTES", block)
    rng = random.Random(block)
    for _ in range(30):
        kinds = ['{"a": 1}', "", " ", "\t \r", "  {}", '{"가": "나"}', " x "]
        text = rng.choice(["", "\ufeff"]) + "\n".join(rng.choice(kinds) for _ in range(rng.randint(0, 8)))
        data = (text + rng.choice(["", "\n"])).encode()
        (tmp_path / "a.jsonl").write_bytes(data)
        rows = json_files.open_json_lines(tmp_path / "a.jsonl")
        lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        expected = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        assert [rows.get_origin(index) for index in range(len(rows))] == [f"a.jsonl:{number}" for number, _ in expected]
        assert [data[s:e].rstrip(b"\n") for s, e, _ in rows._spans.array] == [line for _, line in expected]


def test_offsets_are_computed_once_and_cached(folder, monkeypatch):
    path, cache = (
        write(folder / "train.jsonl", [make_llava(QUESTION, GPT, id=f"r{i}") for i in range(100)]),
        folder / "cache",
    )
    first = open_path(path, cache=cache)
    monkeypatch.setattr(json_files, "_find_line_spans", None)  # it must not be called again
    second = open_path(path, cache=cache)
    assert [second[i].id for i in range(100)] == [first[i].id for i in range(100)]
    assert isinstance(second._rows._spans.array.base, np.memmap)
    assert len(pickle.dumps(second)) < 2000 and pickle.loads(pickle.dumps(second))[99].id == "r99"


def test_cached_offsets_of_a_changed_file_are_not_used(folder):
    path, cache = write(folder / "train.jsonl", [make_llava(QUESTION, GPT, id="a")]), folder / "cache"
    assert open_path(path, cache=cache)[0].id == "a"
    write(path, [make_llava(QUESTION, GPT, id="b"), make_llava(QUESTION, GPT, id="c")])
    assert [open_path(path, cache=cache)[index].id for index in range(2)] == ["b", "c"]


@pytest.mark.parametrize("damage", ["torn", "empty", "foreign", "header", "columns"])
def test_damaged_or_foreign_offsets_are_computed_again(folder, damage):
    path, cache = (
        write(folder / "train.jsonl", [make_llava(QUESTION, GPT, id=f"r{i}") for i in range(50)]),
        folder / "cache",
    )
    open_path(path, cache=cache)
    (stored,) = cache.glob("offsets/*.npy")
    data = stored.read_bytes()
    broken = {"torn": data[:-8], "empty": b"", "foreign": b"\x93NUMPY what", "header": data[:40]}
    stored.write_bytes(broken.get(damage, b""))
    if damage == "columns":
        np.save(stored, np.zeros((50, 2), np.int64))
    assert open_path(path, cache=cache)[49].id == "r49"
    assert stored.read_bytes() == data


def _open_and_read(path, cache, ids):
    ids.put([open_path(path, cache=cache)[index].id for index in (0, 1999)])


def test_several_processes_can_open_a_new_file_concurrently(folder):
    path = write(folder / "train.jsonl", [make_llava(QUESTION, GPT, id=f"r{i}") for i in range(2000)])
    context = multiprocessing.get_context("fork")
    ids = context.Queue()
    workers = [context.Process(target=_open_and_read, args=(path, folder / "cache", ids)) for _ in range(4)]
    for worker in workers:
        worker.start()
    assert [ids.get(timeout=PATIENCE) for _ in workers] == [["r0", "r1999"]] * 4
    for worker in workers:
        worker.join()
    assert len(list((folder / "cache").glob("offsets/*.npy"))) == 1 and not list(
        (folder / "cache").glob("offsets/*.part")
    )


def test_a_file_that_shrinks_after_it_was_opened_is_detected(folder):
    path = write(folder / "train.jsonl", [make_llava(QUESTION, GPT, id="a"), make_llava(QUESTION, GPT, id="b")])
    source = open_path(path)
    os.truncate(path, 50)
    with pytest.raises(RecordError, match="has become shorter") as caught:
        source[1]
    assert caught.value.fault is Fault.changed
    path.unlink()
    with pytest.raises(RecordError, match="cannot be read: No such file") as caught:
        source[0]
    assert caught.value.fault is Fault.unreadable


def test_a_row_that_is_too_long_is_refused_without_reading_it(folder, monkeypatch):
    path = write(folder / "train.jsonl", [make_llava(QUESTION, GPT, id="a" * 5000), make_llava(QUESTION, GPT)])
    source = open_path(path)
    monkeypatch.setattr(json_files, "MAX_ROW_BYTES", 1000)
    with pytest.raises(RecordError, match="at most 1,000 are read") as caught:
        source[0]
    assert caught.value.fault is Fault.too_large and source[1].id == "train.jsonl:2"


# Digests


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_block_keeps_its_digest_when_the_file_grows_or_it_moves(folder, ending):
    rows = [make_llava(QUESTION, {"from": "gpt", "value": f"a{i}"}) for i in range(60)]
    path = folder / f"train.{ending}"
    before = open_path(write(path, rows[:40]))
    digests = [before.digest_of(start, start + 10) for start in range(0, 40, 10)]
    assert len(set(digests)) == 4
    grown = open_path(write(path, rows))
    assert [grown.digest_of(start, start + 10) for start in range(0, 40, 10)][:3] == digests[:3]
    moved = open_path(write(path, rows[50:] + rows[:40]))
    assert [moved.digest_of(start, start + 10) for start in range(10, 50, 10)][:3] == digests[:3]
    assert before.digest != grown.digest != moved.digest
    changed = open_path(write(path, [*rows[:5], make_llava(QUESTION, {"from": "gpt", "value": "b5"}), *rows[6:40]]))
    found = [changed.digest_of(start, start + 10) for start in range(0, 40, 10)]
    assert found[0] != digests[0] and found[1:] == digests[1:]


def test_a_digest_includes_how_the_records_are_read(folder):
    path = write(folder / "train.jsonl", [make_llava(QUESTION, GPT)] * 3)
    settings = {}, {"kind": "other"}, {"max_tiles": 2}, {"prompts": ["q"]}, {"image_root": str(folder / "사진")}
    assert len({open_path(path, **options).digest_of(0, 3) for options in settings}) == len(settings)
    assert open_path(path).digest_of(0, 3) == open_path(path, num_samples=3, weight=2.0).digest_of(0, 3)
    with pytest.raises(IndexError):
        open_path(path).digest_of(0, 4)


def test_the_digest_of_columns_depends_on_the_file_and_the_row_numbers(folder):
    import pyarrow as pa
    from pyarrow import parquet

    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (folder / "shards").mkdir()
    for name in ("a", "b"):
        parquet.write_table(pa.Table.from_pylist([{"messages": turns}] * 4), folder / "shards" / f"{name}.parquet")
    source = open_path(folder / "shards")
    digests = [source.digest_of(0, 4), source.digest_of(4, 8), source.digest_of(2, 6)]
    os.utime(folder / "shards" / "b.parquet", ns=(0, 1))
    again = open_path(folder / "shards")
    found = [again.digest_of(0, 4), again.digest_of(4, 8), again.digest_of(2, 6)]
    assert found[0] == digests[0] and found[1] != digests[1] and found[2] != digests[2]


def test_ranges_are_split_at_the_files():
    assert list(split_range([3, 3, 5, 9], 1, 7)) == [(0, 1, 3), (2, 0, 2), (3, 0, 2)]
    assert list(split_range([3, 3, 5, 9], 3, 4)) == [(2, 0, 1)]


# Size


def _measure_memory(action):
    """Return by how many bytes the peak memory of a child process grows, and the result of the action."""

    def run_action(pipe):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = action()
        pipe.send(((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, result))

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=run_action, args=(theirs,))
    worker.start()
    found = ours.recv()
    worker.join()
    return found


def test_a_large_list_is_scanned_in_little_memory(folder):
    record = json.dumps(make_llava(QUESTION, {"from": "gpt", "value": "답" * 500}))
    with open(folder / "train.json", "w") as stream:
        stream.write("[" + ",\n".join([record] * 30_000) + "]")
    assert os.path.getsize(folder / "train.json") > 90_000_000
    memory, count = _measure_memory(lambda: len(open_path(folder / "train.json", cache=folder / "cache")))
    assert count == 30_000 and memory < 40_000_000, memory


@pytest.mark.slow
def test_ten_million_lines_open_in_milliseconds_and_no_memory_the_second_time(folder):
    line = json.dumps(make_llava(QUESTION, GPT)) + "\n"
    with open(folder / "train.jsonl", "w") as stream:
        for _ in range(1000):
            stream.write(line * 10_000)

    def measure_opening():
        start = time.perf_counter()
        assert len(open_path(folder / "train.jsonl", cache=folder / "cache")) == 10_000_000
        return time.perf_counter() - start

    memory, _ = _measure_memory(measure_opening)
    again, seconds = _measure_memory(measure_opening)
    assert memory < 100_000_000 and again < 20_000_000 and seconds < 1, (memory, again, seconds)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "tar"])
def test_rows_read_in_order_equal_rows_read_alone_and_a_changed_file_is_noticed(folder, ending):
    answers = ["가" * (1 + 97 * number % 300) + f" {number}" for number in range(150)]
    path = folder / f"train.{ending}"
    if ending == "csv":
        rows = [
            ["image", "question", "answer"],
            *(["a.png", 'q, "q"' if len(text) % 2 else "q", text] for text in answers),
        ]
        with path.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(rows)
    elif ending == "parquet":
        pq.write_table(pa.table({"image": ["a.png"] * 150, "question": ["q"] * 150, "answer": answers}), path)
    elif ending == "tar":
        with tarfile.open(path, "w") as tar:
            for number, text in enumerate(answers):
                for name, data in ((f"{number:03}.png", b"png"), (f"{number:03}.txt", text.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    else:
        write(path, [{"image": "a.png", "question": "q", "answer": text} for text in answers])
    in_order, backwards = open_path(path), open_path(path)
    records = list(map(in_order.__getitem__, range(150)))
    assert records == [backwards[number] for number in reversed(range(150))][::-1]
    assert [record.messages[-1].text for record in records] == answers
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(in_order.__getitem__, [*range(150)] * 3)) == records * 3
    assert len(pickle.dumps(in_order)) < len(pickle.dumps(backwards)) + 200  # no block travels to a worker
    if ending in ("jsonl", "csv"):
        for number in range(40):  # in order, so the rows behind are read ahead
            in_order[number]
        path.write_bytes(path.read_bytes().replace(b" 149", b" 941"))
        time.sleep(2 * json_files._BLOCK_SECONDS)
        assert list(map(in_order.__getitem__, range(40, 150)))[-1].messages[-1].text.endswith(" 941")


def test_image_marks_and_plain_csv_lines_are_split_as_by_a_pattern_and_by_the_csv_module(tmp_path):
    rng, pattern = random.Random(1), re.compile(r"\r?\n<image>|<image>(?:\r?\n)?")
    for _ in range(3000):
        text = "".join(rng.choices(["\n", "\r", "\r\n", "<image>", "a"], k=rng.randint(1, 9)))
        assert split_at_markers(text) == pattern.split(text), text
        table = "a,b\n" + "".join(rng.choices(["a", "가", ",", "\n", "\r\n", "\r", '""', '"'], k=rng.randint(0, 20)))
        (tmp_path / "a.csv").write_bytes(table.encode())
        try:
            rows = csv_files.open_csv(tmp_path / "a.csv")
            found = [list(rows._read_fields(index)) for index in range(len(rows))]
            wanted = list(filter(None, csv.reader(io.StringIO(table, newline="\n"), strict=True)))[1:]
        except (
            UserError,
            csv.Error,
        ):  # an open quote, a carriage return within a line: the messages have tests of their own
            continue
        assert found == wanted, table
