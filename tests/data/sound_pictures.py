"""Valid images of many encoders.

`make_pictures` writes files of JPEG, PNG, WebP, GIF, BMP and AVIF with the encoders that are installed: Pillow; libvips,
ImageMagick, cwebp, gif2webp, libjpeg-turbo's cjpeg and jpegtran, jpegoptim, gifsicle and MozJPEG where they are found.
None of the files may be refused; `half_pictures.py` truncates them.
"""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, features

WORDS = "문서 page 2024 계약서 total 1,204.50 표 figure 한국어 text 가나다 lorem ipsum 사진 1/3"


@dataclass(frozen=True)
class Picture:
    format: str
    encoder: str
    options: str
    data: bytes


class Missing(Exception):
    """The encoder or the requested option is not available."""


# ---- images


def draw_picture(rng: Random) -> Image.Image:
    kind = rng.choice(
        ["photo", "page", "page", "short page", "flat", "white", "black below", "grey", "scan", "chart", "clear"]
    )
    side = rng.choice([8, 60, 200, 320])
    width, height = rng.randint(1, side), rng.randint(1, side)
    noise = np.random.default_rng(rng.getrandbits(32))
    if kind in ("photo", "scan", "black below", "clear"):
        small = Image.fromarray(noise.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int64)
        values = (smooth + noise.integers(-9, 10, (height, width, 3))).clip(0, 255).astype(np.uint8)
        if kind == "scan":
            values = np.where(values < 90, values, 255).astype(np.uint8)
        if kind == "black below":
            values[height // 2 :] = 0
        image = Image.fromarray(values)
        if kind == "clear":
            image.putalpha(Image.fromarray(noise.integers(0, 256, (height, width), dtype=np.uint8)))
        return image
    colours = {"white": (255, 255, 255), "grey": (128, 128, 128), "flat": tuple(rng.randrange(256) for _ in range(3))}
    image = Image.new("RGB", (width, height), colours.get(kind, "white"))
    pen = ImageDraw.Draw(image)
    if kind.endswith("page"):  # the lower part stays white
        for top in range(4, height * (1 if kind == "page" else rng.choice([1, 3])) // 4, 14):
            pen.text((4, top), " ".join(rng.sample(WORDS.split(), 5)), fill=rng.choice(["black", "#333", "navy"]))
    if kind == "chart":
        for _ in range(6):
            ends = [rng.randint(0, side) for _ in range(4)]
            pen.line(ends, fill=tuple(rng.randrange(256) for _ in range(3)), width=rng.randint(1, 4))
    return image


def blend_with_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


# ---- encoders: (picture, rng, folder) -> (format, options, data)

Encoded = tuple[str, str, bytes]


def save(image: Image.Image, image_format: str, **options) -> Encoded:
    image.save(stream := io.BytesIO(), image_format, **options)
    return image_format, f"{image.mode} {options}", stream.getvalue()


def pillow_jpeg(image: Image.Image, rng: Random, folder: Path) -> Encoded:
    image = blend_with_white(image).convert(rng.choice(["RGB", "RGB", "RGB", "L", "CMYK"]))
    options: dict = {"quality": rng.choice([1, 30, 75, 90, 95, 100]), "progressive": rng.random() < 0.4}
    options |= {"optimize": rng.random() < 0.5, "subsampling": rng.choice([0, 1, 2])}
    options |= rng.choice([{}, {}, {"restart_marker_rows": 1}, {"restart_marker_blocks": rng.randint(1, 9)}])
    return save(image, "JPEG", **options)


def filled_jpeg(image: Image.Image, rng: Random, folder: Path) -> Encoded:
    """JPEG with fill bytes before each marker, bytes after the end, and a thumbnail with its own end marker."""
    _, options, data = pillow_jpeg(image, rng, folder)
    thumbnail = save(Image.new("L", (8, 8)), "JPEG")[2]
    segment = b"\xff\xe1" + struct.pack(">H", 2 + len(thumbnail)) + thumbnail
    whole, at, fill = data[:2] + b"\xff" * rng.randint(0, 3) + segment, 2, b"\xff" * rng.randint(1, 5)
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        whole, at = whole + fill + data[at:end], end
    return (
        "JPEG",
        f"{options} fill={len(fill)}",
        whole + fill + data[at:-2] + fill + data[-2:] + bytes(rng.choice([0, 3])),
    )


def pillow_png(image: Image.Image, rng: Random, folder: Path) -> Encoded:
    mode = rng.choice(["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
    image = image if image.mode == mode else blend_with_white(image)
    image = (
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        if mode == "I;16"
        else image.convert(mode)
    )
    options: dict = {"compress_level": rng.choice([0, 1, 6, 9]), "optimize": rng.random() < 0.3}
    return save(image, "PNG", **options)


def pillow_webp(image: Image.Image, rng: Random, folder: Path) -> Encoded:
    options: dict = {
        "lossless": rng.random() < 0.3,
        "quality": rng.choice([1, 40, 80, 100]),
        "method": rng.randint(0, 6),
    }
    if rng.random() < 0.2:
        options |= {"save_all": True, "append_images": [image.rotate(180), image.rotate(1)]}
    return save(image, "WEBP", **options)


def pillow_gif(image: Image.Image, rng: Random, folder: Path) -> Encoded:
    image = blend_with_white(image).quantize(rng.choice([2, 3, 16, 100, 256])) if rng.random() < 0.7 else image
    options: dict = {"interlace": rng.randint(0, 1)}
    options |= rng.choice([{}, {}, {"transparency": 0}]) if image.mode == "P" else {}
    if rng.random() < 0.3:
        options |= {"save_all": True, "append_images": [image.rotate(180)]}
    return save(image, "GIF", **options)


def pillow_bmp(image: Image.Image, rng: Random, folder: Path) -> Encoded:
    mode = rng.choice(["RGB", "RGBA", "L", "1", "P"])
    return save(image.convert(mode) if image.mode == mode else blend_with_white(image).convert(mode), "BMP")


def pillow_avif(image: Image.Image, rng: Random, folder: Path) -> Encoded:
    if not features.check("avif"):
        raise Missing
    more = {"save_all": True, "append_images": [image.rotate(180)]} if rng.random() < 0.2 else {}
    sampling = {"subsampling": rng.choice(["4:2:0", "4:4:4"])}
    return save(image, "AVIF", quality=rng.choice([10, 60, 95]), speed=10, **sampling, **more)


def hand_bmp(image: Image.Image, rng: Random, folder: Path) -> Encoded:
    """BMP of 16 bits in two layouts, or of 24 or 32 bits with rows from the top down."""
    rgb, bits = np.asarray(blend_with_white(image).convert("RGB")), rng.choice([15, 16, 24, 32])
    height, width, _ = rgb.shape
    masks, red, green, blue = b"", *(rgb[..., number].astype(np.uint16) for number in range(3))
    if bits == 15:
        rows = (red >> 3 << 10 | green >> 3 << 5 | blue >> 3).astype("<u2")[::-1]
    elif bits == 16:
        rows = (red >> 3 << 11 | green >> 2 << 5 | blue >> 3).astype("<u2")[::-1]
        masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    else:
        rows = np.dstack([rgb[..., ::-1], np.full((height, width, 1), 255, np.uint8)])[..., : bits // 8]
    pixels = b"".join(row.tobytes() + bytes(-len(row.tobytes()) % 4) for row in rows)
    depth, tall = (16, height) if bits < 24 else (bits, -height)
    header = struct.pack("<IiiHHIIiiII", 40, width, tall, 1, depth, 3 if masks else 0, len(pixels), 0, 0, 0, 0) + masks
    start = 14 + len(header)
    return "BMP", f"{bits} bits", b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + pixels


@cache
def find_program(name: str) -> str:
    """Find the path of a program. Of two that are called convert, choose that of ImageMagick."""
    places = [shutil.which(name), f"/usr/bin/{name}"]
    for place in filter(None, places):
        if Path(place).exists() and (
            name != "convert" or b"ImageMagick" in subprocess.run([place, "-version"], capture_output=True).stdout[:40]
        ):
            return place
    raise Missing


def run_program(name: str, *arguments: object, input_bytes: bytes | None = None) -> bytes:
    completed = subprocess.run([find_program(name), *map(str, arguments)], input=input_bytes, capture_output=True)
    if completed.returncode:
        raise Missing(completed.stderr[:200])
    return completed.stdout


def cjpeg(image: Image.Image, rng: Random, folder: Path) -> Encoded:
    arguments = ["-quality", str(rng.choice([5, 50, 85, 100]))]
    arguments += rng.choice(
        [[], ["-grayscale"], ["-rgb"], ["-sample", "1x1"], ["-sample", "2x1"], ["-sample", "1x2"], ["-sample", "4x1"]]
    )
    arguments += rng.choice([[], ["-progressive"], ["-optimize"], ["-arithmetic"]])
    arguments += rng.choice([[], [], ["-restart", "1"], ["-restart", f"{rng.randint(1, 7)}B"]])
    if rng.random() < 0.2 and "-progressive" not in arguments:  # each colour in a scan of its own
        (folder / "scans").write_text("0;\n" if "-grayscale" in arguments else "0;\n1;\n2;\n")
        arguments += ["-scans", str(folder / "scans")]
    ppm = save(blend_with_white(image).convert("RGB"), "PPM")[2]
    return (
        "JPEG",
        " ".join(arguments[:-1] if "-scans" in arguments else arguments),
        run_program("cjpeg", *arguments, input_bytes=ppm),
    )


def jpegtran(image: Image.Image, rng: Random, folder: Path) -> Encoded:
    arguments = rng.choice([["-rotate", "180"], ["-transpose"], ["-flip", "vertical"], ["-grayscale"], ["-optimize"]])
    arguments = arguments + rng.choice([[], ["-progressive"], ["-restart", "1"], ["-arithmetic"]])
    return (
        "JPEG",
        " ".join(arguments),
        run_program("jpegtran", *arguments, input_bytes=pillow_jpeg(image.convert("RGB"), rng, folder)[2]),
    )


def jpegoptim(image: Image.Image, rng: Random, folder: Path) -> Encoded:
    arguments = rng.choice([["--all-progressive"], ["--all-normal"]]) + rng.choice([[], ["-m60"], ["--strip-all"]])
    (folder / "in.jpg").write_bytes(pillow_jpeg(image, rng, folder)[2])
    run_program("jpegoptim", "-q", "-f", *arguments, folder / "in.jpg")
    return "JPEG", " ".join(arguments), (folder / "in.jpg").read_bytes()


def mozjpeg(image: Image.Image, rng: Random, folder: Path) -> Encoded:
    try:
        import mozjpeg_lossless_optimization
    except ImportError:
        raise Missing from None
    return "JPEG", "lossless", mozjpeg_lossless_optimization.optimize(pillow_jpeg(image.convert("RGB"), rng, folder)[2])


def cwebp(image: Image.Image, rng: Random, folder: Path) -> Encoded:
    arguments = rng.choice(
        [["-q", rng.choice([0, 30, 75, 100])], ["-lossless"], ["-near_lossless", 40], ["-size", 300]]
    )
    arguments = arguments + ["-m", rng.randint(0, 6), "-segments", rng.randint(1, 4)]
    arguments += rng.choice([[], ["-alpha_q", 20], ["-exact"], ["-af"], ["-sharp_yuv"], ["-preset", "text"]])
    image.save(folder / "in.png")
    return (
        "WEBP",
        " ".join(map(str, arguments)),
        run_program("cwebp", "-quiet", *arguments, folder / "in.png", "-o", "-"),
    )


def gif2webp(image: Image.Image, rng: Random, folder: Path) -> Encoded:
    arguments = rng.choice([[], ["-lossy", "-q", 40], ["-mixed"]])
    image.save(folder / "in.gif", save_all=True, append_images=[image.rotate(180), image.rotate(5)])
    return "WEBP", f"animated {arguments}", run_program("gif2webp", "-quiet", *arguments, folder / "in.gif", "-o", "-")


def gifsicle(image: Image.Image, rng: Random, folder: Path) -> Encoded:
    arguments = rng.choice([["--interlace"], ["--no-interlace"]]) + rng.choice(
        [["-O1"], ["-O3"], ["--no-conserve-memory"]]
    )
    return (
        "GIF",
        " ".join(arguments),
        run_program("gifsicle", *arguments, input_bytes=pillow_gif(image, rng, folder)[2]),
    )


VIPS = {
    "JPEG": ("jpg", ["Q=40", "Q=95,interlace", "optimize_coding", "subsample_mode=off", "Q=80,restart_interval=2"]),
    "PNG": ("png", ["compression=1", "interlace", "palette", "bitdepth=8,filter=all", "interlace,compression=9"]),
    "WEBP": ("webp", ["Q=30", "lossless", "near_lossless", "Q=90,smart_subsample", "alpha_q=10"]),
    "GIF": ("gif", ["dither=0", "interlace", "bitdepth=4"]),
}


def vips(image: Image.Image, rng: Random, folder: Path) -> Encoded:
    image_format = rng.choice(sorted(VIPS))
    ending, options = VIPS[image_format]
    chosen = rng.choice(options)
    image.save(folder / "in.png")
    run_program("vips", "copy", folder / "in.png", f"{folder}/out.{ending}[{chosen}]")
    return image_format, chosen, (folder / f"out.{ending}").read_bytes()


MAGICK = {
    "JPEG": [["-interlace", "JPEG"], ["-quality", "30"], ["-sampling-factor", "4:4:4"], ["-colorspace", "CMYK"], ["-type", "Grayscale"]],
    "PNG": [["-interlace", "PNG"], ["-depth", "16"], ["-colors", "7"], ["-type", "Bilevel"], ["-define", "png:color-type=6"]],
    "WEBP": [["-quality", "60"], ["-define", "webp:lossless=true"], ["-define", "webp:method=6"]],
    "GIF": [["-interlace", "GIF"], ["-colors", "9"], ["-transparent", "white"], ["-dither", "None"]],
    "BMP": [["-compress", "RLE", "-type", "Palette"], ["-compress", "RLE", "-colors", "12"], ["-type", "Bilevel"], ["-type", "TrueColor"]],
}  # fmt: skip


def imagemagick(image: Image.Image, rng: Random, folder: Path) -> Encoded:
    image_format = rng.choice(sorted(MAGICK))
    arguments = rng.choice(MAGICK[image_format])
    target = rng.choice(["BMP3", "BMP"]) if image_format == "BMP" else image_format
    blend_with_white(image).save(folder / "in.png")
    data = run_program("convert", folder / "in.png", *arguments, f"{target}:-")
    return image_format, f"{target} {' '.join(arguments)}", data


Encoder = Callable[[Image.Image, Random, Path], Encoded]
OWN: list[Encoder] = [pillow_jpeg, filled_jpeg, pillow_png, pillow_webp, pillow_gif, pillow_bmp, hand_bmp, pillow_avif]
OTHERS: list[Encoder] = [cjpeg, jpegtran, jpegoptim, mozjpeg, cwebp, gif2webp, gifsicle, vips, imagemagick]


def make_pictures(number: int, seed: int, encoders: list[Encoder], missing: Counter | None = None) -> Iterator[Picture]:
    """Make images with the encoders in turn, in `number` attempts. Count failed attempts in `missing`."""
    rng = Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(number):
            image, encode = draw_picture(rng), encoders[turn % len(encoders)]
            try:
                image_format, options, data = encode(image, rng, Path(folder))
            except Missing:
                if missing is not None:
                    missing[encode.__name__] += 1
                continue
            yield Picture(image_format, encode.__name__, options, data)
