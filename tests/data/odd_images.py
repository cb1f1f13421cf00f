"""Eight classes of odd but good images: their pixels must be read exactly."""

from __future__ import annotations

import struct
import unicodedata

import numpy as np
from image_bytes import decode_plain, encode, make_16_bit_png, make_bmp, make_photo, make_png
from PIL import Image


def wrong_endings(corpus) -> None:
    for number, image_format in enumerate(("JPEG", "PNG", "WEBP", "GIF", "BMP")):
        for ending in (".jpg", ".png", ".heic", ".txt", ""):
            data = encode(make_photo(10 + number), image_format)
            corpus.add_file(f"{image_format}_as{ending}", data, None, decode_plain(data))


def colour_spaces(corpus) -> None:
    for seed in range(8):  # CMYK, as printers deliver it; Adobe inverts the values
        data = encode(make_photo(20 + seed).convert("CMYK"), "JPEG", quality=95, progressive=seed % 2 == 1)
        corpus.add_file(f"cmyk_{seed}.jpg", data, None, np.asarray(make_photo(20 + seed)), 5.0)
    for seed, (image_format, mode) in enumerate(
        [
            ("JPEG", "L"),
            ("PNG", "L"),
            ("PNG", "1"),
            ("GIF", "L"),
            ("BMP", "L"),
            ("BMP", "1"),
            ("BMP", "P"),
            ("PNG", "P"),
        ]
    ):
        data = encode(make_photo(30 + seed).convert(mode), image_format)
        corpus.add_file(f"{mode}_{seed}.{image_format.lower()}", data, None, decode_plain(data))
    options = [{"subsampling": number} for number in range(3)] + [{"progressive": True}, {"restart_marker_rows": 1}]
    options += [{"keep_rgb": True}, {"optimize": True}, {"quality": 100}, {"comment": b"\xff\xd9 \xff\xda"}]
    for seed, option in enumerate(options):
        data = encode(make_photo(40 + seed), "JPEG", **{"quality": 95, **option})
        corpus.add_file(f"option_{seed}.jpg", data, None, np.asarray(make_photo(40 + seed)), 4.0)


