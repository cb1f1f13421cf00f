"""Files that the package writes are complete and synced to disk; damaged files are reported by name."""

import os

import pytest

from lit_vlm.files import (
    CorruptFileError,
    append_line,
    atomic_folder,
    atomic_write,
    create_file,
    move_into_place,
    read_csv_rows,
    read_json,
    read_json_lines,
    read_json_or_none,
    write_text_atomically,
)


@pytest.fixture
def synced(monkeypatch) -> list[str]:
    """Names of the files and folders that are synced to disk, in order."""
    names, fsync = [], os.fsync

    def record_and_sync(handle):
        names.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record_and_sync)
    return names


def test_a_file_is_synced_before_its_folder(tmp_path, synced):
    write_text_atomically(tmp_path / "a", "1")
    with atomic_write(tmp_path / "b") as draft:
        draft.write_text("2")
    append_line(tmp_path / "c", b"3")
    folders = [name for name in synced if name == tmp_path.name]
    assert len(folders) == 3 and synced[0].startswith(".a.") and synced[1] == tmp_path.name
    assert synced[2].startswith(".b.") and synced[4:] == ["c", tmp_path.name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_all_files_of_a_folder_are_synced_before_it_is_renamed(tmp_path, synced):
    (tmp_path / "draft").mkdir()
    for name in ("x", "y"):
        (tmp_path / "draft" / name).write_text(name)
    move_into_place(tmp_path / "draft", tmp_path / "hf")
    assert {"x", "y", "draft"} == set(synced[:3]) and synced[3] == tmp_path.name


def test_a_file_that_need_not_be_durable_is_not_synced(tmp_path, synced):
    write_text_atomically(tmp_path / "beat", "1", durable=False)
    assert synced == [] and (tmp_path / "beat").read_text() == "1"


def test_a_failed_write_leaves_the_old_file_and_no_temporary_file(tmp_path, monkeypatch):
    write_text_atomically(tmp_path / "a", "old")

    def raise_disk_full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", raise_disk_full)
    with pytest.raises(OSError, match="No space"):
        write_text_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"\0" * 64, "it is empty"),
        (b'{"a": 1', "no JSON, or cut off"),
        (b"\xff\xfe", "no JSON, or cut off"),
        (b"[1]", "it holds list"),
        (b"null", "it holds NoneType"),
        (b"[" * 100_000, "no JSON, or cut off"),
    ],
)
def test_a_damaged_file_is_reported_by_name_with_the_remedy(tmp_path, content, message):
    (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(CorruptFileError, match=message) as caught:
        read_json(tmp_path / "m.json", "Do this.")
    assert str(caught.value).startswith(f"{tmp_path / 'm.json'} is damaged: ") and str(caught.value).endswith(
        "Do this."
    )


def test_a_missing_file_is_read_as_none(tmp_path):
    assert read_json(tmp_path / "m.json", "") is None


def test_a_folder_is_whole_or_absent(tmp_path, synced):
    with pytest.raises(ValueError), atomic_folder(tmp_path / "hf") as temporary:
        (temporary / "a").write_text("half")
        raise ValueError
    assert list(tmp_path.iterdir()) == [] and synced == []
    for content in ("first", "second"):
        (tmp_path / ".hf.another-host.1-1").mkdir(exist_ok=True)  # left by a killed process
        with atomic_folder(tmp_path / "hf", replace=True) as temporary:
            (temporary / "a").write_text(content)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"] and (tmp_path / "hf" / "a").read_text() == "second"


def test_of_two_processes_that_make_a_folder_the_first_wins(tmp_path):
    with atomic_folder(tmp_path / "parts") as temporary:
        (temporary / "a").write_text("late")
        (tmp_path / "parts").mkdir()
        (tmp_path / "parts" / "a").write_text("first")
    assert (tmp_path / "parts" / "a").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_a_file_is_created_once(tmp_path):
    create_file(tmp_path / "leave.json", "first")
    with pytest.raises(FileExistsError):
        create_file(tmp_path / "leave.json", "second")
    assert (tmp_path / "leave.json").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_a_line_or_row_that_a_killed_process_cut_off_is_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b"}\n[1]\n{"text": "c"', encoding="utf-8")
    (tmp_path / "a.csv").write_text("step,loss\n1,2.5\n2,1.")
    assert read_json_lines(tmp_path / "a.jsonl") == [{"text": "a\u2028b"}]
    assert read_csv_rows(tmp_path / "a.csv") == [{"step": "1", "loss": "2.5"}]
    assert read_json_lines(tmp_path / "b.jsonl") == read_csv_rows(tmp_path / "b.csv") == []
    assert read_json_or_none(tmp_path / "a.jsonl") is None and read_json_or_none(tmp_path / "missing") is None
