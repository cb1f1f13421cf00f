"""Verification decodes every image once; broken images are found, stored and left out."""

from __future__ import annotations

import multiprocessing
import os
from functools import partial

import numpy as np
import pytest
from index_cases import LinesSource, make_rows, save_photo, write
from waiting import until

from lit_vlm.data.index import shard_cache
from lit_vlm.data.index.build import build_index
from lit_vlm.data.index.verify import verify_images
from lit_vlm.data.lazy_images import BytesImage, FileImage
from lit_vlm.types import Fault, ImagePlaceholder, Language, Message, Role, Sample, SampleKind


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shard_cache, "SHARD_RECORDS", 10)


@pytest.fixture
def lines(tmp_path):
    """File of 34 records, of which 11 are about 1.jpg, which is truncated after its header."""
    path = write(tmp_path / "a.jsonl", make_rows(tmp_path, 34, pictures=2))
    truncated = tmp_path / "1.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-300])
    return path


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Paths of the images that are decoded."""
    paths: list[str] = []
    verify = FileImage.verify
    monkeypatch.setattr(FileImage, "verify", lambda self: paths.append(self.path) or verify(self))
    return paths


def list_truncated_origins(path) -> list[str]:
    return [f"a.jsonl:{i + 1}" for i in range(34) if i % 3 and i % 2]


def test_a_truncated_image_is_found_and_left_out(lines, store, processor):
    before = build_index([LinesSource(lines)], processor, store=store)
    assert len(before) == 34
    found = verify_images(before, store)
    assert [error.origin for _, error in found] == list_truncated_origins(lines)
    assert {(name, error.fault) for name, error in found} == {("lines", Fault.broken)}
    after = build_index([LinesSource(lines)], processor, store=store)
    assert [(name, str(error)) for name, error in after.errors] == [(name, str(error)) for name, error in found]
    assert len(after) == 34 - len(found)
    assert not {f"a.jsonl:{position + 1}" for position in after.position} & {error.origin for _, error in found}


def test_each_image_is_decoded_once_per_shard(lines, store, decoded):
    verify_images([LinesSource(lines)], store)
    assert len(decoded) == 2 * 4  # two pictures, four shards


def test_a_second_pass_decodes_only_the_bad_images(lines, store, decoded):
    found = verify_images([LinesSource(lines)], store)
    decoded.clear()
    assert [str(error) for _, error in verify_images([LinesSource(lines)], store)] == [str(error) for _, error in found]
    assert set(decoded) == {"1.jpg"}


def test_workers_find_the_same_errors_as_one_process(lines, store):
    alone = [str(error) for _, error in verify_images([LinesSource(lines)], None)]
    progress: list[tuple[str, int, int]] = []
    spread = verify_images([LinesSource(lines)], store, workers=2, on_progress=lambda *done: progress.append(done))
    assert [str(error) for _, error in spread] == alone and progress[-1] == ("lines", 34, 34)


def test_a_killed_pass_resumes(lines, store, decoded):
    work = partial(verify_images, [LinesSource(lines, seconds=0.05)], store, workers=2)
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    found = until(lambda: list((store / "shards").glob("*.arrow")), pause=0.01)
    process.kill()
    process.join()
    assert len(found) < 4
    assert len(verify_images([LinesSource(lines)], store)) == 11
    assert decoded.count("0.jpg") <= 4 - len(found)


def test_a_changed_image_is_decoded_again(lines, store, processor, tmp_path):
    verify_images([LinesSource(lines)], store)
    good = tmp_path / "0.jpg"
    data = good.read_bytes()
    good.write_bytes(data[:-300])
    os.utime(good, ns=(1, 1))
    build_index([LinesSource(lines)], processor, store=store, recheck=True)
    assert len(verify_images([LinesSource(lines)], store)) == 22
    assert len(build_index([LinesSource(lines)], processor, store=store)) == 12


def test_a_repaired_image_is_used_again(lines, store, processor, tmp_path):
    verify_images(build_index([LinesSource(lines)], processor, store=store), store)
    assert len(build_index([LinesSource(lines)], processor, store=store)) == 23
    save_photo(tmp_path / "1.jpg", width=30, height=80, seed=5)
    index = build_index([LinesSource(lines)], processor, store=store)
    assert len(index) == 34 and not index.errors and (80, 30) in set(zip(index.height, index.width, strict=True))
    assert verify_images(index, store) == []


def test_only_the_new_shards_of_a_grown_file_are_decoded(lines, store, decoded):
    verify_images([LinesSource(lines)], store)
    write(lines, [{"turns": ["q", "a"], "images": [["0.jpg", 0]]}] * 8, "a")
    decoded.clear()
    verify_images([LinesSource(lines)], store)
    assert decoded.count("0.jpg") == 2  # in the shard that grew and the one after it


def test_another_template_needs_no_second_pass(lines, store, processor, decoded):
    verify_images([LinesSource(lines)], store)
    decoded.clear()
    assert len(build_index([LinesSource(lines)], processor, store=store)) == 23 and not decoded


def test_a_wrong_header_is_found(tmp_path, monkeypatch):
    save_photo(tmp_path / "a.jpg", width=90, height=60)
    path = write(tmp_path / "a.jsonl", [{"turns": ["q", "a"], "images": [["a.jpg", 0]]}])
    monkeypatch.setattr(FileImage, "verify", lambda self: (61, 90))
    ((_, error),) = verify_images([LinesSource(path)], None)
    assert error.fault is Fault.broken and "header says 90 x 60 pixels, decoded it has 90 x 61" in str(error)


def test_images_embedded_in_records_are_verified(processor, store, tmp_path):
    whole = save_photo(tmp_path / "a.jpg").read_bytes()

    class EmbeddedSource:
        name, digest = "inside", "1"

        def __len__(self):
            return 3

        def __getitem__(self, index):
            image = BytesImage(whole if index != 1 else whole[:-300], f"inside[{index}]", 10**6)
            messages = (Message(Role.user, (ImagePlaceholder(0), f"{index}?")), Message(Role.assistant, ("Yes.",)))
            return Sample(str(index), "inside", f"inside[{index}]", SampleKind.other, Language.en, messages, (image,))

    index = build_index([EmbeddedSource()], processor, store=store)
    assert len(set(index.group.tolist())) == 2
    assert [error.origin for _, error in verify_images(index, store)] == ["inside[1]"]
    assert np.array_equal(build_index([EmbeddedSource()], processor, store=store).position, [0, 2])
