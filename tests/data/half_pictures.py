"""Truncated images: valid ones, cut in the ways in which files are cut. None of them may be used.

Run as a program, it prints a table of valid images that are refused and of truncated images that are not refused:

    python tests/data/half_pictures.py 2400 [seed]
"""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import simplejpeg
from PIL import Image
from sound_pictures import OTHERS, OWN, Picture, make_pictures


@dataclass(frozen=True)
class TruncatedPicture:
    picture: Picture
    way: str
    data: bytes


def cut_picture(picture: Picture, rng: Random) -> Iterator[TruncatedPicture]:
    """Yield the file cut within its pixels, and with the other kinds of truncation of that format.

    Damage that no decoder detects is left out: an end marker added to a JPEG that is coded arithmetically, ends between
    two progressive scans, or has a colour layout that TurboJPEG does not read; and the last bytes of a lossy WebP of the
    right length.
    """
    for way, data in CUTS[picture.format](picture.data, rng):
        yield TruncatedPicture(picture, way, data)


Cut = tuple[str, bytes]


def cut_jpeg(data: bytes, rng: Random) -> Iterator[Cut]:
    scans, at = [], 2
    while at < len(data) and data[at + 1] != 0xD9:  # markers, with fill bytes; FF 00 and FF D0 to D7 are within a scan
        if data[at] != 0xFF or data[at + 1] in (0, 0xFF, *range(0xD0, 0xD8)):
            at += 1 if data[at + 1] else 2
            continue
        begin = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if data[at + 1] == 0xDA:
            end = begin
            while data[end] != 0xFF or data[end + 1] in (0, *range(0xD0, 0xD8)):
                end += 1
            scans += [(begin, end)] if end > begin else []  # arithmetic coding omits zeros
            begin = end
        at = begin
    if not scans:
        return
    begin, end = rng.choice(scans)
    place = rng.choice([rng.randrange(begin, end), end - 1])
    yield "cut", data[:place]
    if not is_beyond_turbojpeg(data) and not any(bytes([0xFF, frame]) in data[: scans[0][0]] for frame in (0xC9, 0xCA)):
        yield "cut, given an end", data[:place] + b"\xff\xd9"


def is_beyond_turbojpeg(data: bytes) -> bool:
    try:
        simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return True
    return False


def cut_png(data: bytes, rng: Random) -> Iterator[Cut]:
    chunks, at = [], 8
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : end]))
        at = end + 4
    yield "cut", data[: rng.randrange(data.index(b"IDAT"), len(data) - 16)]
    packed = b"".join(body for name, body in chunks if name == b"IDAT")
    pixels = zlib.decompress(packed)
    torn = packed[: rng.randrange(len(packed))]
    parts = {"stream ended early": zlib.compress(pixels[: rng.choice([rng.randrange(len(pixels)), len(pixels) - 1])])}
    if len(zlib.decompressobj().decompress(torn)) < len(pixels):
        parts["stream torn"] = torn
    for way, part in parts.items():
        names = [(name, body) for name, body in chunks if name != b"IDAT"]
        names.insert(len(names) - 1, (b"IDAT", part))
        encoded_chunks = (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in names
        )
        yield f"{way}, right checksums", data[:8] + b"".join(encoded_chunks)


def build_riff(chunks: list[Cut]) -> bytes:
    return b"".join(name.encode() + struct.pack("<I", len(body)) + body + bytes(len(body) % 2) for name, body in chunks)


def parse_riff(data: bytes) -> list[Cut]:
    parts, at = [], 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        parts.append((data[at : at + 4].decode(), data[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    return parts


def cut_webp(data: bytes, rng: Random) -> Iterator[Cut]:
    yield "cut", data[: rng.randrange(20, len(data) - 1)]
    share = rng.uniform(0.1, 0.95)

    def shorten(parts: list[Cut]) -> list[Cut]:
        shortened = []
        for name, body in parts:
            if name == "ANMF":
                body = body[:16] + build_riff(shorten(parse_riff(body[16:])))
            shortened.append((name, body[: int(len(body) * share)] if name in ("VP8 ", "VP8L") else body))
        return shortened

    body = b"WEBP" + build_riff(shorten(parse_riff(data[12:])))
    if len(body) + 16 < len(data):
        yield "pixels shortened, right sizes", b"RIFF" + struct.pack("<I", len(body)) + body


def cut_gif(data: bytes, rng: Random) -> Iterator[Cut]:
    with Image.open(io.BytesIO(data)) as image:
        start = image.tile[0].offset
    blocks, at = b"", start
    while data[at]:
        blocks += data[at + 1 : at + 1 + data[at]]
        at += 1 + data[at]
    yield "cut", data[: rng.randrange(start, at - 2)]
    short = blocks[: rng.randrange(max(1, len(blocks) - 4))]
    packed = b"".join(bytes([len(short[at : at + 255])]) + short[at : at + 255] for at in range(0, len(short), 255))
    yield "blocks ended early", data[:start] + packed + b"\0;"


def cut_plain(data: bytes, rng: Random) -> Iterator[Cut]:
    """Cut BMP, which ends in up to three padding bytes or in two marks of two bytes, and AVIF, which ends in pixels."""
    start = int.from_bytes(data[10:14], "little") if data.startswith(b"BM") else len(data) // 2
    yield "cut", data[: rng.randrange(min(start, len(data) - 5), len(data) - 4)]


CUTS = {"JPEG": cut_jpeg, "PNG": cut_png, "WEBP": cut_webp, "GIF": cut_gif, "BMP": cut_plain, "AVIF": cut_plain}


def main(number: int, seed: int) -> int:
    """Print a table of formats and encoders: files, refused, truncated and undetected ones. Return 1 on a failure."""
    sys.path[:0] = [str(Path(__file__).resolve().parents[2])]
    from lit_vlm.data.lazy_images import BytesImage
    from lit_vlm.types import RecordError

    def get_refusal(data: bytes) -> str:
        try:
            BytesImage(data, "it", 64_000_000).load()
        except RecordError as error:
            return str(error)
        return ""

    missing, table, failures, rng = Counter[str](), dict[tuple[str, str], Counter[str]](), list[str](), Random(seed)
    for picture in make_pictures(number, seed, [*OWN, *OTHERS], missing):
        row = table.setdefault((picture.format, picture.encoder), Counter())
        row["files"] += 1
        if reason := get_refusal(picture.data):
            row["refused"] += 1
            failures.append(f"refused: {picture.encoder} {picture.format} {picture.options}: {reason}")
        for truncated in cut_picture(picture, rng):
            row["halves"] += 1
            if not get_refusal(truncated.data):
                row["unseen"] += 1
                failures.append(f"unseen: {picture.encoder} {picture.format} {picture.options}: {truncated.way}")
    heads = ("files", "refused", "halves", "unseen")
    print(f"{'format':8}{'encoder':16}" + "".join(f"{head:>10}" for head in heads) + f"    seed {seed}")
    rows = [*sorted(table.items()), (("all", ""), sum(table.values(), Counter[str]()))]
    for (image_format, encoder), row in rows:
        print(f"{image_format:8}{encoder:16}" + "".join(f"{row[head]:10,}" for head in heads))
    print("not written:", ", ".join(f"{name} {count}" for name, count in sorted(missing.items())) or "none")
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, [*sys.argv[1:], "2400", "0"][:2])))
