"""Images: valid files are read correctly, faults are reported, and nothing outside the root is opened."""

import io
import json
import os
import pickle
import random
import re
import struct
import sys
import time
import unicodedata
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageFile, ImageOps

from lit_vlm.anyres import ImageSettings, Tiling, make_grid_pinpoints
from lit_vlm.config.schema import SourceConfig
from lit_vlm.data import decoding
from lit_vlm.data.collate import collate
from lit_vlm.data.index.build import build_index
from lit_vlm.data.lazy_images import FORMATS, ArrayImage, BytesImage, FileImage
from lit_vlm.data.sources import open_source
from lit_vlm.data.tiling import compute_decode_size, load_tiles, split_into_tiles
from lit_vlm.types import Fault, ImagePlaceholder, Language, LazyImage, Message, RecordError, Role, Sample, SampleKind

MAX_PIXELS = 64_000_000
SECRET = "secret.png"

_events: list[tuple[str, tuple]] | None = None


def _record_event(event, args):
    if _events is not None and event in ("open", "socket.connect", "socket.getaddrinfo"):
        _events.append((event, args))


sys.addaudithook(_record_event)  # a hook cannot be removed: `_events` switches it on and off


@pytest.fixture
def audit():
    """The opened files and connections of a test."""
    global _events
    _events = []
    yield _events
    _events = None


