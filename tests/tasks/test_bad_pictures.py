"""Tests of the 500 files of bad_images.py among good records: task=prepare names the bad ones, the rest is trained on."""

import json
import os
from collections import Counter
from pathlib import Path

import bad_images
import pytest
from mixture_cases import build_datamodule, read_json_lines, run_prepare
from run_helpers import make_llava_record, run, write_records

from lit_vlm.types import Fault, UserError

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
GOOD = 40  # in addition


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Folder with train.jsonl of good and bad records; the number of records; and line -> fault of the bad ones."""
    folder = tmp_path_factory.mktemp("bad")
    cases = [case for case in bad_images.make(folder) if not (case.unless_root and os.geteuid() == 0)]
    bad_images.Image.new("RGB", (80, 60), "red").save(folder / "images" / "good.png")
    records, expected = [], {}
    for number, case in enumerate(cases):
        if number % 12 == 0:
            records.append(make_llava_record("<image>\nWhat?", f"Red {number}", image="good.png"))
        records.append(make_llava_record("<image>\nWhat?", f"Case {number}", image=case.path))
        if case.expected:  # for a record, a data URI is no URL: it contains the image, or here bytes that are no image
            fault = Fault.not_an_image if case.path.startswith("data:") else case.expected
            expected[f"train.jsonl:{len(records)}"] = str(fault)
    write_records(folder / "train.jsonl", records)
    return folder, len(records), expected


@pytest.fixture
def overrides(corpus, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    folder, _, _ = corpus
    overrides = ["data=llava_json", f"data.sources.mine.path={folder / 'train.jsonl'}", "data.tiling=base"]
    return [
        *overrides,
        f"data.sources.mine.image_root={folder / 'images'}",
        "data.validation.fraction=0",
        "run_name=bad",
    ]


def test_each_bad_record_is_quarantined_with_its_fault_and_all_others_are_trained_on(overrides, corpus):
    _, count, expected = corpus
    quarantine = ["data.on_bad_record=quarantine", "data.max_quarantined=1.0", "data.max_image_pixels=64000000"]
    ready = run_prepare(*overrides, *quarantine)
    rows = read_json_lines(ready.dir / "quarantine.jsonl")
    assert {row["origin"]: row["fault"] for row in rows} == expected and len(rows) == len(expected)
    assert all(row["source"] == "mine" and row["reason"] and len(row["digest"]) == 64 for row in rows)
    datamodule = build_datamodule(*overrides, *quarantine)
    datamodule.build_indexes()
    lines = {f"train.jsonl:{position + 1}" for position in datamodule.index.position.tolist()}
    assert len(lines) == count - len(expected) and not lines & expected.keys()
    run_output = run(
        *overrides,
        *quarantine,
        "stage=sft",
        "trainer.max_steps=null",
        "data.global_batch_size=40",
        "callbacks=[export]",
    )
    assert run_output.manifest["status"] == "finished" and run_output.manifest["data"]["quarantined"] == {
        "mine": len(expected)
    }
    num_sampled = next(row["drawn"] for row in run_output.manifest["data"]["mixture"] if row["name"] == "mine")
    assert num_sampled >= len(lines) == run_output.manifest["data"]["num_samples"]  # so each was decoded
    assert not (run_output.dir / "ledger.jsonl").exists()


def test_the_default_limit_stops_with_the_counts_of_each_fault(overrides, corpus, tmp_path):
    _, count, expected = corpus
    with pytest.raises(UserError) as caught:
        run_prepare(*overrides, "data.on_bad_record=quarantine")
    text, faults = str(caught.value), Counter(expected.values())
    assert f"mine: {len(expected):,} of {count:,} ({len(expected) / count:.2%})" in text
    assert all(f"{number:,} {fault}" in text for fault, number in faults.items()), text
    assert "data.max_quarantined=0.01 allows" in text and str(tmp_path / "runs" / "bad" / "quarantine.jsonl") in text
    assert len(read_json_lines(tmp_path / "runs" / "bad" / "quarantine.jsonl")) == len(expected)
    assert not (tmp_path / "runs" / "bad" / "mixture.lock").exists()


def test_the_policy_stop_names_bad_records_with_counts_and_quarantines_nothing(overrides, corpus, tmp_path):
    _, _, expected = corpus
    with pytest.raises(UserError) as caught:
        run_prepare(*overrides, "data.on_bad_record=stop")
    text = str(caught.value)
    first = list(expected)[:10]
    assert text.startswith(f"Records that cannot be used ({len(expected):,} of mine: ")
    assert all(f"\n  {origin}: image " in text for origin in first) and f"... and {len(expected) - 10:,} more" in text
    assert all(f"{number:,} {fault}" in text for fault, number in Counter(expected.values()).items())
    (list_file,) = Path(tmp_path / "runs" / "bad").glob("*")
    assert list_file.name == "bad_records.jsonl" and {row["origin"] for row in read_json_lines(list_file)} == set(
        expected
    )
    assert json.dumps(text)  # valid for any file name
