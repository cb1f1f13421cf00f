"""Tests of images that become corrupt while training: in archives, and in preference pairs."""

import pytest
from mixture_cases import (
    build_datamodule,
    build_sources,
    list_sample_names,
    make_files,
    read_json_lines,
    write_zeros,
    zero_second_half,
)
from run_helpers import PHOTOS, run, save_photos, write_data_choice, write_records

from lit_vlm.data import micro_batches
from lit_vlm.types import UserError


@pytest.fixture(autouse=True)
def current_folder(tmp_path, monkeypatch, tmp_path_factory):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(micro_batches, "RETRY_DELAYS", (0.01, 0.02))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def run_and_read_error(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        run(*overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", ["tar", "zips"])
def test_corrupt_archive_members_are_named_and_logged(tmp_path, name):
    files = make_files(tmp_path / "files")
    sources = {name: build_sources(files)[name]}
    overrides = [*write_data_choice(tmp_path, sources=sources), "stage=sft", "run_name=bad", "trainer.max_steps=2"]
    run(*overrides, "run_name=first")
    archive = files / "shard.tar" if name == "tar" else files / "delivery" / "TS_사진.zip"
    data, photo = archive.read_bytes(), (files / "images" / PHOTOS[0]).read_bytes()
    if name == "tar":
        write_zeros(archive, data.index(photo) + len(photo) // 2, len(photo) // 2)
    else:
        write_zeros(archive, len(data) // 3, 1500)
    for _ in range(2):  # one photograph serves two records of the tar
        try:
            run(*overrides)
        except UserError as error:
            assert "It is entered in" in str(error), error
    assert run(*overrides).manifest["status"] == "finished"
    entries = read_json_lines(tmp_path / "runs" / "bad" / "ledger.jsonl")
    assert entries and {entry["source"] for entry in entries} == {name}
    datamodule = build_datamodule(*overrides)
    datamodule.build_indexes()
    named = list_sample_names(datamodule.index, range(len(datamodule.index)))
    assert all(f"{name}/{entry['position']}" in named for entry in entries)
    assert len({entry["position"] for entry in entries}) == len(entries)


def test_corrupt_images_of_preference_pairs_are_left_out(tmp_path, monkeypatch):
    save_photos(tmp_path / "images")
    pairs = [
        {"prompt": f"<image>\n{i}?", "chosen": f"Yes {i}", "rejected": "No", "image": PHOTOS[i % 4]} for i in range(8)
    ]
    path = write_records(tmp_path / "pairs.jsonl", pairs)
    overrides = [
        "stage=dpo",
        "data=preference",
        f"data.sources.mine.path={path}",
        "data.sources.mine.image_root=images",
    ]
    overrides += ["run_name=bad", "trainer.max_steps=2", "data.validation.fraction=0"]
    run(*overrides, "run_name=first")
    zero_second_half(tmp_path / "images" / "astronaut.jpg")
    origins = {run_and_read_error(*overrides).split(": ")[0] for _ in range(2)}
    assert origins == {"pairs.jsonl:4", "pairs.jsonl:8"}
    assert run(*overrides).manifest["status"] == "finished"