def other_depths(corpus) -> None:
    for channels in (1, 2, 3, 4):
        for seed in range(5):
            values = np.random.default_rng(seed).integers(0, 65_536, (9, 7 + seed, channels))
            if channels in (2, 4):
                values[..., -1] = 65_535  # opaque
            colours = values[..., : 1 if channels < 3 else 3] / 257
            reference = np.broadcast_to(colours, (*colours.shape[:2], 3))
            corpus.add_file(f"{channels}_{seed}.png", make_16_bit_png(values), None, reference, 1.0)
    for depth in (1, 2, 4):
        rows = b"".join(b"\0" + bytes([number]) for number in (0b00011011, 0b11100100))
        values = [[row >> 8 - depth * (x + 1) & 2**depth - 1 for x in range(8 // depth)] for row in (0x1B, 0xE4)]
        grey = np.array(values)[..., None] * 255 // (2**depth - 1)
        data = make_png(8 // depth, 2, rows, depth=depth, colour=0)
        corpus.add_file(f"{depth}_bits.png", data, None, np.broadcast_to(grey, (*grey.shape[:2], 3)))
    red = make_bmp(2, 1, 16)[:-100] + struct.pack("<HH", 0b11111 << 10, 0)
    corpus.add_file("555.bmp", red, None, np.array([[[255, 0, 0], [0, 0, 0]]]))
    ramp = np.linspace(0, 65_535, 256).round().astype(np.uint16).reshape(1, 256)
    data = encode(Image.fromarray(ramp), "PNG")
    corpus.add_file("ramp.png", data, None, np.repeat(np.arange(256)[None, :, None], 3, axis=2))


def transparency(corpus) -> None:
    """Transparent pixels are blended with white, as on paper."""
    for seed in range(3):
        colours = np.asarray(make_photo(60 + seed)).astype(float)
        alpha = np.random.default_rng(seed).integers(0, 256, colours.shape[:2]).astype(np.uint8)
        cover = alpha[..., None] / 255
        rgba = np.dstack([colours.astype(np.uint8), alpha])
        blended = colours * cover + 255 * (1 - cover)
        corpus.add_file(f"rgba_{seed}.png", encode(Image.fromarray(rgba), "PNG"), None, blended, 1.0)
        data = encode(Image.fromarray(rgba), "WEBP", lossless=True, exact=True)
        corpus.add_file(f"rgba_{seed}.webp", data, None, blended, 1.0)
        grey = np.asarray(make_photo(60 + seed).convert("L"))
        la = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
        blended = np.repeat(grey[..., None] * cover + 255 * (1 - cover), 3, axis=2)
        corpus.add_file(f"la_{seed}.png", encode(la, "PNG"), None, blended, 1.0)
        codes = np.random.default_rng(seed).integers(0, 4, (6, 8)).astype(np.uint8)
        palette = np.random.default_rng(seed).integers(0, 250, (4, 3)).astype(np.uint8)
        image = Image.frombytes("P", (8, 6), codes.tobytes())
        image.putpalette(palette.tobytes())
        clear = np.where((codes == seed)[..., None], 255, palette[codes])
        corpus.add_file(f"palette_{seed}.png", encode(image, "PNG", transparency=seed), None, clear)
        corpus.add_file(f"palette_{seed}.gif", encode(image, "GIF", transparency=seed), None, clear)
        covers = np.array([0, 85, 170, 255])[codes][..., None] / 255
        data = encode(image, "PNG", transparency=bytes([0, 85, 170, 255]))
        corpus.add_file(f"covers_{seed}.png", data, None, palette[codes] * covers + 255 * (1 - covers), 1.0)
        rgb = Image.fromarray(palette[codes])
        data = encode(rgb, "PNG", transparency=tuple(int(value) for value in palette[seed]))
        corpus.add_file(f"key_{seed}.png", data, None, clear)
        grey = palette[codes][..., 0]
        data = encode(Image.fromarray(grey), "PNG", transparency=int(palette[seed][0]))
        clear = np.repeat(np.where(codes == seed, 255, grey)[..., None], 3, axis=2)
        corpus.add_file(f"grey_key_{seed}.png", data, None, clear)
    data = encode(Image.new("RGBA", (9, 6), (255, 0, 0, 0)), "PNG")
    corpus.add_file("nothing.png", data, None, np.full((6, 9, 3), 255))


def animations(corpus) -> None:
    """The first frame is the image."""
    for image_format in ("GIF", "WEBP", "PNG"):
        for count in range(2, 10):
            frames = [Image.new("RGB", (8, 6), (number * 25, 255 - number * 25, 40)) for number in range(count)]
            options = {"lossless": True} if image_format == "WEBP" else {}
            data = encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
            reference = np.asarray(frames[0])
            corpus.add_file(f"{count}.{image_format.lower()}", data, None, reference)
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True)
    corpus.add_file("default.png", data, None, np.asarray(frames[0]))


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
    9: lambda a: a,  # not a valid orientation
}


def orientations(corpus) -> None:
    kinds = [(name, number) for name in ("JPEG", "PNG", "WEBP") for number in range(1, 9)]
    for image_format, number in [*kinds, ("JPEG", 9)]:
        exif = Image.Exif()
        exif[0x0112] = number
        data = encode(make_photo(70 + number), image_format, exif=exif)
        corpus.add_file(f"{number}.{image_format.lower()}", data, None, UPRIGHT[number](decode_plain(data)))


def thin(corpus) -> None:
    sizes = [(1, 1), (1, 2), (2, 1), (1, 500), (500, 1), (1, 10_000), (10_000, 1), (3, 2000)]
    cases = [(size, name) for name in ("PNG", "JPEG", "BMP") for size in sizes] + [((1, 16_000), "WEBP")]
    for (width, height), image_format in cases:
        data = encode(Image.new("RGB", (width, height), (200, 30, 90)), image_format)
        corpus.add_file(f"{width}x{height}.{image_format.lower()}", data, None, decode_plain(data))


def hangul_names(corpus) -> None:
    names = ["고양이 둘.png", "한글/사진.png", "각.png", "뷁.png", "가나다라마바사.png", "ㄱㄴㄷ.png", "é.png"]
    for number, name in enumerate(names):
        for on_disk, written in (("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")):
            folder = f"{number}{on_disk}{written}"
            reference = np.asarray(make_photo(100 + number))
            place = corpus.make_path(f"{folder}/{unicodedata.normalize(on_disk, name)}")
            place.write_bytes(encode(make_photo(100 + number), "PNG"))
            corpus.add_case(f"hangul_names/{folder}/{unicodedata.normalize(written, name)}", None, reference)
    for number, name in enumerate(("😀.png", "two  spaces .png", "-rf.png", "a'\"`$(x).png")):
        corpus.add_file(name, encode(make_photo(110 + number), "PNG"), None, np.asarray(make_photo(110 + number)))


CLASSES = (wrong_endings, colour_spaces, other_depths, transparency, animations, orientations, thin, hangul_names)
