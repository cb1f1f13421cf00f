"""Random crops, flips and RandAugment of training images: what they do, and that their draws depend on seed, step and record alone."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from PIL import Image

from lit_vlm.data.augmentation import OPERATIONS, Augmentation, apply_rand_augment, draw_crop
from lit_vlm.data.caption_pairs import load_pixels
from lit_vlm.data.pair_data import PairDataModule, PairProcessor
from lit_vlm.data.synthetic import BuiltinSource
from lit_vlm.model.qformer.build import load_caption_tokenizer, tokenize_captions
from lit_vlm.model.tiny import make_text_encoder
from lit_vlm.types import Language

BLIP = Augmentation(0.2, flips=True, rand_augment=True)
STEPS, BATCH = 5, 6


def make_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(100, 60), (30, 200), (17, 17)])
def test_a_crop_lies_in_the_image_and_keeps_the_least_area(size):
    rng, areas, ratios = np.random.default_rng(1), [], []
    for _ in range(300):
        left, top, right, bottom = draw_crop(size, 0.5, rng)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        areas.append((right - left) * (bottom - top) / (size[0] * size[1]))
        ratios.append((right - left) / (bottom - top))
    slack = 1 / min(size)  # sides are whole pixels
    assert max(areas) <= 1 and 0.75 - 2 * slack <= min(ratios) and max(ratios) <= 4 / 3 + 2 * slack
    if size != (30, 200):  # no crop of half this narrow image has such a ratio: its middle is taken
        assert 0.5 - 2 * slack <= min(areas) < 0.55 and max(areas) > 0.7
    else:
        assert set(areas) == {40 / 200}


def test_without_changes_the_pixels_are_those_of_the_validation():
    image, rng = make_image(50, 40), np.random.default_rng(0)
    assert Augmentation().is_off and not BLIP.is_off
    assert np.array_equal(Augmentation().load_pixels(image, 28, rng), load_pixels(image, 28))


def test_half_of_the_images_are_mirrored():
    image, mirrored = make_image(28, 28), 0
    for seed in range(200):
        pixels = Augmentation(flips=True).load_pixels(image, 28, np.random.default_rng(seed))
        is_mirrored = np.array_equal(pixels, np.array(image)[:, ::-1])
        assert is_mirrored or np.array_equal(pixels, np.array(image))
        mirrored += is_mirrored
    assert 75 <= mirrored <= 125


def test_operations_move_to_both_sides_and_fill_with_grey():
    assert len(OPERATIONS) == 10
    image = Image.new("RGB", (40, 40), (10, 200, 30))
    for number in (5, 6, 7, 8, 9):
        sides = [np.array(OPERATIONS[number](image, sign)) for sign in (1.0, -1.0)]
        assert not np.array_equal(*sides)
        for pixels in sides:
            assert (pixels == 128).all(-1).any() and (pixels[20, 20] == (10, 200, 30)).all()
    assert (np.array(OPERATIONS[7](image, 1.0)) == 128).all(-1).sum() == 5 * 40  # five columns
    unchanged = sum(
        np.array_equal(apply_rand_augment(make_image(20, 20), np.random.default_rng(seed)), make_image(20, 20))
        for seed in range(300)
    )
    assert 0.35 < unchanged / 300 < 0.65  # (1 - 0.5 * 0.7)^2 = 0.42; noise has full contrast already


# ---- in training


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> PairProcessor:
    folder = tmp_path_factory.mktemp("text") / "encoder"
    make_text_encoder(folder, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    tokenizer = load_caption_tokenizer(str(folder))
    return PairProcessor(tokenizer, functools.partial(tokenize_captions, tokenizer, max_tokens=12), 28)


def read_steps(
    processor: PairProcessor, start: int = 0, rank: tuple[int, int] = (0, 1), **options
) -> list[torch.Tensor]:
    """Read the pixels of all steps from `start` on, of one rank."""
    source = BuiltinSource("captions", "caption", language=Language.ko, num_samples=40)
    options = {"augmentation": BLIP, "seed": 3} | options
    data = PairDataModule(processor, [source], 0.1, global_batch_size=BATCH, max_steps=STEPS, **options)
    data._get_rank = lambda: rank
    data.build_indexes()
    data.start_step = start
    return [batch.pixel_values for batch in data.train_dataloader()]


def test_draws_depend_on_seed_step_and_record_alone(processor):
    whole = read_steps(processor)
    assert len(whole) == STEPS
    for resumed, step in zip(read_steps(processor, start=2), whole[2:], strict=True):
        assert torch.equal(resumed, step)
    for parallel, step in zip(read_steps(processor, num_workers=2), whole, strict=True):
        assert torch.equal(parallel, step)
    ranks = [read_steps(processor, rank=(number, 2)) for number in range(2)]
    for first, second, step in zip(*ranks, whole, strict=True):
        assert torch.equal(torch.cat([first, second]), step)
    other, plain = read_steps(processor, augmentation=None)[0], read_steps(processor, seed=4)[0]
    assert not torch.equal(other, whole[0]) and not torch.equal(plain, whole[0])


def test_held_out_images_are_not_changed(processor):
    source = BuiltinSource("captions", "caption", language=Language.ko, num_samples=40)
    both = []
    for augmentation in (BLIP, None):
        data = PairDataModule(processor, [source], 0.2, global_batch_size=BATCH, max_steps=2, augmentation=augmentation)
        data.build_indexes()
        both.append([batch.pixel_values for batch in data.val_dataloader()])
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True)) and len(both[0]) > 0
