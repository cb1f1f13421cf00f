"""WebDataset's shards are read in place, by random access; nothing in them is extracted or executed."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from hostile_tars import CANARY, CASES, build_archive, make_member
from source_cases import get_contents, open_path

from lit_vlm.config.choices import Format
from lit_vlm.data.readers.rows.tar_samples import open_tar
from lit_vlm.types import Fault, ImagePlaceholder, Language, RecordError, SampleKind, UserError


def encode_jpeg(image):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95)
    return stream.getvalue()


def write_tar(path, members, form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as shard:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5  # a fraction makes an extended header, as WebDataset's writer does
            shard.addfile(info, io.BytesIO(data))
    return path


def make_samples(photos, count=3):
    for number in range(count):
        yield f"그림/{number:04}.jpg", encode_jpeg(photos[number % 2])
        yield f"그림/{number:04}.txt", f"{number}번째 사진\n".encode()


def test_an_image_and_its_caption_become_a_sample(folder, photos):
    source = open_path(write_tar(folder / "train.tar", make_samples(photos)))
    assert len(source) == 3
    first = source[1]
    assert get_contents(first) == [(ImagePlaceholder(0),), ("1번째 사진",)]
    assert (first.id, first.origin) == ("train/그림/0001", "train.tar/그림/0001") and source.origin(1) == first.origin
    assert (first.kind, first.language) == (SampleKind.image_only, Language.ko)
    assert first.images[0].size == (40, 60)
    assert np.abs(np.asarray(first.images[0].load(), int) - np.asarray(photos[1], int)).mean() < 5
    again = pickle.loads(pickle.dumps(source))
    assert again[2].messages == source[2].messages and len(pickle.dumps(source)) < 5000


def test_prompts_are_added_to_captions_without_a_question(folder, photos):
    path = write_tar(folder / "train.tar", make_samples(photos, 40))
    source = open_path(path, prompts=["무엇인가요?", "What is it?", "설명해줘"])
    asked = [source[index].messages[0].content for index in range(40)]
    assert {content[1] for content in asked} == {"무엇인가요?", "What is it?", "설명해줘"}
    assert all(content[0] == ImagePlaceholder(0) for content in asked)
    assert (
        source[0].kind is SampleKind.caption
        and open_path(path, prompts=["q"], kind="other")[0].kind is SampleKind.other
    )


def test_json_members_hold_records_of_any_format(folder, photos):
    two = {"conversations": [{"from": "human", "value": "<image><image>\n차이는?"}, {"from": "gpt", "value": "색"}]}
    parts = [{"type": "image"}, {"type": "text", "text": "q"}]
    turns = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]}
    pair = {"prompt": "<image>\nq", "chosen": "a", "rejected": "b", "id": 7}
    members = [
        ("two.1.png", encode_jpeg(photos[1])),
        ("two.0.jpg", encode_jpeg(photos[0].resize((30, 20)))),
        ("two.json", json.dumps({**two, "image": ["coco/0.jpg", "../1.jpg"]}).encode()),
        ("turns.json", json.dumps(turns).encode()),
        ("pair.json", json.dumps(pair).encode()),
        ("crawled.jpg", encode_jpeg(photos[0])),
        ("crawled.txt", b"a flower"),
        ("crawled.json", json.dumps({"caption": "x", "url": "http://x/a.jpg", "sha256": "0"}).encode()),
        ("plain.jpg", encode_jpeg(photos[0])),
        ("plain.json", b'{"caption": "words"}'),
        ("turns.jpeg", encode_jpeg(photos[0])),  # not next to its record; random access finds it
        ("pair.webp", encode_jpeg(photos[0])),
    ]
    source = open_path(write_tar(folder / "train.tar", members))
    found = {source.origin(index): source[index] for index in range(len(source))}
    assert list(found) == [f"train.tar/{key}" for key in ("two", "turns", "pair", "crawled", "plain")]
    assert [image.size for image in found["train.tar/two"].images] == [(20, 30), (40, 60)]
    assert get_contents(found["train.tar/turns"]) == [(ImagePlaceholder(0), "q"), ("a",)]
    assert found["train.tar/pair"].chosen.content == ("a",) and found["train.tar/pair"].id == "7"
    assert get_contents(found["train.tar/crawled"])[1] == ("a flower",)
    assert get_contents(found["train.tar/plain"])[1] == ("words",)


def test_placeholders_must_match_the_images_of_the_key(folder, photos):
    turns = [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "a"}]
    members = [("a.jpg", encode_jpeg(photos[0])), ("a.json", json.dumps({"conversations": turns}).encode())]
    with pytest.raises(RecordError, match=r"train\.tar/a: 2 image placeholders but 1 image") as caught:
        open_path(write_tar(folder / "train.tar", members))[0]
    assert caught.value.fault is Fault.placeholders


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_korean_names_are_read_in_each_tar_format(folder, photos, form):
    key = "한국어/" + "긴이름" * 20
    assert len(key.encode()) > 100
    source = open_path(
        write_tar(folder / "t.tar", [(f"{key}.jpg", encode_jpeg(photos[0])), (f"{key}.txt", b"x")], form)
    )
    assert source[0].id == f"t/{key}"


def test_an_archive_of_the_tar_command_is_read(folder, photos):
    (folder / "set").mkdir()
    for name, data in make_samples(photos):
        (folder / "set" / name.rpartition("/")[2]).write_bytes(data)
    subprocess.run(["tar", "cf", "set.tar", "./set"], cwd=folder, check=True)
    source = open_path(folder / "set.tar", format=Format.webdataset)
    assert sorted(source[index].id for index in range(len(source))) == [f"set/./set/{n:04}" for n in range(3)]


def test_a_folder_of_shards_is_one_source(folder, photos):
    (folder / "shards").mkdir()
    for number in range(3):
        write_tar(folder / "shards" / f"{number:03}.tar", make_samples(photos, 2))
    source = open_path(folder / "shards")
    assert [source[index].id for index in range(6)] == [f"{n:03}/그림/{m:04}" for n in range(3) for m in range(2)]
    assert source.digest_of(0, 6) != source.digest_of(0, 5)


def test_the_headers_are_read_once(folder, photos, monkeypatch):
    path, cache = write_tar(folder / "train.tar", make_samples(photos)), folder / "cache"
    first = open_path(path, cache=cache)
    monkeypatch.setattr("lit_vlm.data.readers.rows.tar_samples._build_table", None)
    second = open_path(path, cache=cache)
    assert [second[index].id for index in range(3)] == [first[index].id for index in range(3)]
    assert pickle.loads(pickle.dumps(second))[2].id == first[2].id


# Refused archives

SHORT = list(CASES)[:10]
_opened: list[str] | None = None


def _record_event(event, args):
    if _opened is None:
        return
    if event in ("os.mkdir", "os.symlink", "os.link", "os.rename", "os.remove", "subprocess.Popen", "os.system"):
        _opened.append(f"{event} {args}")
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        _opened.append(f"writes {args[0]}")


sys.addaudithook(_record_event)  # a hook cannot be removed: `_opened` switches it on and off


@pytest.mark.parametrize("name", [*SHORT, *(pytest.param(key, marks=pytest.mark.slow) for key in list(CASES)[10:])])
def test_a_hostile_member_is_reported_and_its_neighbours_are_read(folder, photos, name):
    global _opened
    case = CASES[name]
    path = folder / "train.tar"
    path.write_bytes(build_archive(case, encode_jpeg(photos[0])))
    faults, good = [], {}
    _opened = []
    try:
        source = open_path(path)
        for index in range(len(source)):
            try:
                sample = source[index]
                good[sample.id] = (sample.messages[1].text, sample.images[0].load().size)
            except RecordError as error:
                faults.append(error)
        written = list(_opened)
    finally:
        _opened = None
    assert written == [] and not os.path.exists(CANARY)
    assert faults and all(error.origin.startswith("train.tar") for error in faults)
    assert any(case.words in error.reason and error.fault is case.fault for error in faults), faults
    reached = ["train/a"] if case.lost else ["train/a", "train/z"]
    assert sorted(good) == reached and good["train/a"] == ("앞", (60, 40))


def test_there_are_fifty_hostile_archives():
    assert len(CASES) >= 50


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.tar", b"", "cannot be read as a tar file: the archive ends without its end mark"),
        ("a.tar", b"no archive" * 100, "cannot be read as a tar file: no member's header is there"),
        ("a.tar", b"\x1f\x8b\x08" + b"\0" * 600, "is compressed, .* to a plain .tar once .`gunzip`."),
        ("a.tar", b"\x28\xb5\x2f\xfd" + b"\0" * 600, "`unzstd`"),
        ("a.tar.gz", b"\x1f\x8b\x08", "is compressed, so its members cannot be reached one by one"),
        ("a.tgz", b"", "is compressed"),
        ("a.tar", b"\0" * 10240, "no records in it"),
    ],
)
def test_a_file_that_is_no_plain_tar_is_refused_as_a_whole(folder, name, data, words):
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        open_path(folder / name)
    assert not isinstance(caught.value, RecordError)


def test_webdataset_reads_only_tars(folder):
    (folder / "a.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"format=webdataset reads \.tar files; found a\.jsonl"):
        open_path(folder / "a.jsonl", format=Format.webdataset)


def test_a_member_of_too_many_bytes_is_refused_without_reading_it(folder, photos, monkeypatch):
    monkeypatch.setattr("lit_vlm.data.readers.rows.tar_headers.MAX_FILE_BYTES", 10_000)
    body = make_member("a.jpg", b"\0" * 20_000) + make_member("a.txt", b"x")
    (folder / "t.tar").write_bytes(body + b"\0" * 1024)
    with pytest.raises(RecordError, match="has 20,000 bytes, at most 10,000 are read") as caught:
        open_path(folder / "t.tar")[0]
    assert caught.value.fault is Fault.too_large


def test_an_archive_that_changes_after_it_was_opened_is_detected(folder, photos):
    rows = open_tar(write_tar(folder / "train.tar", make_samples(photos)))
    write_tar(folder / "train.tar", [("b.jpg", encode_jpeg(photos[1]) * 3), ("b.txt", b"x")])
    with pytest.raises(RecordError):
        for index in range(3):
            rows[index]
