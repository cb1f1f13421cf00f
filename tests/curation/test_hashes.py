"""Hashes of pictures and texts, and the search among them: what is found, and what is not."""

import io
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from skimage import data as photos

from lit_vlm.curation import matching
from lit_vlm.curation.duplicates import find_same_pixels
from lit_vlm.curation.matching import iterate_ranges, match_pictures, match_texts
from lit_vlm.curation.picture_details import MIN_DETAIL, compare_details
from lit_vlm.curation.picture_hashes import (
    NUM_VIEWS,
    digest_reduction,
    find_same_views,
    hash_reduced,
    reduce_picture,
)
from lit_vlm.curation.text_hashes import (
    NUM_PERMUTATIONS,
    compute_signatures,
    estimate_similarities,
    hash_numbers,
    hash_shingles,
    hash_text,
    iterate_shingles,
    join_turns,
)
from lit_vlm.types import Message, Role

PHOTO = Image.fromarray(photos.astronaut()).resize((320, 240))
OTHER = Image.fromarray(photos.coffee()).resize((320, 240))


def reencode(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def paint(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image)[:, :, [2, 0, 1]])


class PictureHash(NamedTuple):
    reduction: np.ndarray
    views: np.ndarray
    thumbnail: np.ndarray


def hash_picture(picture: Image.Image) -> PictureHash:
    reduced = reduce_picture(picture)
    views, thumbnails = hash_reduced(reduced[None])
    return PictureHash(digest_reduction(reduced, picture.size), views[0], thumbnails[0])


def test_pictures_have_the_same_hashes_alone_and_among_others():
    pictures = [change(photo) for photo in (PHOTO, OTHER) for change in (paint, lambda image: image)] * 20
    views, thumbnails = hash_reduced(np.stack([reduce_picture(one) for one in pictures]))
    assert len(views) > 64
    for number in range(4):
        alone = hash_picture(pictures[number])
        assert (views[number::4] == alone.views).all() and (thumbnails[number::4] == alone.thumbnail).all()


def is_found(first: Image.Image, second: Image.Image) -> bool:
    """Return True if the search takes the two pictures for the same."""
    one, other = hash_picture(first), hash_picture(second)
    brightness = np.array([one.thumbnail.mean(), other.thumbnail.mean()])
    pairs = match_pictures(np.stack([one.views, other.views]), brightness)
    return bool(len(pairs.first)) and bool(
        find_same_views(np.stack([one.thumbnail, other.thumbnail]), np.array([0]), np.array([1]))[0]
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda image: reencode(image, 40),
        lambda image: image.resize((160, 120), Image.Resampling.BICUBIC),
        lambda image: image.resize((640, 480), Image.Resampling.BICUBIC),
        lambda image: image.crop((0, 0, 304, 228)),
        lambda image: image.crop((8, 10, 312, 238)),
    ],
    ids=["quality 40", "half", "double", "corner", "inside"],
)
def test_a_reencoded_resized_or_slightly_cropped_picture_is_the_same(change):
    for photo in (PHOTO, OTHER):
        assert is_found(photo, change(photo))
        assert is_found(change(photo), photo)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        lambda image: image.transpose(Image.Transpose.ROTATE_180),
        paint,
        lambda image: image.crop((0, 0, 200, 150)),
        lambda image: OTHER,
    ],
    ids=["flipped", "rotated", "recoloured", "a part", "another"],
)
def test_a_flipped_recoloured_or_largely_cropped_picture_is_another(change):
    assert not is_found(PHOTO, change(PHOTO))


def test_red_and_blue_of_one_shape_differ_although_their_perceptual_hash_is_the_same():
    red, blue = (Image.new("RGB", (96, 96), "white") for _ in range(2))
    red.paste("#d22", (20, 20, 70, 70))
    blue.paste("#22d", (20, 20, 70, 70))
    assert np.bitwise_count(hash_picture(red).views[0] ^ hash_picture(blue).views[0]) <= 10
    assert not is_found(red, blue)


def test_equal_pixels_have_equal_reductions_and_the_size_counts():
    photo = np.asarray(PHOTO)
    digests = {
        hash_picture(Image.fromarray(one)).reduction.tobytes()
        for one in (photo, photo[:, ::-1], photo.reshape(320, 240, 3))
    }
    assert len(digests) == 3
    assert hash_picture(Image.fromarray(photo.copy())).reduction.tobytes() in digests
    flat = (Image.new("RGB", size, "white") for size in ((64, 96), (96, 64)))
    assert len({hash_picture(one).reduction.tobytes() for one in flat}) == 2


