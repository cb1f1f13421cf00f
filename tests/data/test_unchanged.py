"""A record that differs from the indexed one is reported: texts, and images in files, in tar and in zip."""

import json
import os
import shutil
import tarfile
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from lit_vlm.config.choices import Format, OnOverlong
from lit_vlm.config.mapping import MappingConfig
from lit_vlm.config.schema import SourceConfig
from lit_vlm.data import micro_batches
from lit_vlm.data.index.build import build_index
from lit_vlm.data.index.lengths import apply_length_policy
from lit_vlm.data.micro_batches import CorruptRecord, read_micro_batch
from lit_vlm.data.quarantine import Ledger
from lit_vlm.data.sources import open_source
from lit_vlm.types import Batch, Fault

COUNT = 3


@pytest.fixture(autouse=True)
def short_retry_delays(monkeypatch):
    monkeypatch.setattr(micro_batches, "RETRY_DELAYS", (0.001, 0.002))


def save_images(folder, seed):
    """Save images of one size, each in the same number of bytes."""
    folder.mkdir(exist_ok=True)
    for number in range(COUNT):
        pixels = np.random.default_rng(100 * seed + number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.bmp")


def make_file_source(folder):
    lines = [{"id": str(n), "image": f"{n}.bmp", "conversations": make_turns(n)} for n in range(COUNT)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return SourceConfig(path=str(folder / "a.jsonl"), image_root=str(folder / "pictures"), format=Format.llava)


def make_tar_source(folder):
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(COUNT):
            picture = folder / "pictures" / f"{number}.bmp"
            (folder / f"{number}.txt").write_text(f"answer {number}")
            tar.add(picture, f"{number}.bmp")
            tar.add(folder / f"{number}.txt", f"{number}.txt")
    return SourceConfig(path=str(folder / "a.tar"), prompts=["What?"])


def make_zip_source(folder):
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        for number in range(COUNT):
            archive.write(folder / "pictures" / f"{number}.bmp", f"answer {number}.bmp")
    mapping = MappingConfig(answer="{@stem}", questions=["What?"], labels=None)
    return SourceConfig(path=str(folder / "a.zip"), format=Format.mapped, mapping=mapping)


def make_turns(number):
    return [{"from": "human", "value": f"<image>\nq{number}"}, {"from": "gpt", "value": f"answer {number}"}]


def open_config(config):
    return open_source("mine", config, max_image_pixels=1_000_000)


@pytest.fixture
def pictures(tmp_path):
    save_images(tmp_path / "pictures", 0)
    return tmp_path / "pictures"


def read_sample(index, processor, sample=0):
    return read_micro_batch(processor, index, (sample,))


class TestPicturesInFiles:
    @pytest.fixture
    def index(self, tmp_path, pictures, processor):
        return build_index([open_config(make_file_source(tmp_path))], processor)

    def test_another_image_of_the_same_size_is_reported_by_name_and_not_added_to_the_ledger(
        self, index, processor, pictures, tmp_path
    ):
        assert isinstance(read_sample(index, processor), Batch)
        save_images(pictures, 1)
        bad = read_sample(index, processor, 1)
        assert isinstance(bad, CorruptRecord) and bad.error.fault is Fault.changed
        message = str(bad.add_to_ledger(Ledger(tmp_path / "ledger.jsonl", [])))
        assert message.startswith("a.jsonl:2: image '1.bmp' holds something else than when it was indexed")
        assert "task=prepare" in message and not (tmp_path / "ledger.jsonl").exists()

    def test_touched_moved_back_and_copied_files_are_the_same_images(self, index, processor, pictures, tmp_path):
        for path in pictures.iterdir():
            os.utime(path, ns=(1, 1))
        assert isinstance(read_sample(index, processor), Batch)
        shutil.copytree(pictures, tmp_path / "copy")
        shutil.rmtree(pictures)
        shutil.move(tmp_path / "copy", pictures)
        assert isinstance(read_sample(index, processor, 2), Batch)

    def test_an_image_that_is_replaced_while_it_is_decoded_is_reported(self, index, processor, pictures, monkeypatch):
        collate = micro_batches.collate

        def collate_and_replace(*args, **kwargs):
            batch = collate(*args, **kwargs)
            save_images(pictures, 1)
            return batch

        monkeypatch.setattr(micro_batches, "collate", collate_and_replace)
        assert isinstance(read_sample(index, processor), CorruptRecord)

    def test_the_digests_of_an_index_depend_on_content_and_not_on_time(self, index, processor, pictures, tmp_path):
        for path in pictures.iterdir():
            os.utime(path, ns=(1, 1))
        again = build_index([open_config(make_file_source(tmp_path))], processor)
        assert (again.columns["stamp"] != index.columns["stamp"]).all()
        assert (again.compute_digest(), again.compute_image_digest()) == (
            index.compute_digest(),
            index.compute_image_digest(),
        )
        save_images(pictures, 1)
        other = build_index([open_config(make_file_source(tmp_path))], processor)
        assert (
            other.compute_digest() != index.compute_digest()
            and other.compute_image_digest() != index.compute_image_digest()
        )

    def test_a_recheck_indexes_the_current_images(self, processor, pictures, tmp_path):
        source = open_config(make_file_source(tmp_path))
        build_index([source], processor, store=tmp_path / "store")
        save_images(pictures, 1)
        stored = build_index([source], processor, store=tmp_path / "store")
        assert isinstance(read_sample(stored, processor), CorruptRecord)
        rechecked = build_index([source], processor, store=tmp_path / "store", recheck=True)
        assert isinstance(read_sample(rechecked, processor), Batch)

    def test_a_shortened_record_is_compared_with_the_whole_record(self, processor, pictures, tmp_path):
        record = {"id": "0", "image": ["0.bmp", "1.bmp"], "conversations": make_turns(0) + make_turns(1)}
        (tmp_path / "b.jsonl").write_text(json.dumps(record))
        config = SourceConfig(path=str(tmp_path / "b.jsonl"), image_root=str(pictures), format=Format.llava)
        whole = build_index([open_config(config)], processor)
        shorter = apply_length_policy(
            whole,
            processor,
            policy=OnOverlong.cut_turn,
            max_tokens=int(whole.tokens[0]) - 1,
            max_tiles=64,
        )
        assert shorter.turns[0] == 2 and isinstance(read_sample(shorter, processor), Batch)
        save_images(pictures, 1)
        assert isinstance(read_sample(shorter, processor), CorruptRecord)


def test_text_replaced_by_other_text_of_the_same_length_is_reported(tmp_path, pictures, processor):
    config = make_file_source(tmp_path)
    index = build_index([open_config(config)], processor)
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text().replace("answer 0", "answer 7"))
    bad = read_sample(index, processor)
    assert (
        isinstance(bad, CorruptRecord)
        and "says something else" in bad.error.reason
        and bad.error.fault is Fault.changed
    )


@pytest.mark.parametrize("pack", [make_tar_source, make_zip_source])
def test_an_archive_that_is_packed_again_passes_with_the_same_images_and_is_reported_with_others(
    tmp_path, pictures, processor, pack
):
    source = open_config(pack(tmp_path))
    index = build_index([source], processor)
    assert isinstance(read_sample(index, processor), Batch)
    time.sleep(0.01)
    pack(tmp_path)
    assert isinstance(read_sample(index, processor, 1), Batch)
    save_images(pictures, 1)
    pack(tmp_path)
    assert isinstance(read_sample(index, processor, 1), CorruptRecord)
    assert open_config(pack(tmp_path)).digest != source.digest  # and the run does not start
