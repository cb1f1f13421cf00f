"""A wrong image_root is one error with its cause, not a list of bad records; a data file is misspelt."""

import json

import pytest

from benchmarks.mistakes import MINE, write_first_folder
from lit_vlm.types import UserError
from run import dispatch

FEW = [*MINE.split(), "trainer.max_steps=1", "data.index_workers=1", "data.num_workers=0"]


@pytest.fixture
def first_folder(tmp_path, monkeypatch):
    write_first_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_error(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        dispatch([*FEW, *overrides])
    return str(error.value)


@pytest.mark.parametrize("policy", ["stop", "quarantine"])
def test_missing_images_name_image_root_and_the_folder_where_they_are(first_folder, policy):
    text = read_error(f"data.on_bad_record={policy}", "data.max_quarantined=1", "task=prepare")
    assert text.startswith("data.sources.mine.image_root: 12 of 12 records name images that are not there: ")
    assert "mine.json" in text and "image 'day/0.png' not found in" in text and "and 9 more" in text
    assert f"set data.sources.mine.image_root={first_folder / 'photos'}." in text
    assert "quarantine" not in text


def test_preflight_shows_a_wrong_image_root_first(first_folder):
    read_error("task=preflight", "run_name=look")
    facts = json.loads((first_folder / "runs" / "look" / "preflight.json").read_text(encoding="utf-8"))
    failures = [finding for finding in facts["findings"] if finding["level"] == "failure"]
    assert len(failures) == 1
    assert failures[0]["what"].startswith("data.sources.mine.image_root: 12 of 12 records name images")
    page = (first_folder / "runs" / "look" / "preflight.html").read_text(encoding="utf-8")
    assert page.index("data.sources.mine.image_root: 12 of 12") < page.index("<table")


def test_some_missing_images_stay_bad_records(first_folder):
    (first_folder / "photos" / "day" / "3.png").unlink()
    text = read_error(f"data.sources.mine.image_root={first_folder / 'photos'}", "task=prepare")
    assert text.startswith("Records that cannot be used (1 of mine: 1 missing)")
