"""Cached values of a picture are not used for another one with the same name, size and tiles."""

import os
import shutil

import numpy as np
import pytest
from fits import export_copy, fit
from PIL import Image

from lit_vlm.config.choices import Format
from lit_vlm.config.schema import SourceConfig
from lit_vlm.data.sources import open_source
from lit_vlm.stages import AlignStage, DPOStage
from lit_vlm.types import UserError

RECORDS = 12
STAGES = {"features": (AlignStage, "cache_features"), "reference": (DPOStage, "cache_reference")}


@pytest.fixture
def start(model, processor, tmp_path):
    return export_copy(model, processor, tmp_path / "hf")


@pytest.fixture(params=STAGES)
def case(request, start, processor, tmp_path):
    """Return a function that fits the stage on the pictures of a folder, with or without the cache."""
    stage_class, setting = STAGES[request.param]

    def run(folder, cache=True, stage=None):
        stage = stage or stage_class(start, learning_rate=3e-3, warmup=0.0, **{setting: cache})
        return fit(stage, processor, [make_source(folder)], tmp_path / "store", global_batch_size=3, max_steps=6)

    run.stage = lambda: stage_class(start, **{setting: True})
    return run


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(RECORDS):
        save_noise_picture(tmp_path / "pictures", number, seed=number)
    return tmp_path / "pictures"


def save_noise_picture(folder, number, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{number}.bmp")


def make_source(folder):
    lines = [
        f'{{"id": {n}, "image": "{n}.bmp", "prompt": "<image>\\nq{n}", "chosen": "good", "rejected": "{n} bad"}}'
        for n in range(RECORDS)
    ]
    (folder / "train.jsonl").write_text("\n".join(lines))
    config = SourceConfig(path=str(folder / "train.jsonl"), format=Format.preference)
    return open_source("mine", config, max_image_pixels=1_000_000)


def list_changes(run):
    """Return the reported numbers of new records and records with other pictures, for training and held-out records."""
    passes = [message for message in run.messages if " records " in message]
    return [message.partition(" records ")[2].partition(";")[0] for message in passes]


def test_a_replaced_picture_is_encoded_again(case, folder):
    before = case(folder)
    assert list_changes(before) == ["9 are new", "3 are new"]
    sizes = [os.stat(folder / f"{n}.bmp").st_size for n in range(RECORDS)]
    for number in range(RECORDS):
        save_noise_picture(folder, number, seed=100 + number)
    assert [os.stat(folder / f"{n}.bmp").st_size for n in range(RECORDS)] == sizes
    after = case(folder)
    assert list_changes(after) == [
        "9 are new, 9 with other pictures than before",
        "3 are new, 3 with other pictures than before",
    ]
    plain = case(folder, cache=False)
    assert after.losses == pytest.approx(plain.losses, rel=1e-5) and after.losses != pytest.approx(
        before.losses, rel=1e-5
    )
    assert after.metrics["val/loss"] == pytest.approx(plain.metrics["val/loss"], rel=1e-5)
    save_noise_picture(folder, 4, seed=4)  # the old picture is back, and its cached values still exist
    assert list_changes(case(folder)) == ["0 are new"] * 2


def test_a_moved_picture_is_not_another_picture(case, folder, tmp_path):
    before = case(folder)
    shutil.move(folder, tmp_path / "elsewhere")
    for file in (tmp_path / "elsewhere").iterdir():
        os.utime(file, ns=(1, 1))
    after = case(tmp_path / "elsewhere")
    assert list_changes(after) == ["0 are new"] * 2 and after.losses == before.losses


def test_a_picture_that_is_replaced_during_training_ends_the_run(case, folder):
    stage = case.stage()
    prepare = stage.prepare

    def prepare_and_replace():
        prepare()
        for number in range(RECORDS):
            save_noise_picture(folder, number, seed=100 + number)

    stage.prepare = prepare_and_replace
    with pytest.raises(UserError, match=r"image '\d+.bmp' holds something else than when it was indexed"):
        case(folder, stage=stage)
    assert list_changes(case(folder)) == [
        "9 are new, 9 with other pictures than before",
        "3 are new, 3 with other pictures than before",
    ]
