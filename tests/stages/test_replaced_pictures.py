"""What was kept of a picture is not used for another one of the same name, size and tiles."""

import os
import shutil

import numpy as np
import pytest
from fits import exported, fit
from PIL import Image

from lit_vlm.config.schema import Format, SourceConfig
from lit_vlm.data.sources import open_source
from lit_vlm.stages import AlignStage, DPOStage
from lit_vlm.types import UserError

RECORDS = 12
STAGES = {"features": (AlignStage, "cache_features"), "reference": (DPOStage, "cache_reference")}


@pytest.fixture
def start(model, processor, tmp_path):
    return exported(model, processor, tmp_path / "hf")


@pytest.fixture(params=STAGES)
def case(request, start, processor, tmp_path):
    """What fits the stage on the pictures of a folder, with the cache or without it."""
    stage_class, setting = STAGES[request.param]

    def run(folder, cache=True, stage=None):
        stage = stage or stage_class(start, learning_rate=3e-3, warmup=0.0, **{setting: cache})
        return fit(stage, processor, [source(folder)], tmp_path / "store", global_batch_size=3, max_steps=6)

    run.stage = lambda: stage_class(start, **{setting: True})
    return run


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(RECORDS):
        draw(tmp_path / "pictures", number, seed=number)
    return tmp_path / "pictures"


def draw(folder, number, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{number}.bmp")


def source(folder):
    lines = [
        f'{{"id": {n}, "image": "{n}.bmp", "prompt": "<image>\\nq{n}", "chosen": "good", "rejected": "{n} bad"}}'
        for n in range(RECORDS)
    ]
    (folder / "train.jsonl").write_text("\n".join(lines))
    config = SourceConfig(path=str(folder / "train.jsonl"), format=Format.preference)
    return open_source("mine", config, max_image_pixels=1_000_000)


def news(run):
    """New records and those with other pictures, of both halves."""
    return [said.partition(" records ")[2].partition(";")[0] for said in run.said]


def test_a_replaced_picture_is_looked_at_anew(case, folder):
    before = case(folder)
    assert news(before) == ["9 are new", "3 are new"]
    sizes = [os.stat(folder / f"{n}.bmp").st_size for n in range(RECORDS)]
    for number in range(RECORDS):
        draw(folder, number, seed=100 + number)
    assert [os.stat(folder / f"{n}.bmp").st_size for n in range(RECORDS)] == sizes
    after = case(folder)
    assert news(after) == [
        "9 are new, 9 with other pictures than before",
        "3 are new, 3 with other pictures than before",
    ]
    plain = case(folder, cache=False)
    assert after.losses == pytest.approx(plain.losses, rel=1e-5) and after.losses != pytest.approx(
        before.losses, rel=1e-5
    )
    assert after.metrics["val/loss"] == pytest.approx(plain.metrics["val/loss"], rel=1e-5)
    draw(folder, 4, seed=4)  # the old one is back, and what was kept of it is there still
    assert news(case(folder)) == ["0 are new"] * 2


def test_a_copy_elsewhere_is_no_other_picture(case, folder, tmp_path):
    before = case(folder)
    shutil.move(folder, tmp_path / "elsewhere")
    for file in (tmp_path / "elsewhere").iterdir():
        os.utime(file, ns=(1, 1))
    after = case(tmp_path / "elsewhere")
    assert news(after) == ["0 are new"] * 2 and after.losses == before.losses


def test_a_picture_that_is_replaced_while_the_run_trains_ends_it(case, folder):
    stage = case.stage()
    prepare = stage.prepare

    def then_replaced():
        prepare()
        for number in range(RECORDS):
            draw(folder, number, seed=100 + number)

    stage.prepare = then_replaced
    with pytest.raises(UserError, match=r"image '\d+.bmp' holds something else than when it was indexed"):
        case(folder, stage=stage)
    assert news(case(folder)) == [
        "9 are new, 9 with other pictures than before",
        "3 are new, 3 with other pictures than before",
    ]
