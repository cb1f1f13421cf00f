"""What is read must be what was indexed, or be told: words, pictures in files, in tar and in zip."""

import json
import os
import shutil
import tarfile
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from lit_vlm.config.mapping import MappingConfig
from lit_vlm.config.schema import Format, OnOverlong, SourceConfig
from lit_vlm.data import micro_batches
from lit_vlm.data.index.lengths import apply_length_policy
from lit_vlm.data.index.store import build_index
from lit_vlm.data.micro_batches import CorruptRecord, read_micro_batch
from lit_vlm.data.plan.ledger import Ledger
from lit_vlm.data.sources import open_source
from lit_vlm.types import Batch, Fault

COUNT = 3


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(micro_batches, "RETRY_DELAYS", (0.001, 0.002))


def draw(folder, seed):
    """Pictures of one size, in as many bytes."""
    folder.mkdir(exist_ok=True)
    for number in range(COUNT):
        pixels = np.random.default_rng(100 * seed + number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.bmp")


def as_files(folder):
    lines = [{"id": str(n), "image": f"{n}.bmp", "conversations": turns(n)} for n in range(COUNT)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return SourceConfig(path=str(folder / "a.jsonl"), image_root=str(folder / "pictures"), format=Format.llava)


def as_tar(folder):
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(COUNT):
            picture = folder / "pictures" / f"{number}.bmp"
            (folder / f"{number}.txt").write_text(f"answer {number}")
            tar.add(picture, f"{number}.bmp")
            tar.add(folder / f"{number}.txt", f"{number}.txt")
    return SourceConfig(path=str(folder / "a.tar"), prompts=["What?"])


def as_zip(folder):
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        for number in range(COUNT):
            archive.write(folder / "pictures" / f"{number}.bmp", f"answer {number}.bmp")
    mapping = MappingConfig(answer="{@stem}", questions=["What?"], labels=None)
    return SourceConfig(path=str(folder / "a.zip"), format=Format.mapped, mapping=mapping)


def turns(number):
    return [{"from": "human", "value": f"<image>\nq{number}"}, {"from": "gpt", "value": f"answer {number}"}]


def opened(config):
    return open_source("mine", config, max_image_pixels=1_000_000)


@pytest.fixture
def pictures(tmp_path):
    draw(tmp_path / "pictures", 0)
    return tmp_path / "pictures"


def outcome(index, processor, sample=0):
    return read_micro_batch(processor, index, (sample,))


class TestPicturesInFiles:
    @pytest.fixture
    def index(self, tmp_path, pictures, processor):
        return build_index([opened(as_files(tmp_path))], processor)

    def test_another_picture_of_the_same_size_is_told_by_its_name_and_is_no_bad_record(
        self, index, processor, pictures, tmp_path
    ):
        assert isinstance(outcome(index, processor), Batch)
        draw(pictures, 1)
        bad = outcome(index, processor, 1)
        assert isinstance(bad, CorruptRecord) and bad.error.fault is Fault.changed
        said = str(bad.add_to_ledger(Ledger(tmp_path / "ledger.jsonl", [])))
        assert said.startswith("a.jsonl:2: image '1.bmp' holds something else than when it was indexed")
        assert "task=prepare" in said and not (tmp_path / "ledger.jsonl").exists()

    def test_touched_moved_back_and_copied_files_are_the_same_pictures(self, index, processor, pictures, tmp_path):
        for path in pictures.iterdir():
            os.utime(path, ns=(1, 1))
        assert isinstance(outcome(index, processor), Batch)
        shutil.copytree(pictures, tmp_path / "copy")
        shutil.rmtree(pictures)
        shutil.move(tmp_path / "copy", pictures)
        assert isinstance(outcome(index, processor, 2), Batch)

    def test_a_picture_that_is_replaced_while_it_is_decoded_is_told(self, index, processor, pictures, monkeypatch):
        collate = micro_batches.collate

        def then_replaced(*args, **kwargs):
            batch = collate(*args, **kwargs)
            draw(pictures, 1)
            return batch

        monkeypatch.setattr(micro_batches, "collate", then_replaced)
        assert isinstance(outcome(index, processor), CorruptRecord)

    def test_the_digests_of_an_index_go_by_content_and_not_by_time(self, index, processor, pictures, tmp_path):
        for path in pictures.iterdir():
            os.utime(path, ns=(1, 1))
        again = build_index([opened(as_files(tmp_path))], processor)
        assert (again.columns["stamp"] != index.columns["stamp"]).all()
        assert (again.compute_digest(), again.compute_image_digest()) == (
            index.compute_digest(),
            index.compute_image_digest(),
        )
        draw(pictures, 1)
        other = build_index([opened(as_files(tmp_path))], processor)
        assert (
            other.compute_digest() != index.compute_digest()
            and other.compute_image_digest() != index.compute_image_digest()
        )

    def test_prepare_takes_what_is_there_now(self, processor, pictures, tmp_path):
        source = opened(as_files(tmp_path))
        build_index([source], processor, store=tmp_path / "store")
        draw(pictures, 1)
        kept = build_index([source], processor, store=tmp_path / "store")
        assert isinstance(outcome(kept, processor), CorruptRecord)
        anew = build_index([source], processor, store=tmp_path / "store", recheck=True)
        assert isinstance(outcome(anew, processor), Batch)

    def test_a_record_that_was_shortened_is_held_against_its_whole(self, processor, pictures, tmp_path):
        record = {"id": "0", "image": ["0.bmp", "1.bmp"], "conversations": turns(0) + turns(1)}
        (tmp_path / "b.jsonl").write_text(json.dumps(record))
        config = SourceConfig(path=str(tmp_path / "b.jsonl"), image_root=str(pictures), format=Format.llava)
        whole = build_index([opened(config)], processor)
        shorter = apply_length_policy(
            whole,
            processor,
            policy=OnOverlong.cut_turn,
            max_tokens=int(whole.tokens[0]) - 1,
            max_tiles=64,
        )
        assert shorter.turns[0] == 2 and isinstance(outcome(shorter, processor), Batch)
        draw(pictures, 1)
        assert isinstance(outcome(shorter, processor), CorruptRecord)


def test_words_that_become_others_of_the_same_length_are_told(tmp_path, pictures, processor):
    config = as_files(tmp_path)
    index = build_index([opened(config)], processor)
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text().replace("answer 0", "answer 7"))
    bad = outcome(index, processor)
    assert (
        isinstance(bad, CorruptRecord)
        and "says something else" in bad.error.reason
        and bad.error.fault is Fault.changed
    )


@pytest.mark.parametrize("pack", [as_tar, as_zip])
def test_an_archive_that_is_packed_anew_passes_with_the_same_pictures_and_is_told_with_others(
    tmp_path, pictures, processor, pack
):
    source = opened(pack(tmp_path))
    index = build_index([source], processor)
    assert isinstance(outcome(index, processor), Batch)
    time.sleep(0.01)
    pack(tmp_path)
    assert isinstance(outcome(index, processor, 1), Batch)
    draw(pictures, 1)
    pack(tmp_path)
    assert isinstance(outcome(index, processor, 1), CorruptRecord)
    assert opened(pack(tmp_path)).digest != source.digest  # and a start of the run is refused
