"""500 files with names of images: 20 classes of 25, and the expected result for each.

`make(folder)` writes them below folder/images, and next to it secret files that must never be read. `expected` is the
`Fault` that must be reported; None means that the file is odd but good, and then `reference` holds the expected pixels.
Damage that no reader can detect is not included: JPEG, WebP, GIF and BMP have no checksum.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import odd_images
from image_bytes import (
    compress_zeros,
    encode,
    iter_cuts,
    make_bmp,
    make_gif,
    make_jpeg,
    make_photo,
    make_png,
    make_webp,
)
from PIL import Image

from lit_vlm.types import Fault

PER_CLASS = 25


@dataclass(frozen=True)
class Case:
    kind: str
    path: str  # as a record writes it
    expected: Fault | None
    reference: np.ndarray | None = None  # [H, W, 3]
    tolerance: float = 0.0  # mean absolute difference from the reference, in levels
    unless_root: bool = False  # root can read files without permissions


class Corpus:
    def __init__(self, folder: Path) -> None:
        self.root, self.folder, self.kind, self.cases = folder / "images", folder, "", list[Case]()

    def add_case(self, path: str, expected: Fault | None, reference=None, tolerance: float = 0.0, **more) -> None:
        self.cases.append(Case(self.kind, path, expected, reference, tolerance, **more))

    def make_path(self, name: str) -> Path:
        place = self.root / self.kind / name
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def add_file(self, name: str, data: bytes, expected: Fault | None, reference=None, tolerance: float = 0.0) -> None:
        self.make_path(name).write_bytes(data)
        self.add_case(f"{self.kind}/{name}", expected, reference, tolerance)

    def add_link(self, name: str, target: str | Path, expected: Fault | None, reference=None) -> None:
        self.make_path(name).symlink_to(target)
        self.add_case(f"{self.kind}/{name}", expected, reference)


def make(folder: Path) -> list[Case]:
    corpus = Corpus(folder)
    corpus.root.mkdir(parents=True)
    for fill in CLASSES:
        corpus.kind, before = fill.__name__, len(corpus.cases)
        fill(corpus)
        assert len(corpus.cases) - before == PER_CLASS, (corpus.kind, len(corpus.cases) - before)
    assert len({case.path for case in corpus.cases}) == len(corpus.cases)
    return corpus.cases


def truncated_jpeg(corpus: Corpus) -> None:
    for kind, options in {"baseline": {}, "progressive": {"progressive": True}}.items():
        for part, data in iter_cuts(encode(make_photo(1), "JPEG", **options), 10):
            corpus.add_file(f"{kind}_{part}.jpg", data, Fault.broken)
    whole = encode(make_photo(2), "JPEG")
    for length in (1, 2, 3, 12, len(whole) - 2):
        corpus.add_file(f"{length}_bytes.jpg", whole[:length], Fault.broken)


def truncated_png(corpus: Corpus) -> None:
    for kind, image in {"rgb": make_photo(3), "palette": make_photo(3).quantize(32)}.items():
        for part, data in iter_cuts(encode(image, "PNG"), 10):
            corpus.add_file(f"{kind}_{part}.png", data, Fault.broken)
    whole = encode(make_photo(4), "PNG")
    for length in (1, 4, 8, 20, len(whole) - 12):
        corpus.add_file(f"{length}_bytes.png", whole[:length], Fault.broken)


def truncated_webp_gif_bmp(corpus: Corpus) -> None:
    kinds = {"webp": {}, "lossless.webp": {"lossless": True}, "gif": {}, "bmp": {}}
    for kind, options in kinds.items():
        for part, data in iter_cuts(encode(make_photo(5), kind.split(".")[-1].upper(), **options), 6):
            corpus.add_file(f"{part}.{kind}", data, Fault.broken)
    corpus.add_file("header.gif", b"GIF89a", Fault.broken)


def pixel_bombs(corpus: Corpus) -> None:
    bombs = {f"{side}.png": make_png(side, side) for side in (8001, 9000, 10_000, 13_000, 20_000, 65_535, 2**31 - 1)}
    bombs["whole.png"] = make_png(13_000, 13_000, bytes(13_000 * (13_000 // 8 + 1)), depth=1, colour=0)
    bombs |= {"grey.png": make_png(13_000, 13_000, colour=0), "thin.png": make_png(100_000_000, 1)}
    bombs["deep.png"] = make_png(9000, 9000, depth=16, colour=6)
    bombs |= {f"{side}.gif": make_gif(side, side) for side in (10_000, 65_535)}
    bombs |= {f"frame_{side}.gif": make_gif(1, 1, side, side) for side in (9000, 60_000)}
    bombs |= {"animated.webp": make_webp(16_383, 16_383), "tall.webp": make_webp(8001, 16_383)}
    bombs |= {"lossless.webp": make_webp(16_383, 16_383, b"VP8L"), "lossy.webp": make_webp(16_383, 16_383, b"VP8 ")}
    bombs |= {
        "a.bmp": make_bmp(30_000, 30_000),
        "wide.bmp": make_bmp(2**31 - 1, 2),
        "packed.bmp": make_bmp(20_000, 20_000, 8, 1),
    }
    bombs |= {f"{side}.jpg": make_jpeg(side, side) for side in (9000, 65_500)}
    bombs["progressive.jpg"] = make_jpeg(30_000, 30_000, 0xC2)
    for name, data in bombs.items():
        corpus.add_file(name, data, Fault.too_large)


def chunk_bombs(corpus: Corpus) -> None:
    """Small images with texts and profiles that unpack to many bytes; large images of formats that are not read."""
    starts = {b"zTXt": b"key\0\0", b"iTXt": b"key\0\1\0\0\0", b"iCCP": b"icc\0\0"}
    for kind, start in starts.items():
        for size in (2, 10, 30, 60):
            text = (kind, start + compress_zeros(size))
            corpus.add_file(f"{kind.decode()}_{size}.png", make_png(4, 4, bytes(52), before=[text]), Fault.too_large)
    many = [(b"zTXt", b"key%d\0\0" % number + compress_zeros(1)) for number in range(70)]
    corpus.add_file("many.png", make_png(4, 4, bytes(52), before=many), Fault.too_large)
    for kind in (b"zTXt", b"iTXt"):
        for size in (2, 30):
            text = (kind, starts[kind] + compress_zeros(size))
            corpus.add_file(
                f"behind_{kind.decode()}_{size}.png", make_png(4, 4, bytes(52), behind=[text]), Fault.too_large
            )
    tags = [(256, 4, 1, 60_000), (257, 4, 1, 60_000), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 9)]
    for order, mark in (("<", b"II"), (">", b"MM")):
        directory = b"".join(struct.pack(order + "HHII", *tag) for tag in tags)
        data = mark + struct.pack(order + "HIH", 42, 8, len(tags)) + directory + bytes(4)
        corpus.add_file(f"{mark.decode()}.tif", data, Fault.not_an_image)
    others = {
        "a.ppm": b"P6 60000 60000 255\n",
        "a.fits": b"SIMPLE  =                    T".ljust(80)
        + b"NAXIS   =  2".ljust(80)
        + b"NAXIS1  = 60000".ljust(80),
        "a.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60000 60000\n",
        "a.psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3),
        "a.jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + struct.pack(">II", 60_000, 60_000),
        "a.tga": struct.pack("<BBB5sHHHHBB", 0, 0, 2, b"", 0, 0, 60_000, 60_000, 24, 0),
    }
    for name, data in others.items():
        corpus.add_file(name, data, Fault.not_an_image)


def web_pages(corpus: Corpus) -> None:
    pages = [b"<!DOCTYPE html><html><body>404 Not Found</body></html>", b"<html><head><title>403</title></head></html>"]
    pages += [b"\xef\xbb\xbf<!doctype html>\n<html lang='ko'></html>", b"\n\n  <HTML></HTML>", b"Access denied\n"]
    pages += [b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", b"<?xml version='1.0'?><svg></svg>"]
    pages += [b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", b'{"error": "not found"}', b"[]", b"\n"]
    pages += [b"BMW and GIF are words", b"GIF is a format, PNG too", b"RIFF raff", "사진이 없습니다".encode("cp949")]
    pages += [f"{number} <html>".encode("utf-16") for number in range(5)]
    pages += [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        b"HTTP/1.1 302 Found\r\n\r\n",
        b"null",
    ]
    pages += [b"data:image/png;base64,iVBORw0KGgo=", b"/9j/4AAQSkZJRgABAQ=="]
    for number, page in enumerate(pages):
        corpus.add_file(f"{number}.jpg", page, Fault.not_an_image)


def other_formats(corpus: Corpus) -> None:
    image, brand = make_photo(7), b"\0\0\0\x18ftyp%s\0\0\0\0mif1%s"
    files = [brand % (name, name) for name in (b"heic", b"heix", b"mif1", b"hevc", b"mp42", b"qt  ", b"crx ")]
    files += [encode(image, name) for name in ("TIFF", "PPM", "TGA", "ICO", "PCX", "SGI", "PDF", "EPS")]
    files += [b"8BPS\0\1" + bytes(30), b"\xff\x0a" + bytes(30), b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(9), b"%PDF-1.7\n"]
    files += [b"PK\3\4" + bytes(40), b"\x1f\x8b\x08" + bytes(20), b"7z\xbc\xaf\x27\x1c", b"RIFF\x24\0\0\0WAVEfmt "]
    files += [b"RIFF\x24\0\0\0AVI LIST", np.random.default_rng(0).bytes(4000)]
    for number, data in enumerate(files):
        corpus.add_file(f"{number}.{('jpg', 'png', 'webp')[number % 3]}", data, Fault.not_an_image)


def empty(corpus: Corpus) -> None:
    for number, ending in enumerate((".jpg", ".jpeg", ".png", ".webp", "")):
        for name in ("a", "사진", "two words", ".hidden", "deep/er"):
            corpus.add_file(f"{number}/{name}{ending}", b"", Fault.empty)


def no_files(corpus: Corpus) -> None:
    def add_unreadable(name: str, make: Callable[[Path], object], **more) -> None:
        make(corpus.make_path(name))
        corpus.add_case(f"no_files/{name}", Fault.unreadable, **more)

    def write_forbidden(place: Path) -> None:
        place.write_bytes(encode(make_photo(80), "PNG"))
        place.chmod(0)

    def bind_socket(place: Path) -> None:
        with socket.socket(socket.AF_UNIX) as end:  # socket names must be short: bind from inside the folder
            previous_folder = os.getcwd()
            os.chdir(place.parent)
            end.bind(place.name)
            os.chdir(previous_folder)

    for number in range(4):
        add_unreadable(f"folder_{number}.jpg", Path.mkdir)
        add_unreadable(f"pipe_{number}.jpg", os.mkfifo)
        add_unreadable(f"forbidden_{number}.jpg", write_forbidden, unless_root=True)
        corpus.add_link(f"loop_{number}.jpg", f"loop_{number}.jpg", Fault.unreadable)
        corpus.add_link(f"long_loop_{number}.jpg", f"long_loop_{(number + 1) % 4}.jpg", Fault.unreadable)
    add_unreadable("socket.jpg", bind_socket)
    corpus.add_link("to_folder.jpg", "folder_0.jpg", Fault.unreadable)
    corpus.add_link("to_pipe.jpg", "pipe_0.jpg", Fault.unreadable)
    corpus.add_link("to_loop.jpg", "loop_0.jpg", Fault.unreadable)
    corpus.add_case("no_files/loop_0.jpg/a.jpg", Fault.unreadable)


def outside(corpus: Corpus) -> None:
    secret = corpus.folder / "secret.png"
    secret.write_bytes(encode(make_photo(90), "PNG"))
    sibling = corpus.folder / "images_other"
    sibling.mkdir()
    (sibling / "secret.png").write_bytes(secret.read_bytes())
    for up in ("../", "./../", "outside/../../", "x/y/../../../", "..//", "../images/../", "../images_other/"):
        corpus.add_case(f"{up}secret.png", Fault.outside)
    for path in (
        "/etc/passwd",
        "/proc/self/environ",
        "/dev/zero",
        "/dev/stdin",
        "/",
        "..",
        "../../../../../etc/shadow",
    ):
        corpus.add_case(path, Fault.outside)
    for path in (f"{secret}", f"//{secret}", f"{corpus.root}/../secret.png", f"{corpus.root}_other/secret.png"):
        corpus.add_case(path, Fault.outside)
    corpus.add_link("absolute.png", secret, Fault.outside)
    corpus.add_link("relative.png", "../../secret.png", Fault.outside)
    corpus.add_link("hop.png", "relative.png", Fault.outside)
    corpus.add_link("folder", corpus.folder, Fault.outside)
    corpus.add_case("outside/folder/secret.png", Fault.outside)
    corpus.add_link("zero.png", "/dev/zero", Fault.outside)
    corpus.add_link("dangling.png", "/nowhere/a.png", Fault.outside)


def nowhere(corpus: Corpus) -> None:
    urls = ["http://127.0.0.1/a.png", "https://example.com/a.png", "HTTP://x", " http://x/a.png", "ftp://x/a.png"]
    urls += [
        "s3://bucket/a.png",
        "file:///etc/passwd",
        "file:/etc/passwd",
        "data:image/png;base64,AAAA",
        "gs://b/a.png",
    ]
    urls += ["http://169.254.169.254/latest/meta-data", "hf://datasets/x/a.png"]
    for url in urls:
        corpus.add_case(url, Fault.url)
    corpus.add_file("there.png", encode(make_photo(91), "PNG"), None, np.asarray(make_photo(91)))
    paths = [
        "nowhere/a.png",
        "없음.jpg",
        "nowhere/THERE.PNG",
        "nowhere/there.png ",
        "nowhere/there.png/a.png",
        "",
        "a\0.png",
    ]
    paths += [r"..\secret.png", r"C:\a.png", "%2e%2e/secret.png", "~/a.png"]
    for path in paths:
        corpus.add_case(path, Fault.missing)
    corpus.add_link("dangling.png", "gone.png", Fault.missing)


def damaged(corpus: Corpus) -> None:
    """Changed bits and ends filled with zeros, as after disk errors and interrupted downloads."""
    whole = encode(make_photo(120), "PNG")
    start = whole.index(b"IDAT") + 4
    for part in range(1, 6):
        at = start + (len(whole) - start - 20) * part // 6
        flipped = whole[:at] + bytes([whole[at] ^ 1 << part]) + whole[at + 1 :]
        corpus.add_file(f"flipped_{part}.png", flipped, Fault.broken)
    files = {
        "a.png": whole,
        "flat.png": encode(Image.new("RGB", (400, 400)), "PNG"),
        "a.gif": encode(make_photo(121), "GIF"),
    }
    files |= {
        "a.jpg": encode(make_photo(122), "JPEG"),
        "late.jpg": encode(make_photo(122, (300, 200)), "JPEG", quality=60),
    }
    files |= {
        "palette.png": encode(make_photo(123).quantize(9), "PNG"),
        "grey.png": encode(make_photo(123).convert("L"), "PNG"),
    }
    for name, data in files.items():
        for share in (0.4, 0.8):
            length = min(int(len(data) * share), len(data) - 80)
            corpus.add_file(f"{share}_zeros_{name}", data[:length] + bytes(len(data) - length), Fault.broken)
    for share in (0.5, 0.9):  # longer than the original, like preallocated files: the decoder reads zeros to the end
        data = files["a.jpg"]
        corpus.add_file(f"{share}_longer.jpg", data[: int(len(data) * share)] + bytes(5 * len(data)), Fault.broken)
    data = files["a.jpg"]
    table = data.index(b"\xff\xc4")
    corpus.add_file("tables.jpg", data[: table + 5] + b"\xff" * 40 + data[table + 45 :], Fault.broken)
    header = bytearray(whole)
    header[19] ^= 2  # the width; the checksum detects it
    corpus.add_file("header.png", bytes(header), Fault.broken)
    corpus.add_file("length.png", whole[: start - 8] + b"\0\0\0\x09" + whole[start - 4 :], Fault.broken)
    data = encode(make_photo(123), "WEBP")
    corpus.add_file("sizes.webp", data[:16] + b"\xff\xff\xff\x7f" + data[20:], Fault.broken)


CLASSES = (
    truncated_jpeg,
    truncated_png,
    truncated_webp_gif_bmp,
    pixel_bombs,
    chunk_bombs,
    web_pages,
    other_formats,
    empty,
    no_files,
    outside,
    nowhere,
    damaged,
    *odd_images.CLASSES,
)
