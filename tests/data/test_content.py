"""Content hashes of images: different for another image of the same name and length, equal for a copy."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from delivery import label, make_zip, open_mapped
from hostile_tars import make_member
from image_bytes import encode, make_photo
from PIL import Image
from pyarrow import parquet
from source_cases import GPT, HUMAN, make_llava, open_path, write
from support import builtin

from lit_vlm.curation.features import PictureHasher
from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.lazy_images import HASHED_BLOCK_BYTES, NUM_HASHED_BLOCKS, BytesImage, compute_image_hash
from lit_vlm.data.synthetic import scenes
from lit_vlm.types import RecordError


def encode_bmp(seed):
    """Encode a BMP; its length is the same for every seed."""
    return encode(make_photo(seed, (20, 16)), "BMP")


def open_loose_files(folder, pictures):
    for number, data in enumerate(pictures):
        (folder / f"{number}.bmp").write_bytes(data)
    rows = [make_llava(HUMAN, GPT, image=f"{number}.bmp", id=number) for number in range(len(pictures))]
    return open_path(write(folder / "train.jsonl", rows))


def open_tar(folder, pictures):
    pairs = [make_member(f"{n}.bmp", data) + make_member(f"{n}.txt", b"words") for n, data in enumerate(pictures)]
    (folder / "train.tar").write_bytes(b"".join(pairs) + bytes(1024))
    return open_path(folder / "train.tar")


def open_zip(folder, pictures):
    make_zip(folder / "TL_1.zip", [(f"{n}.json", label({"q": "what?"})) for n in range(len(pictures))])
    make_zip(folder / "TS_1.zip", [(f"{n}.bmp", data) for n, data in enumerate(pictures)])
    return open_mapped(folder, questions=["{q}"], answer="words")


def open_table(folder, pictures):
    turns = [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "words"}]
    rows = [{"messages": turns, "images": [{"bytes": data, "path": None}]} for data in pictures]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return open_path(folder / "train.parquet")


READERS = [open_loose_files, open_tar, open_zip, open_table]


@pytest.mark.parametrize("make", READERS)
def test_only_the_record_with_a_replaced_image_has_another_hash(tmp_path, processor, make):
    pictures = [encode_bmp(0), encode_bmp(1), encode_bmp(2)]
    source = make(tmp_path, pictures)
    before = [compute_image_hash(source[n]) for n in range(3)]
    assert len(set(before)) == 3 and 0 not in before
    pictures[1] = encode_bmp(5)
    source = make(tmp_path, pictures)
    after = [compute_image_hash(source[n]) for n in range(3)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True]
    data = DataModule(processor, [source], 0.0)
    data.build_indexes()
    assert data.compute_image_hashes(data.index, np.array([2, 1])).tolist() == [after[2], after[1]]


@pytest.mark.parametrize("make", READERS)
def test_a_copy_with_another_path_and_other_times_has_the_same_hash(tmp_path, make):
    (tmp_path / "one").mkdir()
    pictures = [encode_bmp(0), encode_bmp(1)]
    before = [compute_image_hash(record) for record in make(tmp_path / "one", pictures)]
    shutil.move(tmp_path / "one", tmp_path / "two")
    for file in (tmp_path / "two").iterdir():
        os.utime(file, ns=(7, 7))
    source = make(tmp_path / "two", pictures)
    assert [compute_image_hash(record) for record in source] == before


@pytest.mark.parametrize("make", READERS)
def test_pictures_of_each_form_are_hashed_for_the_curation(tmp_path, make):
    seeds = [0, 1, 0]
    hasher = PictureHasher()
    numbers = [hasher.add(record.images[0]) for record in make(tmp_path, [encode_bmp(seed) for seed in seeds])]
    assert numbers == [0, 1, 0]
    alone = PictureHasher()
    for seed in seeds[:2]:
        alone.add(BytesImage(encode_bmp(seed), "x", 10**6))
    assert hasher.get_hashes()["thumbnail"].tolist() == alone.get_hashes()["thumbnail"].tolist()


def test_long_files_are_distinguished_by_their_blocks(tmp_path):
    size = (300, 200)
    long = [encode(make_photo(seed, size), "PNG", compress_level=0) for seed in (0, 1)]
    assert len(long[0]) == len(long[1]) > 2 * NUM_HASHED_BLOCKS * HASHED_BLOCK_BYTES
    first, other = (compute_image_hash(open_loose_files(tmp_path, [data])[0]) for data in long)
    assert first != other
    dotted = np.array(make_photo(0, size))
    dotted[90, 70] ^= 1
    # one pixel: PNG's last bytes are checksums of all pixels, and BMP, which has none, is read whole
    assert (
        compute_image_hash(open_loose_files(tmp_path, [encode(Image.fromarray(dotted), "PNG", compress_level=0)])[0])
        != first
    )
    one, two = (encode(picture, "BMP") for picture in (make_photo(0, size), Image.fromarray(dotted)))
    assert compute_image_hash(open_loose_files(tmp_path, [one])[0]) != compute_image_hash(
        open_loose_files(tmp_path, [two])[0]
    )


def test_hashes_of_built_in_images_follow_the_generator_version(monkeypatch):
    (source,), (same,) = builtin("caption", n=4), builtin("caption", n=4)
    contents = [compute_image_hash(record) for record in source]
    assert contents == [compute_image_hash(record) for record in same] and len(set(contents)) == 4
    monkeypatch.setattr(scenes, "GENERATOR_VERSION", 2)
    assert not set(contents) & {compute_image_hash(record) for record in source}
    assert [compute_image_hash(record) for record in builtin("text", n=2)[0]] == [0, 0]


def test_an_image_without_a_hash_of_its_own_is_decoded_for_it(tmp_path):
    class OwnImage:
        def __init__(self, seed):
            self.size, self.seed = (16, 20), seed

        def load(self):
            return make_photo(self.seed, (20, 16))

    record = open_loose_files(tmp_path, [encode_bmp(0)])[0]
    one, two, three = (compute_image_hash(replace(record, images=(OwnImage(seed),))) for seed in (0, 0, 1))
    assert one == two != three


def test_a_deleted_image_is_reported_and_matches_nothing(tmp_path, processor):
    source = open_loose_files(tmp_path, [encode_bmp(0), encode_bmp(1)])
    data = DataModule(processor, [source], 0.0)
    data.build_indexes()
    (tmp_path / "1.bmp").unlink()
    with pytest.raises(RecordError, match="not found"):
        compute_image_hash(source[1])
    assert data.compute_image_hashes(data.index, np.arange(2)).tolist() == [compute_image_hash(source[0]), 0]
