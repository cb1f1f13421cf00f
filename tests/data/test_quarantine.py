"""Records that cannot be used: each is written to a file, none is lost, and too many stop the run."""

import json

import pytest

from lit_vlm.config.choices import OnBadRecord
from lit_vlm.data.quarantine import BAD_RECORDS_FILE, Quarantine
from lit_vlm.types import Fault, RecordError, UserError


def make_quarantine(num_faults, source="mine"):
    quarantine = Quarantine()
    for line in range(1, num_faults + 1):
        quarantine.add(source, RecordError(f"train.jsonl:{line}", "이미지가 없음", fault=Fault.missing))
    return quarantine


def test_each_fault_is_written_with_source_origin_fault_reason_and_digest(tmp_path):
    path = tmp_path / "run" / "quarantine.jsonl"
    make_quarantine(3).apply_policy(OnBadRecord.quarantine, 0.5, {"mine": 10}, path)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [row["origin"] for row in rows] == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"]
    assert {row["source"] for row in rows} == {"mine"} and {row["reason"] for row in rows} == {"이미지가 없음"}
    assert [list(row) for row in rows] == [["source", "origin", "fault", "reason", "digest"]] * 3
    assert {row["fault"] for row in rows} == {"missing"}
    assert len({row["digest"] for row in rows}) == 3 and all(len(row["digest"]) == 64 for row in rows)
    assert "이미지가" in path.read_text("utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["quarantine.jsonl"]


def test_the_same_faults_give_the_same_file(tmp_path):
    for name in "ab":
        make_quarantine(5).apply_policy(OnBadRecord.quarantine, 1.0, {"mine": 5}, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_fault_found_by_two_passes_counts_once(tmp_path):
    quarantine = make_quarantine(2)
    quarantine.add("mine", RecordError("train.jsonl:1", "이미지가 없음"))
    assert len(quarantine) == 2 and quarantine.count_by_source() == {"mine": 2}


def test_two_faults_of_a_record_are_one_quarantined_record(tmp_path):
    quarantine = make_quarantine(1)
    quarantine.add("mine", RecordError("train.jsonl:1", "another"))
    assert len(quarantine) == 2
    quarantine.apply_policy(OnBadRecord.quarantine, 0.5, {"mine": 2}, tmp_path / "q")
    assert len((tmp_path / "q").read_text().splitlines()) == 2


def test_each_record_is_counted_once_by_source_and_fault(tmp_path):
    quarantine = make_quarantine(3)
    quarantine.add("mine", RecordError("train.jsonl:2", "its second fault", fault=Fault.broken))
    quarantine.add("b", RecordError("b.jsonl:1", "a pixel bomb", fault=Fault.too_large))
    for line in (7, 8, 9, 10):  # as in a ledger: found while training
        quarantine.add("mine", RecordError(f"train.jsonl:{line}", "cannot be decoded", fault=Fault.broken))
    assert quarantine.count_by_fault() == {"mine": {Fault.broken: 4, Fault.missing: 3}, "b": {Fault.too_large: 1}}
    assert quarantine.count_by_source() == {"mine": 7, "b": 1} and len(quarantine) == 9
    with pytest.raises(UserError, match=r"mine: 7 of 10 \(70.00%\): 4 broken, 3 missing; the first train.jsonl:1"):
        quarantine.apply_policy(OnBadRecord.quarantine, 0.5, {"mine": 10, "b": 100}, tmp_path / "q")
    rows = [json.loads(line) for line in (tmp_path / "q").read_text("utf-8").splitlines()]
    assert [row["fault"] for row in rows].count("broken") == 5  # the second fault of line 2 is listed too


def test_the_limit_is_for_each_source_and_may_be_reached_exactly(tmp_path):
    quarantine = make_quarantine(1, "a")
    for line in (1, 2):
        quarantine.add("b", RecordError(f"b.jsonl:{line}", "broken"))
    quarantine.apply_policy(OnBadRecord.quarantine, 0.01, {"a": 100, "b": 200}, tmp_path / "q")
    with pytest.raises(UserError) as caught:
        quarantine.apply_policy(OnBadRecord.quarantine, 0.01, {"a": 100, "b": 199}, tmp_path / "q")
    message = str(caught.value)
    assert "More records are bad than data.max_quarantined=0.01 allows:" in message
    assert "b: 2 of 199 (1.01%): 2 malformed; the first b.jsonl:1: broken" in message
    assert "a: 1" not in message and str(tmp_path / "q") in message
    assert len((tmp_path / "q").read_text().splitlines()) == 3  # written before the run stops, for inspection


def test_stop_lists_ten_counts_all_and_names_the_file_with_all(tmp_path):
    with pytest.raises(UserError) as caught:
        make_quarantine(1234).apply_policy(OnBadRecord.stop, 1.0, {"mine": 9999}, tmp_path / "q")
    message = str(caught.value)
    assert "(1,234 of mine: 1,234 missing)" in message and "... and 1,224 more" in message
    assert message.count("train.jsonl:") == 10
    assert "data.on_bad_record=quarantine" in message
    rows = [json.loads(line) for line in (tmp_path / BAD_RECORDS_FILE).read_text("utf-8").splitlines()]
    assert [row["origin"] for row in rows] == [f"train.jsonl:{line}" for line in range(1, 1235)]
    assert f"All are listed in {tmp_path / BAD_RECORDS_FILE}." in message
    assert not (tmp_path / "q").exists()  # the file of a finished run is not changed
    Quarantine().apply_policy(OnBadRecord.stop, 1.0, {"mine": 9999}, tmp_path / "q")
    assert not list(tmp_path.iterdir())  # the faults are repaired


def test_without_faults_nothing_stops_and_the_file_is_empty(tmp_path):
    (tmp_path / "q").write_text("of an earlier run\n")
    Quarantine().apply_policy(OnBadRecord.stop, 0.0, {"mine": 5}, tmp_path / "q")
    Quarantine().apply_policy(OnBadRecord.quarantine, 0.0, {"mine": 5}, tmp_path / "q")
    assert (tmp_path / "q").read_text() == ""


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "q").write_text("old\n")

    def raise_disk_full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("lit_vlm.files.os.fsync", raise_disk_full)
    with pytest.raises(UserError, match="disk full"):
        make_quarantine(1).apply_policy(OnBadRecord.quarantine, 1.0, {"mine": 5}, tmp_path / "q")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old\n"]


def test_lone_surrogates_in_a_reason_can_be_written(tmp_path):
    quarantine = Quarantine()
    quarantine.add("mine", RecordError("a\ud800.jsonl:1", "\udcff"))
    quarantine.apply_policy(OnBadRecord.quarantine, 1.0, {"mine": 1}, tmp_path / "q")
    assert json.loads((tmp_path / "q").read_text("utf-8"))["reason"] == "\\udcff"
