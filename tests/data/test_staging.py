"""Data that was copied to the disk of a node is read from there, with the names, digests and keys of the originals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from waiting import PATIENCE

from lit_vlm.config.schema import SourceConfig
from lit_vlm.data.index.build import build_index
from lit_vlm.data.sources import open_source
from lit_vlm.data.staging import copy_to_node, get_staging_folder, resolve_staged_path
from lit_vlm.files import get_temporary_path
from lit_vlm.types import UserError


@pytest.fixture
def data(tmp_path) -> Path:
    """Folder of ten records, each with an image in a subfolder."""
    folder = tmp_path / "shared" / "한국어 자료"
    (folder / "pictures").mkdir(parents=True)
    records = []
    for number in range(10):
        Image.new("RGB", (40 + number, 30), "red").save(folder / "pictures" / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\n무엇?"}, {"from": "gpt", "value": "빨강"}]
        records.append({"id": str(number), "image": f"pictures/{number}.png", "conversations": turns})
    (folder / "a.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


def open_data(data: Path):
    return open_source("mine", SourceConfig(path=str(data / "a.json")), max_image_pixels=10_000)


def test_a_copy_is_read_with_the_identity_of_its_original(data, tmp_path, monkeypatch, processor):
    before = open_data(data)
    whole = build_index([before], processor, store=tmp_path / "index")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*.arrow")}
    copy_to_node([data], tmp_path / "node")
    monkeypatch.setenv("NODE", str(tmp_path))
    monkeypatch.setenv("LIT_VLM_STAGED", "$NODE/node")
    source = open_data(data)
    assert source.digest == before.digest
    again = build_index([source], processor, store=tmp_path / "index")
    assert again.compute_digest() == whole.compute_digest()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*.arrow")} == times
    copy = resolve_staged_path(data / "pictures" / "3.png")
    assert copy == tmp_path / "node" / (data / "pictures" / "3.png").relative_to("/")
    Image.new("RGB", (43, 30), "blue").save(copy)
    assert source[3].images[0].load().getpixel((0, 0)) == (0, 0, 255)  # the file on the node is read


def test_a_second_copy_transfers_only_new_and_incomplete_files(data, tmp_path):
    count, size = copy_to_node([data], tmp_path / "node")
    assert count == 11 and size == sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
    assert copy_to_node([data], tmp_path / "node") == (0, 0)
    copy = tmp_path / "node" / (data / "a.json").relative_to("/")
    copy.write_bytes(copy.read_bytes()[:50])  # newer than its original, and shorter
    (data / "pictures" / "new.png").write_bytes(b"new")
    assert copy_to_node([data], tmp_path / "node")[0] == 2
    assert copy.read_bytes() == (data / "a.json").read_bytes()
    assert copy.stat().st_mtime_ns == (data / "a.json").stat().st_mtime_ns


def test_files_removed_from_a_folder_are_removed_from_its_copy_and_no_others(tmp_path):
    shards, node, other = tmp_path / "shards", tmp_path / "node", tmp_path / "node" / "other.jsonl"
    (shards / "below").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "below/c.jsonl"):
        (shards / name).write_text("{}\n")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.jsonl").write_text("{}\n")
    (shards / "link").symlink_to(outside)
    copy_to_node([shards], node)
    copy = node / shards.relative_to("/")
    other.write_text("of somebody else\n")
    temporary = get_temporary_path(copy / "a.jsonl")
    temporary.write_text("another job of this node is copying it\n")
    (shards / "b.jsonl").unlink()
    (shards / "below" / "c.jsonl").unlink()
    (shards / "link").unlink()
    assert copy_to_node([shards], node) == (0, 0)
    assert sorted(path.name for path in copy.rglob("*") if not path.is_dir()) == [temporary.name, "a.jsonl"]
    assert other.exists() and (outside / "kept.jsonl").exists()


@pytest.mark.parametrize("named", ["$NOPE_IS_NOT_SET/x", "/scratch/${NOPE_IS_NOT_SET}", "$HERE"])
def test_a_folder_whose_variable_is_not_set_on_the_node_is_refused(named, data, tmp_path, monkeypatch, repository):
    monkeypatch.setenv("HERE", "relative")
    monkeypatch.setenv("LIT_VLM_STAGED", named)
    with pytest.raises(UserError, match="set on every node"):
        get_staging_folder()
    command = [sys.executable, "-m", "lit_vlm.data.staging", named, str(data)]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and "set on every node" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_data_that_is_not_staged_is_read_from_its_original_path(data, tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_VLM_STAGED", str(tmp_path / "nowhere"))
    assert len(open_data(data)) == 10


def test_a_disk_that_is_too_small_is_reported_before_anything_is_copied(data, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_vlm.data.staging.SPARE_BYTES", 1 << 60)
    with pytest.raises(UserError, match=r"GB free, and 0\.0 GB would be copied.*Choose another folder"):
        copy_to_node([data], tmp_path / "node")
    assert not list((tmp_path / "node").rglob("*.png"))


def test_the_staging_command_copies_and_a_missing_file_fails_it(data, tmp_path, repository):
    command = [sys.executable, "-m", "lit_vlm.data.staging", "$WHERE/node", str(data), str(data / "pictures")]
    environment = {**os.environ, "PYTHONPATH": str(repository), "WHERE": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and "11 files" in done.stdout, done.stderr
    done = subprocess.run([*command, str(data / "gone")], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "is not there" in done.stderr and "Traceback" not in done.stderr
