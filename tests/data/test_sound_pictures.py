"""No valid image of any encoder is refused, and no truncated image is used."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from random import Random

import numpy as np
import pytest
from half_pictures import cut_jpeg, cut_picture
from image_bytes import encode, make_photo, make_png, make_webp
from PIL import Image, ImageDraw
from sound_pictures import OTHERS, OWN, Picture, make_pictures, save

from lit_vlm.data.lazy_images import BytesImage
from lit_vlm.types import Fault, RecordError


def load(data: bytes) -> Image.Image:
    return BytesImage(data, "it", 64_000_000).load()


def is_refused(data: bytes) -> bool:
    try:
        load(data)
    except RecordError as error:
        assert error.fault in (Fault.broken, Fault.not_an_image, Fault.too_large), error
        return True
    return False


def audit(pictures: list[Picture]) -> tuple[list[str], list[str], int]:
    """Return the valid images that are refused, the truncated ones that are used, and the number of truncated ones."""
    refused, used, num_truncated, rng = [], [], 0, Random(7)
    for picture in pictures:
        refused += [f"{picture.encoder} {picture.options}"] if is_refused(picture.data) else []
        for truncated in cut_picture(picture, rng):
            num_truncated += 1
            used += [] if is_refused(truncated.data) else [f"{picture.encoder} {picture.options}: {truncated.way}"]
    return refused, used, num_truncated


def test_no_image_of_pillows_encoders_is_refused_and_no_truncated_one_is_used():
    pictures = list(make_pictures(200, 11, OWN))
    refused, used, num_truncated = audit(pictures)
    assert len(pictures) == 200 and num_truncated > 300
    assert refused == [] and used == []


@pytest.mark.long
def test_no_image_of_all_encoders_is_refused_and_no_truncated_one_is_used():
    missing = Counter()
    pictures = list(make_pictures(2400, 12, [*OWN, *OTHERS], missing))
    for name, count in missing.items():
        warnings.warn(f"{count} pictures of {name} were not made: it is not installed, or cannot", stacklevel=1)
    refused, used, num_truncated = audit(pictures)
    assert len(pictures) >= 8 * 2400 // 17 and num_truncated > len(pictures)
    assert refused == [] and used == []


def test_a_page_whose_lower_part_is_white_is_accepted():
    for seed in range(39):
        page = Image.new("RGB", (200 + seed, 400), "white")
        for top in range(8, 60 + seed, 14):
            ImageDraw.Draw(page).text((6, top), f"{seed} lines of a page, then nothing", fill="black")
        for quality in (10, 80):
            data = encode(page, "WEBP", quality=quality)
            assert np.array_equal(np.asarray(load(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_fill_bytes_before_each_marker_of_a_jpeg_are_accepted():
    data = encode(make_photo(1), "JPEG", restart_marker_rows=1)
    filled, at = data[:2], 2
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        filled, at = filled + b"\xff\xff\xff" + data[at:end], end
    filled += b"\xff" + data[at:-2] + b"\xff\xff" + data[-2:]
    assert np.array_equal(np.asarray(load(filled)), np.asarray(load(data)))


def test_extra_bytes_that_change_no_pixel_are_accepted():
    data = encode(make_photo(2), "JPEG")
    for variant in (data[:-2] + b"between" + data[-2:], data + b"behind the end", data + data):
        assert np.array_equal(np.asarray(load(variant)), np.asarray(load(data)))
    rows = b"".join(b"\0" + bytes(range(24)) for _ in range(5))
    whole = make_png(8, 5, rows)
    assert np.array_equal(np.asarray(load(make_png(8, 5, rows + bytes(1000)))), np.asarray(load(whole)))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_with_an_end_marker_is_refused_with_libjpegs_message(progressive):
    data, rng = encode(make_photo(3, (300, 200)), "JPEG", quality=90, progressive=progressive), Random(0)
    for _ in range(40):
        cut = dict(cut_jpeg(data, rng))["cut, given an end"]
        Image.open(io.BytesIO(cut)).load()  # Pillow reports no error
        with pytest.raises(
            RecordError, match="cannot be decoded: Corrupt JPEG data: premature end of data segment|no data"
        ):
            load(cut)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str)
@pytest.mark.parametrize("variant", ["version", "stray bytes"])
def test_a_truncated_jpeg_is_detected_after_a_harmless_warning_of_its_header(options, variant):
    """The reader of libjpeg reports only one warning, and that of the header comes first."""
    plain = encode(make_photo(3, (400, 300)), "JPEG", quality=90, **options)
    changed = {
        "version": plain.replace(b"JFIF\0\x01\x01", b"JFIF\0\x02\x01", 1),
        "stray bytes": plain[:2] + b"\xff\xe5\0\x02\0\0\0" + plain[2:],
    }[variant]
    assert changed != plain and np.array_equal(np.asarray(load(changed)), np.asarray(load(plain)))
    assert is_refused(changed[: len(changed) // 2] + b"\xff\xd9")


def test_data_lost_between_two_restart_markers_is_detected():
    """Detected by bytes that remain before a restart marker, or by another marker than expected. If the data after the
    loss can be decoded to its end, no decoder detects it."""
    data, rng, used = encode(make_photo(3, (400, 300)), "JPEG", quality=90, restart_marker_rows=1), Random(5), 0
    begin = data.index(b"\xff\xda") + 20
    for _ in range(100):
        place, length = rng.randrange(begin, len(data) - 600), rng.randrange(20, 500)
        used += not is_refused(data[:place] + data[place + length :])
    assert used <= 12


def test_a_jpeg_without_one_of_its_colours_is_refused(tmp_path):
    """Each colour is in a scan of its own, and the last two scans are missing."""
    whole = encode(make_photo(4), "JPEG", subsampling=0)
    scan = whole.index(b"\xff\xda")
    one = whole[: scan + 2] + b"\x00\x08\x01\x01\x00\x00\x3f\x00" + whole[scan + 14 : -2] + b"\xff\xd9"
    with pytest.raises(RecordError, match="2 of its 3 colour components have no data"):
        load(one)


@pytest.mark.parametrize("interlaced", [False, True])
def test_a_png_whose_pixels_end_early_is_refused_with_the_number_of_bytes(interlaced):
    width, height = 20, 11
    line = bytes(61) if interlaced else bytes([0]) + bytes(range(1, 61))
    whole = bytearray(make_png(width, height, line * height * 2))
    if interlaced:
        whole[28] = 1
        whole[29:33] = zlib.crc32(bytes(whole[12:29])).to_bytes(4, "big")
    load(bytes(whole))
    short = bytearray(make_png(width, height, line * (height - 1)))
    if interlaced:
        short[28:33] = whole[28:33]
    if not interlaced:
        Image.open(io.BytesIO(short)).load()  # Pillow reports no error
    with pytest.raises(RecordError, match=r"its pixels end after 610 of 671 bytes|image file is truncated"):
        load(bytes(short))


def test_an_avif_is_read_correctly_and_a_heic_is_reported():
    data = save(make_photo(5), "AVIF", quality=95, subsampling="4:4:4")[2]
    assert BytesImage(data, "it", 10**6).size == (64, 96)
    assert np.abs(np.asarray(load(data), float) - np.asarray(make_photo(5), float)).mean() < 4
    with pytest.raises(RecordError) as caught:
        load(data[:-400])
    assert caught.value.fault is Fault.broken
    with pytest.raises(RecordError, match="it starts with .*, HEIC media") as caught:
        load(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400))
    assert caught.value.fault is Fault.not_an_image


def test_pillows_warning_about_large_images_is_not_printed(repository):
    program = (
        "import sys; from lit_vlm.data.lazy_images import BytesImage; from lit_vlm.types import RecordError\n"
        "try: BytesImage(sys.stdin.buffer.read(), 'it', 10**9).size; BytesImage(b'', 'it', 1).size\n"
        "except RecordError as error: print(error.fault)"
    )
    for data in (make_webp(16_383, 9_000), make_png(10_000, 10_000)):
        done = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, cwd=repository)
        assert (done.stdout.strip(), done.stderr) == (b"empty", b"")
