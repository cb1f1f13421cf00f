"""Tests of task=prepare on a mixture of every format, and of training and preflight after it."""

import json
import multiprocessing
from pathlib import Path

import pytest
from mixture_cases import SIZES, build_sources, make_files, parse_sft_run, read_json_lines, run_prepare
from run_helpers import TINY, run, run_process, write_data_choice
from waiting import PATIENCE

from lit_vlm.data.lazy_images import EncodedImage
from lit_vlm.data.processor import Processor
from lit_vlm.tasks.preflight import run_preflight

FORK = multiprocessing.get_context("fork")
WEIGHTS = {"llava": 0.4, "messages": 0.2, "bytes": 0.1, "sharegpt": 0.1, "tar": 0.1, "zips": 0.1}
FAST = ["trainer.max_steps=5", "data.global_batch_size=8", "data.validation.max_samples=1"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(autouse=True)
def current_folder(tmp_path, monkeypatch, tmp_path_factory):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def overrides(files, tmp_path) -> list[str]:
    """Overrides of the mixture with weights; a tenth is held out."""
    sources = build_sources(files, **{name: {"weight": weight} for name, weight in WEIGHTS.items()})
    return [*write_data_choice(tmp_path, sources=sources, validation={"fraction": 0.1}), *FAST]


def fail_on_use(*_, **__):
    pytest.fail("read once more")


def read_modification_times(folder: Path) -> dict[str, int]:
    """Return path -> modification time of all files except lock files."""
    return {
        str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"
    }


def test_training_on_prepared_data_indexes_no_record_again(overrides, monkeypatch):
    ready = run_prepare(*overrides, "run_name=five")
    times = read_modification_times(ready.dir.parent / "index")
    with monkeypatch.context() as patch:
        patch.setattr(Processor, "compute_cost", fail_on_use)
        run_output = run(*overrides, "stage=sft", "run_name=five")
    assert read_modification_times(ready.dir.parent / "index") == times
    assert run_output.dir == ready.dir and run_output.manifest["status"] == "finished"
    data = run_output.manifest["data"]
    assert data["num_samples"] + data["num_held_out"] == sum(SIZES.values())
    rows = {row["name"]: row for row in data["mixture"] if row["group"] == "source"}
    assert {name: row["asked"] for name, row in rows.items()} == pytest.approx(WEIGHTS)
    assert sum(row["drawn"] for row in rows.values()) == 40
    assert all(abs(row["drawn"] - 40 * WEIGHTS[name]) <= 1 for name, row in rows.items())


def test_preparing_twice_counts_and_decodes_nothing_again(overrides, monkeypatch):
    ready = run_prepare(*overrides)
    times, lock = (
        read_modification_times(ready.dir.parent / "index" / "shards"),
        (ready.dir / "mixture.lock").read_bytes(),
    )
    monkeypatch.setattr(Processor, "compute_cost", fail_on_use)
    monkeypatch.setattr(EncodedImage, "load", fail_on_use)
    run_prepare(*overrides)
    assert read_modification_times(ready.dir.parent / "index" / "shards").keys() == times.keys()
    assert (ready.dir / "mixture.lock").read_bytes() == lock


def test_preflight_on_prepared_data_reports_that_it_would_run(overrides, monkeypatch):
    run_prepare(*overrides)
    monkeypatch.setattr(Processor, "compute_cost", fail_on_use)
    job = parse_sft_run(*overrides, "task=preflight")
    run_preflight(job)  # exit status 1 is an exception
    facts = json.loads((job.dir / "preflight.json").read_text(encoding="utf-8"))
    assert facts["would_run"] and not [finding for finding in facts["findings"] if finding["level"] == "failure"]
    assert {row["name"]: (row["records"], row["looked_at"]) for row in facts["sources"]} == {
        name: (size, size) for name, size in SIZES.items()
    }


def test_the_command_prints_the_contents_of_each_source_and_the_plan(overrides, tmp_path):
    result = run_process(*overrides, "stage=sft", "task=prepare", "run_name=said", cwd=tmp_path, base=TINY[1:])
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    output = result.stdout
    assert "5 steps; k = 1 on 1 device" in output and "prepared" in output
    for name, size in SIZES.items():
        row = next(line for line in output.splitlines() if line.startswith(f"│ {name} "))
        assert [cell.strip() for cell in row.split("│")[2:6]] == [str(size), str(size), "none", "0"]
    folder = tmp_path / "runs" / "said"
    assert f"Lock: {folder / 'mixture.lock'}" in output and (folder / "mixture.lock").is_file()
    assert "quarantine.jsonl" not in output  # with data.on_bad_record=stop nothing is quarantined


def test_three_concurrent_processes_on_an_empty_index_end_with_the_same_lock_file(overrides, tmp_path):
    jobs = [FORK.Process(target=run_prepare, args=(*overrides, f"run_name=at_once/{number}")) for number in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(PATIENCE)
        assert job.exitcode == 0
    locks = {(tmp_path / "runs" / "at_once" / str(number) / "mixture.lock").read_bytes() for number in range(3)}
    alone = run_prepare(*overrides, "data.index_dir=other", "run_name=alone")
    assert locks == {(alone.dir / "mixture.lock").read_bytes()}
    assert not list((tmp_path / "runs" / "index").rglob(".*"))


def test_the_index_can_be_in_another_folder(overrides, tmp_path):
    ready = run_prepare(*overrides, f"data.index_dir={tmp_path / 'elsewhere'}")
    assert not (ready.dir.parent / "index").exists()
    assert len(list((tmp_path / "elsewhere" / "shards").glob("*.arrow"))) == 2 * len(SIZES)  # counted and decoded
    run_output = run(*overrides, "stage=sft", f"data.index_dir={tmp_path / 'elsewhere'}")
    assert run_output.manifest["status"] == "finished" and not (run_output.dir.parent / "index").exists()


def test_changed_and_quarantined_records_are_counted_in_the_table(files, tmp_path, capsys):
    """Decomposed text is counted as changed. A validation source of the same name is counted apart."""
    from run_helpers import make_llava_record, write_records

    nfd = "\u1112\u1161\u11ab\u1100\u1173\u11af"
    write_records(
        tmp_path / "mine.jsonl",
        [
            make_llava_record("q", nfd),
            make_llava_record("q", "a"),
            *[make_llava_record("q", f"b{i}") for i in range(8)],
        ],
    )
    write_records(
        tmp_path / "held.jsonl", [make_llava_record("q", f"b{i}") for i in range(15)] + [make_llava_record("q", "")] * 5
    )
    training_source = {"path": str(tmp_path / "mine.jsonl"), "format": "llava"}
    held_source = training_source | {"path": str(tmp_path / "held.jsonl")}
    choice = write_data_choice(
        tmp_path, sources={"mine": training_source}, validation={"sources": {"mine": held_source}}
    )
    ready = run_prepare(*choice, "data.on_bad_record=quarantine", "data.max_quarantined=0.3")
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("│ mine"))
    assert [cell.strip() for cell in row.split("│")[1:6]] == ["mine", "10", "10", "none", "1"]
    assert {line["source"] for line in read_json_lines(ready.dir / "quarantine.jsonl")} == {"mine (validation)"}


def test_brackets_in_a_path_are_printed_unchanged(files, tmp_path, capsys):
    choice = write_data_choice(tmp_path, sources={"sharegpt": build_sources(files)["sharegpt"]})
    run_prepare(*choice, f"data.index_dir='{tmp_path}/[/old]/[bold]'")
    assert f"{tmp_path}/[/old]/[bold]" in capsys.readouterr().out