@pytest.fixture(scope="module")
def photos():
    """Three small photographs that come with installed packages."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    return [Image.fromarray(array).resize((120, 80)) for array in (china, flower, data.astronaut())]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (5, 4), "red").save(tmp_path / SECRET)
    return folder


def open_image(root, path, max_pixels=MAX_PIXELS):
    return FileImage(path, root, "train.jsonl:7", max_pixels)


def encode(image, image_format, **options):
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def make_png_header(width, height, *chunks):
    """Make a PNG that claims a size and holds almost no pixels."""

    def make_chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = make_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    middle = b"".join(make_chunk(name, data) for name, data in chunks)
    pixels = make_chunk(b"IDAT", zlib.compress(bytes(64)))
    return b"\x89PNG\r\n\x1a\n" + header + middle + pixels + make_chunk(b"IEND", b"")


def assert_fails(image, *words):
    """Assert that reading the size and the pixels both raise a RecordError of the record with these words."""
    for use in (lambda: image.size, image.load):
        with pytest.raises(RecordError) as caught:
            use()
        assert caught.value.origin == "train.jsonl:7"
        assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF"])
def test_each_format_is_decoded_to_the_photograph(root, photos, image_format):
    for number, photo in enumerate(photos):
        (root / f"{number}").write_bytes(encode(photo, image_format))
        image = open_image(root, f"{number}")
        assert isinstance(image, LazyImage)
        assert image.size == (80, 120)
        loaded = image.load()
        assert loaded.mode == "RGB" and loaded.size == (120, 80)
        difference = np.abs(np.asarray(loaded, float) - np.asarray(photo, float)).mean()
        assert difference < (0.01 if image_format in ("PNG", "BMP") else 12)


@pytest.mark.parametrize("size", [(120, 80), (17, 33), (1, 1), (8, 301)])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_has_the_pixels_of_pillow(root, photos, size, subsampling, progressive):
    for quality in (30, 75, 95):
        data = encode(photos[0].resize(size), "JPEG", quality=quality, subsampling=subsampling, progressive=progressive)
        (root / "a.jpg").write_bytes(data)
        image = open_image(root, "a.jpg")
        assert np.array_equal(np.asarray(image.load()), np.asarray(Image.open(io.BytesIO(data))))
        assert image.verify() == image.size == size[::-1]


def test_a_jpeg_is_decoded_by_pillow_if_another_libjpeg_gives_other_pixels(root, photos, monkeypatch):
    data = encode(photos[0], "JPEG")
    (root / "a.jpg").write_bytes(data)
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *args, **options: 255 - decode(*args, **options))
    decoding._has_pixels_of_pillow.cache_clear()
    try:
        assert np.array_equal(np.asarray(open_image(root, "a.jpg").load()), np.asarray(Image.open(io.BytesIO(data))))
    finally:
        decoding._has_pixels_of_pillow.cache_clear()


def test_a_marker_of_a_jpeg_is_found_where_the_definition_says():
    """FF, any number of times, then a code that is neither 00, 01 nor a restart marker."""
    definition = re.compile(rb"\xff+([\x02-\xcf\xd8-\xfe])")
    draw = random.Random(0)
    for _ in range(5000):
        data = bytes(draw.choices((0xFF, 0xFF, 0, 1, 2, 7, 0xD0, 0xD9, 0xDA), k=draw.randint(0, 40)))
        markers = decoding._JpegMarkers(data)
        for start in sorted(draw.choices(range(len(data) + 3), k=3)):
            expected = definition.search(data, start)
            assert markers.find(start) == (expected and (expected.start(), expected.end() - 1))
    padding = bytes(
        3 * decoding._SEARCHED_BYTES - 2
    )  # a marker on each side of the borders of what is searched at a time
    for number in range(6):
        data = padding + bytes(number) + b"\xff\xff\xda"
        assert decoding._JpegMarkers(data).find(0) == (len(data) - 3, len(data) - 1)


def test_a_jpeg_with_a_megabyte_of_fill_bytes_is_read(photos):
    """A search that starts anew at each of them would take hours."""
    data = encode(photos[0], "JPEG", quality=90)
    padded = data[:-2] + b"\xff" * 1_000_000 + b"\xd9"
    sound, image = (BytesImage(each, "x", MAX_PIXELS) for each in (data, padded))
    assert image.verify() == sound.size
    assert np.array_equal(np.asarray(image.load()), np.asarray(sound.load()))


def test_images_can_be_sent_to_other_processes(root, photos):
    photos[0].save(root / "a.png")
    sources = [
        open_image(root, "a.png"),
        BytesImage(encode(photos[0], "PNG"), "x", MAX_PIXELS),
        ArrayImage(np.asarray(photos[0]), "x"),
    ]
    for source in sources:
        again = pickle.loads(pickle.dumps(source))
        assert again.size == (80, 120)
        assert np.array_equal(np.asarray(again.load()), np.asarray(photos[0]))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_to_size_and_pixels(root, photos, image_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photos[0], image_format, exif=exif)
    image = BytesImage(data, "x", MAX_PIXELS)
    needed = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert image.size == needed.size[::-1]
    assert np.array_equal(np.asarray(image.load()), np.asarray(needed))


def test_reading_the_size_decodes_nothing(root, photos, monkeypatch):
    def fail_on_decode(*_):
        raise AssertionError("decoded")

    sources = [BytesImage(encode(photos[0], name), "x", MAX_PIXELS) for name in FORMATS]
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail_on_decode)
    assert len(FORMATS) == 6 and [source.size for source in sources] == [(80, 120)] * 6


def test_cmyk_is_converted(root, photos):
    (root / "a.jpg").write_bytes(encode(photos[1].convert("CMYK"), "JPEG", quality=95))
    loaded = open_image(root, "a.jpg").load()
    assert np.abs(np.asarray(loaded, float) - np.asarray(photos[1], float)).mean() < 5


def test_sixteen_bits_are_scaled_and_not_clipped(root):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(1, 256)
    Image.fromarray(ramp).save(root / "a.png")
    loaded = np.asarray(open_image(root, "a.png").load())
    assert np.array_equal(loaded[0, :, 0], np.arange(256))
    assert np.array_equal(loaded[..., 0], loaded[..., 2])


def test_transparency_becomes_white(root):
    clear = Image.new("RGBA", (4, 3), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    palette = Image.new("P", (4, 3), 0)
    palette.putpalette([10, 20, 30, 255, 0, 0])
    palette.putpixel((0, 0), 1)
    clear.save(root / "rgba.png")
    clear.convert("LA").save(root / "la.png")
    palette.save(root / "palette.png", transparency=0)
    palette.save(root / "palette.gif", transparency=0)
    for name in ("rgba.png", "la.png", "palette.png", "palette.gif"):
        loaded = open_image(root, name).load()
        assert loaded.getpixel((3, 2)) == (255, 255, 255), name
        assert loaded.getpixel((0, 0)) != (255, 255, 255), name


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_read(root, image_format):
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "lime", "blue")]
    data = encode(frames[0], image_format, save_all=True, append_images=frames[1:])
    loaded = BytesImage(data, "x", MAX_PIXELS).load()
    red, green, blue = loaded.getpixel((2, 2))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_thin_images_are_read(root, size):
    Image.new("1", size, 1).save(root / "a.png")
    image = open_image(root, "a.png")
    assert image.size == size[::-1]
    assert image.load().getpixel((0, 0)) == (255, 255, 255)


def test_the_format_is_detected_from_the_content_and_not_from_the_extension(root, photos):
    (root / "a.jpg").write_bytes(encode(photos[0], "PNG"))
    assert open_image(root, "a.jpg").size == (80, 120)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("tenth", range(10))
def test_a_truncated_file_is_reported_and_never_read_in_part(root, photos, image_format, tenth):
    data = encode(photos[2], image_format)
    (root / "a.img").write_bytes(data[: len(data) * tenth // 10])
    with pytest.raises(RecordError, match=r"train\.jsonl:7: image 'a\.img' "):
        open_image(root, "a.img").load()
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty: 0 bytes"),
        (b"<!DOCTYPE html><html>", "it starts with b'<!DOCTYPE html><'"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no JPEG, PNG, WEBP, GIF, BMP, AVIF file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC media"),
        (b"II*\0\x08\0\0\0", "is no JPEG"),
        (b"\xff\xd8\xff\xe0" + bytes(50), "image 'a.jpg'"),
    ],
)
def test_a_file_that_is_no_image_is_reported(root, data, words):
    (root / "a.jpg").write_bytes(data)
    assert_fails(open_image(root, "a.jpg"), "train.jsonl:7: image 'a.jpg'", words)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8001, 10_000, 13_000, 20_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_by_its_header(root, side):
    (root / "a.png").write_bytes(make_png_header(side, side))
    began = time.perf_counter()
    assert_fails(open_image(root, "a.png"), "image 'a.png'", "pixels")
    assert time.perf_counter() - began < 1


def test_pillows_warning_raised_as_an_error_becomes_a_record_error(root):
    (root / "a.png").write_bytes(make_png_header(10_000, 10_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_fails(open_image(root, "a.png"), "pixels")


def test_the_message_of_a_large_image_names_size_and_setting(root, photos):
    photos[0].save(root / "a.png")
    assert_fails(open_image(root, "a.png", 9599), "is 120 x 80 = 9,600 pixels; data.max_image_pixels allows 9,599")
    assert open_image(root, "a.png", 9600).size == (80, 120)


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt"])
def test_a_decompression_bomb_in_a_text_chunk_is_refused(root, name):
    between = b"\0" if name == b"zTXt" else b"\x01\0\0\0"
    text = b"key\0" + between + zlib.compress(bytes(50_000_000))
    (root / "a.png").write_bytes(make_png_header(4, 4, (name, text)))
    with pytest.raises(RecordError, match="cannot be decoded"):
        open_image(root, "a.png").load()


def test_a_file_that_is_too_large_is_not_read(root, monkeypatch):
    monkeypatch.setattr("lit_vlm.data.decoding.MAX_FILE_BYTES", 10)
    Image.new("RGB", (4, 4)).save(root / "a.png")
    assert_fails(open_image(root, "a.png"), "bytes, at most 10 are read")
    data = (root / "a.png").read_bytes()
    assert_fails(BytesImage(data, "train.jsonl:7", MAX_PIXELS), "its image has")


def test_the_error_of_a_missing_file_names_the_path_the_root_and_the_remedy(root):
    assert_fails(
        open_image(root, "coco/1.jpg"),
        f"train.jsonl:7: image 'coco/1.jpg' not found in {root}. Set data.sources.<name>.image_root=",
    )


def list_paths(root):
    outside = root.parent
    ups = ["../", "./../", "a/../../", "a/./../../", "..//", "/../", "../images/../", "x/y/../../../", "../../"]
    paths = [f"{up}{name}" for up in ups for name in (SECRET, "secret.png/", "./secret.png", "nothing.png")]
    paths += ["../" * count + "etc/passwd" for count in range(1, 12)]
    paths += [f"{outside}/{SECRET}", f"//{outside}/{SECRET}", f"{root}/../{SECRET}", f"{root}_other/{SECRET}"]
    paths += [
        "/etc/passwd",
        "/proc/self/environ",
        "/dev/zero",
        "/dev/stdin",
        "/",
        "..",
        ".",
        "~/.ssh/id_rsa",
        "~root/x",
    ]
    paths += [
        r"..\secret.png",
        r"..\\..\\secret.png",
        r"C:\secret.png",
        r"\\server\share\a.png",
        "//server/share/a.png",
    ]
    paths += ["%2e%2e/secret.png", "..%2fsecret.png", "%2e%2e%2fsecret.png", "..%252fsecret.png", "..%c0%afsecret.png"]
    paths += ["..\0/secret.png", "a.png\0.jpg", "", "\0", "\ud800", "\ud800/../../secret.png", "a" * 5000, "a/" * 3000]
    paths += ["．．/secret.png", "‥/secret.png", "․․/secret.png", "..／secret.png", "..\u2215secret.png"]
    paths += [
        "link.png",
        "linked/secret.png",
        "linked/../secret.png",
        "loop.png",
        "dangling.png",
        "hop.png",
        "folder.png",
    ]
    return paths


def test_eighty_hostile_paths_open_nothing_outside_the_root(root, audit):
    (root / "link.png").symlink_to(root.parent / SECRET)
    (root / "linked").symlink_to(root.parent)
    (root / "loop.png").symlink_to("loop.png")
    (root / "dangling.png").symlink_to("/nowhere/a.png")
    (root / "hop.png").symlink_to("link.png")
    (root / "folder.png").mkdir()
    (root.parent / f"{root.name}_other").mkdir()
    Image.new("RGB", (5, 4)).save(root.parent / f"{root.name}_other" / SECRET)
    paths = list_paths(root)
    assert len(set(paths)) >= 80
    audit.clear()
    for path in paths:
        assert_fails(open_image(root, path), "image '")
    assert audit == []
    Image.new("RGB", (5, 4)).save(root / "inside.png")
    audit.clear()
    assert open_image(root, "inside.png").size == (4, 5)
    assert [args[0] for _, args in audit] == [str(root / "inside.png")]  # the hook records an open


URLS = [
    *("http://127.0.0.1/a.png", "https://example.com/a.png", "HTTP://127.0.0.1", " http://127.0.0.1/a.png"),
    *("\thttps://x/a.png", "ftp://x/a.png", "s3://bucket/a.png", "gs://bucket/a.png", "hf://datasets/x/a.png"),
    *("file:///etc/passwd", "file:/etc/passwd", "FILE:///etc/passwd", "http:/x/a.png", "http:x", "gopher://x"),
    *("http://[::1]/a.png", "http://169.254.169.254/latest/meta-data", "https://user:pw@x/a.png", "jar:http://x!/a"),
    *(
        "http://0x7f000001/",
        "http://2130706433/",
        "data:image/png;base64,AAAA",
        "ssh://x",
        "zip+http://x",
        "http+unix://x",
    ),
]


def test_urls_are_refused_and_nothing_is_fetched(root, audit):
    for url in URLS:
        assert_fails(
            open_image(root, url), "image '" if url.startswith("jar") else "URLs are never fetched while training"
        )
    assert audit == []


def test_a_path_inside_the_root_may_be_written_in_any_way(root, photos):
    (root / "a").mkdir()
    photos[0].save(root / "a" / "%2e.png")
    (root / "b.png").symlink_to("a/%2e.png")
    for path in ("a/%2e.png", "./a/%2e.png", "a/../a/%2e.png", "b.png", str(root / "a" / "%2e.png")):
        assert open_image(root, path).size == (80, 120)


def test_the_root_itself_may_be_a_link(root, tmp_path, photos):
    photos[0].save(root / "a.png")
    (tmp_path / "here").symlink_to(root)
    assert open_image(tmp_path / "here", "a.png").size == (80, 120)


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_hangul_names_are_found_in_either_unicode_form(root, photos, on_disk, written):
    # The folder is always composed, as it is after copying files of a Mac into a folder made on Linux.
    (root / "사진").mkdir()
    photos[0].save(root / "사진" / unicodedata.normalize(on_disk, "고양이 둘.png"))
    assert open_image(root, unicodedata.normalize(written, "사진/고양이 둘.png")).size == (80, 120)


def test_the_exact_unicode_form_is_preferred(root):
    for number, form in enumerate(("NFC", "NFD"), 1):
        Image.new("RGB", (number, 1)).save(root / unicodedata.normalize(form, "가.png"))
    assert open_image(root, unicodedata.normalize("NFC", "가.png")).size == (1, 1)
    assert open_image(root, unicodedata.normalize("NFD", "가.png")).size == (1, 2)


def test_a_pipe_is_refused_without_waiting(root):
    os.mkfifo(root / "a.png")
    assert_fails(open_image(root, "a.png"), "is not a regular file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_reported(root, photos):
    photos[0].save(root / "a.png")
    (root / "a.png").chmod(0)
    assert_fails(open_image(root, "a.png"), "image 'a.png' cannot be opened: Permission denied")


def test_foreign_names_are_shown_without_their_control_characters(root):
    assert_fails(open_image(root, "\x1b[31mred\n.png"), r"\x1b[31mred\n.png")


REAL = ImageSettings(384, 14, make_grid_pinpoints(384, 6), 9, (0.5,) * 3, (0.5,) * 3)


def make_large_photo(width, height):
    from skimage import data

    return Image.fromarray(data.astronaut()).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("width", "height"), [(640, 480), (1024, 768), (2000, 1500), (333, 777), (384, 384), (1, 90)])
@pytest.mark.parametrize("alone", [True, False])
def test_tiles_of_384_pixels_equal_those_of_transformers(width, height, alone):
    from transformers import LlavaOnevisionImageProcessorPil

    image = make_large_photo(width, height)
    stock = LlavaOnevisionImageProcessorPil(image_mean=[0.5] * 3, do_rescale=False, do_normalize=False)
    theirs = stock([[image]] if alone else [[image, image]], return_tensors="np")["pixel_values"][0]
    ours = split_into_tiles(image, REAL, single_image=alone)
    assert ours.dtype == np.uint8 and ours.flags.c_contiguous
    assert len(ours) == REAL.compute_layout(height, width, single_image=alone).num_tiles
    assert np.array_equal(ours, theirs[: len(ours)])


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("width", "height", "scale"), [(1700, 1600, 4), (900, 2000, 2), (700, 500, 1), (3300, 3100, 8)]
)
def test_scaled_decode_uses_the_smallest_scale_that_the_tiles_need(root, width, height, scale, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    make_large_photo(width, height).save(root / "a.jpg", exif=exif, quality=90)
    image, base = open_image(root, "a.jpg"), replace(REAL, tiling=Tiling.base)
    whole = image.load()
    needed = compute_decode_size(*image.size, base)
    scaled = image.load_at_least(*needed)
    assert needed == (384, 384)
    assert scaled.size == tuple(-(-side // scale) for side in whole.size)
    assert min(scaled.size) >= 384
    for settings, options in [(base, {}), (REAL, {"single_image": False}), (REAL, {"max_tiles": 2}), (REAL, {})]:
        exact = load_tiles(image, settings, **options)
        close = load_tiles(image, settings, scaled_decode=True, **options)
        assert np.array_equal(exact, split_into_tiles(whole, settings, **options))
        assert close.shape == exact.shape
        # In levels of 255, for a photograph with hard edges; largest where it is shrunk to nearly the size of a tile.
        assert np.abs(close.astype(int) - exact).mean() < 6.0


def test_scaled_decode_does_not_change_formats_that_cannot_be_scaled(root):
    photo = make_large_photo(900, 700)
    settings = replace(REAL, tiling=Tiling.base)
    for image in (
        ArrayImage(np.asarray(photo), "x"),
        *(BytesImage(encode(photo, name), "x", MAX_PIXELS) for name in ("PNG", "WEBP", "GIF", "BMP")),
    ):
        exact = load_tiles(image, settings)
        assert np.array_equal(load_tiles(image, settings, scaled_decode=True), exact)


def test_a_truncated_jpeg_is_reported_in_a_scaled_decode_too(root):
    data = encode(make_large_photo(900, 700), "JPEG")
    for torn in (data[: len(data) // 2], data[: len(data) // 2] + bytes(9 * len(data))):
        with pytest.raises(RecordError) as caught:
            BytesImage(torn, "x", MAX_PIXELS).load_at_least(100, 100)
        assert caught.value.fault is Fault.broken


def test_a_micro_batch_opens_each_image_twice(root, processor, audit):
    """Once for its header and once for its pixels: on a network file system every open takes time."""
    for name in "ab":
        make_large_photo(90, 70).save(root / f"{name}.png")
    slots = (ImagePlaceholder(0), ImagePlaceholder(1), "?")
    messages = (Message(Role.user, slots), Message(Role.assistant, ("x",)))
    images = (open_image(root, "a.png"), open_image(root, "b.png"))
    record = Sample("1", "mine", "train.jsonl:7", SampleKind.other, Language.en, messages, images)
    audit.clear()
    batch = collate(processor, [record])
    opened = [args[0] for _, args in audit if str(args[0]).startswith(str(root))]
    assert sorted(opened) == [str(root / "a.png")] * 2 + [str(root / "b.png")] * 2
    assert np.array_equal(batch.tiles.numpy(), np.concatenate(processor.load_tiles(record)))


def test_an_index_opens_each_image_once(root, processor, audit, tmp_path):
    (root / "more").mkdir()
    (root / "linked").symlink_to("more")
    names = ["a.png", "more/b.png", "linked/c.png"]
    rows = []
    for number, name in enumerate(names):
        make_large_photo(90 + number, 70).save(root / name)
        turns = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "x"}]
        rows.append({"id": str(number), "image": name, "conversations": turns})
    (tmp_path / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    settings = SourceConfig(path=str(tmp_path / "train.json"), image_root=str(root))
    source = open_source("mine", settings, max_image_pixels=MAX_PIXELS)
    audit.clear()
    index = build_index([source], processor)
    opened = [args[0] for _, args in audit if str(args[0]).startswith(str(root))]
    assert sorted(opened) == [str(root / name) for name in ("a.png", "more/b.png", "more/c.png")]
    assert [image.size for image in (index.get_record(0).images[0], index.get_record(2).images[0])] == [
        (70, 90),
        (70, 92),
    ]


def test_a_folder_that_turns_into_a_link_out_of_the_root_is_refused(root, photos):
    for name in ("early", "late"):
        assert_fails(open_image(root, f"{name}/a.png"), "not found")
        (root.parent / name).mkdir()
        photos[0].save(root.parent / name / "a.png")
        (root / name).symlink_to(root.parent / name)
        assert_fails(open_image(root, f"{name}/a.png"), "leads out of")
    (root / "read").mkdir()
    photos[0].save(root / "read" / "a.png")
    assert open_image(root, "read/a.png").size == (80, 120)
    (root / "read").rename(root / "moved")
    (root / "read").symlink_to(root.parent / "early")
    assert_fails(open_image(root, "read/a.png"), "leads out of")


def test_an_image_that_changes_between_header_and_pixels_is_reported(processor):
    class ChangingImage(ArrayImage):
        size = (56, 56)

    messages = (Message(Role.user, (ImagePlaceholder(0), "?")), Message(Role.assistant, ("x",)))
    image = ChangingImage(np.zeros((56, 168, 3), np.uint8), "x")
    record = Sample("1", "mine", "train.jsonl:7", SampleKind.other, Language.en, messages, (image,))
    with pytest.raises(RecordError, match="train.jsonl:7: its image changed while it was read") as caught:
        collate(processor, [record])
    assert caught.value.fault is Fault.changed