def test_pictures_of_one_reduction_are_the_same_only_if_all_pixels_are():
    photo = np.asarray(PHOTO.resize((640, 480)))
    swapped = photo.copy()
    swapped[0, :2] = photo[0, 1::-1]  # two neighbours: averages of whole blocks do not tell
    assert (swapped != photo).any()
    pictures = [photo, swapped, photo.copy(), swapped.copy(), np.zeros_like(photo), photo.copy()]
    pictures[-1][479, 600:] = 7
    loaded, decoded = [Image.fromarray(one) for one in pictures], []
    digests = np.stack([hash_picture(one).reduction for one in loaded])
    assert (digests[:4] == digests[0]).all()
    contents = np.arange(len(pictures))

    def load(number: int) -> Image.Image:
        decoded.append(number)
        return loaded[number]

    found = find_same_pixels(digests, contents, load, workers=1)
    assert found.tolist() == [0, 1, 0, 1, 4, 5]
    assert 4 not in decoded  # no other picture has its reduction
    contents[2] = 0  # the same bytes: known without a look
    decoded.clear()
    assert find_same_pixels(digests, contents, load, workers=1).tolist() == [0, 1, 0, 1, 4, 5]
    assert 2 not in decoded


def write_page(*lines: str, size=(220, 160)) -> Image.Image:
    """Write lines of text as large as on a small form."""
    page = Image.new("RGB", size, (236, 236, 244))
    pen = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        pen.text((8, 10 + 36 * number), line, fill=(30, 30, 60), font=ImageFont.load_default(18))
    return page


PAGE = ("Name: Sam", "Date: 2022-05-12", "City: Cairo", "Total: $3,500")


@pytest.mark.parametrize("line", range(len(PAGE)))
def test_pages_of_one_layout_differ_by_the_details_of_any_line(line):
    others = ("Name: Eva", "Date: 2028-07-26", "City: Lima", "Total: $9,870")
    changed = write_page(*(others[number] if number == line else text for number, text in enumerate(PAGE)))
    assert compare_details(write_page(*PAGE), changed) < MIN_DETAIL


