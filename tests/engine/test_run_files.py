"""Damaged files of a run folder, or folders in their places: a clear error, and valid content is still read."""

import json
from dataclasses import asdict

import pytest

from lit_vlm.checkpoint.folder import CheckpointFolder
from lit_vlm.config import parse
from lit_vlm.data.quarantine import Ledger
from lit_vlm.fault_tolerance.skipped_steps import SKIPPED_STEPS_FILE, add_skipped, read_skipped
from lit_vlm.runs.run_folder import (
    MANIFEST,
    open_run_folder,
    read_manifest_or_empty,
    read_or_rebuild_manifest,
    to_plain,
)
from lit_vlm.types import UserError


def test_skipped_steps_are_read_despite_damaged_lines_which_are_named(tmp_path):
    add_skipped(tmp_path, 3, "loss", ["a\u2028b", "c\x85d"])
    with (tmp_path / SKIPPED_STEPS_FILE).open("ab") as stream:
        stream.write(b'{"step": "4", "reason": "loss", "samples": [], "time": ""}\n{"step": 5\n')
        stream.write(b'{"step": 6, "reason": "loss", "samples": ["\xff"], "time": ""}\n')
    with pytest.warns(UserWarning, match="damaged") as caught:
        found = read_skipped(tmp_path)
    assert sorted(found) == [3, 6] and found[3].samples == ["a\u2028b", "c\x85d"]
    assert [str(one.message).partition(": ")[0] for one in caught] == [
        f"{tmp_path / SKIPPED_STEPS_FILE}:{line}" for line in (2, 3)
    ]


@pytest.mark.parametrize(
    "content",
    [
        {"parent": "x"},
        {"parent": [1]},
        {"plan": 5},
        {"tracking": []},
        {"tracking": {"wandb": 1}},
        {"config": {"stage": 5}},
        {"parent": {"path": 1}},
        {"status": 1},
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_manifest_with_wrong_types_is_reported_as_damaged_and_rebuilt(content, overwrite, tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps({"config": {}, "data": {}, **content}))
    known, note = read_or_rebuild_manifest(tmp_path, "x")
    assert known is None and f"{tmp_path / MANIFEST} is damaged: its {next(iter(content))}" in note
    assert read_manifest_or_empty(tmp_path) == {}
    settings = to_plain(asdict(parse(["experiment=tiny/1_align"]).config))
    assert (
        open_run_folder(tmp_path, settings, name="x", overwrite=overwrite, data_digest="", parent=None).rebuild_note
        == note
    )


@pytest.mark.parametrize("name", ["latest", "best"])
def test_a_folder_in_the_place_of_a_checkpoint_pointer_is_reported(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is a folder.*Remove it"):
        CheckpointFolder(tmp_path).clean_before_run(0)


@pytest.mark.parametrize("read", [lambda folder: Ledger.read(folder / SKIPPED_STEPS_FILE), read_skipped])
def test_a_folder_in_the_place_of_a_list_of_skipped_records_is_reported(read, tmp_path):
    (tmp_path / SKIPPED_STEPS_FILE).mkdir()
    with pytest.raises(UserError, match=f"{SKIPPED_STEPS_FILE} cannot be read: .*remove it"):
        read(tmp_path)
