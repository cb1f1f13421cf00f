"""The ledger stores corrupt records, survives crashes and concurrent writers, and finds them in another index."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from made_index import make_index

from lit_vlm.data.quarantine import Ledger
from lit_vlm.types import Fault, RecordError

BROKEN = RecordError("집.jsonl:7", "truncated\u2028image", fault=Fault.broken)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run" / "ledger.jsonl"


def test_a_ledger_without_a_file_is_empty(path):
    ledger = Ledger.read(path)
    assert len(ledger) == 0
    assert not path.parent.exists()
    assert ledger.find_samples(make_index({"a": 3})).tolist() == []


def test_entries_are_read_back_and_the_file_is_readable(path):
    Ledger.read(path).add("a", 2, BROKEN, record_id="x7")
    Ledger.read(path).add("b", 0, BROKEN)
    read = Ledger.read(path)
    assert [(entry.source, entry.position, entry.id) for entry in read.entries] == [("a", 2, "x7"), ("b", 0, "")]
    first = json.loads(path.read_text(encoding="utf-8").split("\n")[0])
    assert first.pop("time").endswith("Z")
    assert first == {
        "source": "a", "position": 2, "origin": "집.jsonl:7", "fault": "broken", "reason": "truncated\u2028image", "id": "x7",
        "held_out": False,
    }  # fmt: skip
    assert "집" in path.read_text(encoding="utf-8")


def test_samples_are_found_by_source_and_position(path):
    ledger = Ledger.read(path)
    for source, position in (("b", 1), ("a", 2), ("b", 1), ("b", 99)):
        ledger.add(source, position, BROKEN)
    index = make_index({"a": 5, "b": 4})
    assert ledger.find_samples(index).tolist() == [2, 6]
    assert ledger.find_samples(index.select(np.array([8, 6, 0]))).tolist() == [1]


def test_entries_of_a_removed_source_are_reported_and_ignored(path):
    ledger = Ledger.read(path)
    ledger.add("gone", 1, BROKEN)
    ledger.add("a", 1, BROKEN)
    with pytest.warns(UserWarning, match="names sources that are not trained on: gone"):
        assert ledger.find_samples(make_index({"a": 5})).tolist() == [1]


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_truncated_last_line_costs_only_that_line(path, cut):
    ledger = Ledger.read(path)
    ledger.add("a", 1, BROKEN)
    ledger.add("a", 2, BROKEN)
    path.write_bytes(path.read_bytes()[:-cut])
    truncated = Ledger.read(path)
    assert len(truncated) == (2 if cut == 1 else 1)
    truncated.add("a", 3, BROKEN)
    assert [entry.position for entry in Ledger.read(path).entries][-1] == 3
    assert len(Ledger.read(path)) == len(truncated)


def test_a_line_truncated_within_a_character_is_ignored(path):
    Ledger.read(path).add("a", 1, BROKEN)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: whole.index("집".encode()) + 1])
    assert len(Ledger.read(path)) == 1


def _add_entries(path: Path, source: str) -> None:
    for position in range(50):
        Ledger.read(path).add(source, position, BROKEN)


def test_several_processes_can_write_concurrently(path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_add_entries, args=(path, name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted((entry.source, entry.position) for entry in Ledger.read(path).entries) == [
        (name, position) for name in "abc" for position in range(50)
    ]