@pytest.mark.parametrize("picture", [write_page(*PAGE), PHOTO], ids=["page", "photo"])
def test_the_details_of_a_copy_agree(picture):
    width, height = picture.size
    half = reencode(picture.resize((width // 2, height // 2), Image.Resampling.BICUBIC), 80)
    assert compare_details(picture, reencode(picture, 40)) > 0.9
    assert compare_details(picture, half) > 0.9
    for share in (0.95, 0.97, 0.99):
        left, top = round(0.4 * (1 - share) * width), round(0.6 * (1 - share) * height)
        crop = picture.crop((left, top, left + round(share * width), top + round(share * height)))
        assert compare_details(picture, reencode(crop, 85)) >= MIN_DETAIL
        assert compare_details(reencode(crop, 85), picture) >= MIN_DETAIL


def test_pictures_without_details_are_compared_by_their_thumbnails_alone():
    assert compare_details(Image.new("RGB", (50, 9), "white"), Image.new("RGB", (400, 300), "black")) == 1.0


def test_near_hashes_are_found_as_often_as_the_tables_promise():
    random = np.random.default_rng(0)
    count = 2000
    hashes = random.integers(0, 1 << 63, count, np.uint64)
    near = hashes.copy()
    for number in range(count):
        for bit in random.permutation(63)[:6]:
            near[number] ^= np.uint64(1) << np.uint64(bit)
    views = np.repeat(np.concatenate([hashes, near])[:, None], NUM_VIEWS, 1)
    pairs = match_pictures(views, np.zeros(2 * count))
    found = set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    share = sum((number, number + count) in found for number in range(count)) / count
    assert share > 0.98  # the tables promise 0.99
    assert all(np.bitwise_count(views[a, 0] ^ views[b, 0]) <= 10 for a, b in found)


@pytest.mark.parametrize("num_rows", [1, 10**5, 10**6, 10**8])
def test_more_rows_have_more_bits_and_as_many_tables_as_the_recall_needs(num_rows: int):
    masks = matching.choose_masks(num_rows)
    num_bits = {int(mask).bit_count() for mask in masks}
    assert num_bits == {max(20, (num_rows - 1).bit_length() + 1)}
    random = np.random.default_rng(2)
    places = random.permuted(np.tile(np.arange(64, dtype=np.uint64), (5000, 1)), axis=1)[:, :6]
    changes = np.bitwise_or.reduce(np.uint64(1) << places, axis=1)
    found = (changes[:, None] & np.array(masks, np.uint64) == 0).any(1)
    assert found.mean() > 0.985  # 0.99 less 3.5 standard errors


def test_pairs_with_others_are_those_of_all_pairs_that_have_one():
    random = np.random.default_rng(3)
    views = np.repeat(random.integers(0, 1 << 63, (40, 1), np.uint64), NUM_VIEWS, 1)
    views = np.concatenate([views] * 5) ^ (np.uint64(1) << random.integers(0, 63, (200, NUM_VIEWS), np.uint64))
    brightness, others = random.uniform(0, 255, 200), np.arange(150, 160)
    every, some = match_pictures(views, brightness), match_pictures(views, brightness, others)
    pairs = set(zip(every.first.tolist(), every.second.tolist(), strict=True))
    assert len(pairs) == 40 * 10  # a pair differs in at most 2 bits
    expected = {pair for pair in pairs if set(pair) & set(others.tolist())}
    assert set(zip(some.first.tolist(), some.second.tolist(), strict=True)) == expected


def test_a_full_bucket_is_searched_among_the_nearest_brightness_and_counted():
    views = np.full((500, NUM_VIEWS), 7, np.uint64)
    brightness = np.linspace(0, 250, 500)
    pairs = match_pictures(views, brightness)
    assert pairs.num_full_buckets == len(matching.choose_masks(500))
    assert {(number, number + 1) for number in range(499)} <= set(
        zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)
    )
    assert len(pairs.first) <= 500 * matching.WINDOW


def test_ranges_are_iterated_completely_in_chunks_of_any_size():
    low, high = np.array([3, 5, 5, 0, 9]), np.array([6, 5, 9, 2, 30])
    expected = [(n, place) for n in range(5) for place in range(low[n], high[n])]
    for chunk in (1, 4, 100):
        found = [pair for one, other in iterate_ranges(low, high, chunk) for pair in zip(one, other, strict=True)]
        assert found == expected


def sign(*texts: str) -> tuple[np.ndarray, np.ndarray]:
    signatures = compute_signatures([hash_shingles(iterate_shingles(text)) for text in texts])
    return signatures, np.array([hash_numbers(text) for text in texts], np.uint64)


def test_the_similarity_of_signatures_is_that_of_the_shingles():
    random = np.random.default_rng(1)
    shared = random.integers(0, 1 << 63, 400, np.uint64)
    texts = [
        np.sort(np.concatenate([shared, random.integers(0, 1 << 63, 100, np.uint64)])) for _ in range(2)
    ]  # Jaccard 400 / 600
    signatures = compute_signatures(texts)
    assert signatures.shape == (2, NUM_PERMUTATIONS)
    found = estimate_similarities(signatures[:1], signatures[1:])[0]
    assert abs(found - 2 / 3) < 4 * (2 / 9 / NUM_PERMUTATIONS) ** 0.5


def test_korean_texts_that_differ_in_spacing_are_nearly_equal_and_a_number_makes_them_differ():
    text = "서울역 앞 광장에서 사람들이 빨간 버스를 기다리고 있습니다 그 옆에는 택시 3대가 서 있습니다"
    others = [text.replace(" ", ""), text.replace("3", "4"), "부산 해운대 바닷가에서 아이들이 모래성을 쌓고 있습니다"]
    pairs = match_texts(*sign(text, *others), 0.8)
    assert list(zip(pairs.first, pairs.second, strict=True)) == [(0, 1)]


def test_short_texts_are_nearly_equal_only_if_their_shingles_are():
    pairs = match_texts(*sign("빨간 원", "빨간원", "빨간 점", "a red circle", "A red circle.", "a blue circle"), 0.8)
    assert list(zip(pairs.first, pairs.second, strict=True)) == [(0, 1), (3, 4)]


def test_english_words_keep_their_order():
    pairs = match_texts(*sign("the dog bites the man in the park", "the man bites the dog in the park"), 0.8)
    assert len(pairs.first) == 0


def test_turns_are_equal_after_unicode_and_white_space_and_not_across_roles():
    def hash_turns(*turns):
        return hash_text(join_turns(Message(role, (text,)) for role, text in turns))

    user, assistant = Role.user, Role.assistant
    known = hash_turns((user, "무엇이 보이나요?"), (assistant, "각"))
    assert hash_turns((user, " 무엇이\n보이나요? "), (assistant, "\u1100\u1161\u11a8")) == known
    assert hash_turns((user, "무엇이 보이나요? 각")) != known
    assert hash_turns((assistant, "무엇이 보이나요?"), (user, "각")) != known
