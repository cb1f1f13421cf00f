"""The ledger keeps what turned bad, through crashes and several writers, and finds it in another index."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from made_index import made_index

from lit_vlm.data.plan.ledger import Ledger
from lit_vlm.types import Fault, RecordError

BROKEN = RecordError("집.jsonl:7", "truncated\u2028image", fault=Fault.broken)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run" / "ledger.jsonl"


def test_without_a_file_it_is_empty(path):
    ledger = Ledger.read(path)
    assert len(ledger) == 0
    assert not path.parent.exists()
    assert ledger.find_samples(made_index({"a": 3})).tolist() == []


def test_what_is_entered_is_read_again_and_legible(path):
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
    index = made_index({"a": 5, "b": 4})
    assert ledger.find_samples(index).tolist() == [2, 6]
    assert ledger.find_samples(index.select(np.array([8, 6, 0]))).tolist() == [1]


def test_entries_of_a_source_that_is_gone_are_told_and_ignored(path):
    ledger = Ledger.read(path)
    ledger.add("gone", 1, BROKEN)
    ledger.add("a", 1, BROKEN)
    with pytest.warns(UserWarning, match="names sources that are not trained on: gone"):
        assert ledger.find_samples(made_index({"a": 5})).tolist() == [1]


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_torn_last_line_costs_that_line_alone(path, cut):
    ledger = Ledger.read(path)
    ledger.add("a", 1, BROKEN)
    ledger.add("a", 2, BROKEN)
    path.write_bytes(path.read_bytes()[:-cut])
    torn = Ledger.read(path)
    assert len(torn) == (2 if cut == 1 else 1)
    torn.add("a", 3, BROKEN)
    assert [entry.position for entry in Ledger.read(path).entries][-1] == 3
    assert len(Ledger.read(path)) == len(torn)


def test_a_line_torn_within_a_letter_is_left_out(path):
    Ledger.read(path).add("a", 1, BROKEN)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: whole.index("집".encode()) + 1])
    assert len(Ledger.read(path)) == 1


def _enter(path: Path, source: str) -> None:
    for position in range(50):
        Ledger.read(path).add(source, position, BROKEN)


def test_several_processes_may_write_at_once(path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_enter, args=(path, name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted((entry.source, entry.position) for entry in Ledger.read(path).entries) == [
        (name, position) for name in "abc" for position in range(50)
    ]
