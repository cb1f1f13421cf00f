"""Rows with known duplicates, changes that are none, and leaks of a benchmark, for the benchmarks of task=curate."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from lit_vlm.data.lazy_images import hash_pixels
from lit_vlm.data.synthetic import BuiltinSource
from lit_vlm.types import Language

BUILTIN = ("caption", "grounding", "ocr", "document", "table", "chart", "instruction", "arithmetic")
NOUNS = (
    "사람 자동차 건물 나무 하늘 가게 간판 시장 다리 강아지 고양이 자전거 의자 책상 창문 커피 바다 산 버스 우산".split()
)
VERBS = "서 있습니다 보입니다 놓여 있습니다 지나갑니다 빛나고 있습니다 기다립니다 앉아 있습니다".split()
COLOURS = "빨간 파란 초록 노란 하얀 검은 보라색 주황색".split()
ENGLISH = (
    "person car building tree sky shop sign market bridge dog cat bicycle chair desk window coffee sea hill bus".split()
)


def make_sentence(rng: random.Random, words: int = 12) -> str:
    """Make a sentence in Korean, or in English one time in three."""
    if rng.random() < 1 / 3:
        return " ".join(
            rng.choice(("the", "a", "red", "blue", "large", "small", "near", "behind", *ENGLISH)) for _ in range(words)
        )
    return " ".join(rng.choice((*COLOURS, *NOUNS, *NOUNS, *VERBS)) for _ in range(words))


def draw_texture(rng: np.random.Generator, width: int = 320, height: int = 240) -> Image.Image:
    """Draw noise of several octaves in random colours, with shapes on it."""
    total = np.zeros((height, width, 3), np.float32)
    for octave in (3, 6, 12, 24, 48):
        noise = Image.fromarray(rng.integers(0, 256, (octave, octave, 3), dtype=np.uint8))
        weight = rng.uniform(0.3, 1) / octave**0.5
        total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) * weight
    total = (total - total.min()) / (total.max() - total.min()) * 255
    image = Image.fromarray(total.astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 5)):
        x, y, size = rng.integers(0, width), rng.integers(0, height), rng.integers(20, 90)
        pen.ellipse((int(x), int(y), int(x + size), int(y + size)), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def load_photos() -> list[np.ndarray]:
    """Load the photographs of scikit-learn and scikit-image."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    some = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), data.retina()]
    return [*load_sample_images().images, *some]


def iterate_photo_parts() -> Iterator[Callable[[], Image.Image]]:
    """Iterate over functions that cut a part of a photograph. Two parts of one differ by at least 15 % of their side."""
    arrays = load_photos()
    for share in (0.45, 0.3, 0.2, 0.14):
        for array in arrays:
            photo = Image.fromarray(array).convert("RGB")
            width, height = int(photo.width * share), int(photo.height * share)
            for top in range(0, photo.height - height, max(1, int(0.15 * height))):
                for left in range(0, photo.width - width, max(1, int(0.15 * width))):
                    yield partial(cut_part, photo, (left, top, left + width, top + height))


def cut_part(photo: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    return photo.crop(box).resize((320, 240), Image.Resampling.BICUBIC)


def iterate_base_rows(seed: int) -> Iterator[tuple[str, Image.Image, list[str]]]:
    """Iterate over (kind of picture, picture, turns) without end; no two have the same pixels."""
    rng, texts = np.random.default_rng(seed), random.Random(seed)
    sources = [
        BuiltinSource(kind, kind, language=Language.auto, num_samples=10**6, hard=True, seed=seed) for kind in BUILTIN
    ]
    parts = list(iterate_photo_parts()) if seed == 0 else []
    texts.shuffle(parts)
    seen = set()
    for number in range(10**6):
        turns = [make_sentence(texts, 6), f"{make_sentence(texts)} {number}"]
        draw = texts.random()
        if draw < 0.45:
            sample = sources[number % len(sources)][number]
            kind, image, turns = "built-in", sample.images[0].load(), [message.text for message in sample.messages]
        elif draw < 0.7 and parts:
            kind, image = "photo", parts.pop()()
        else:
            kind, image = "texture", draw_texture(rng)
        digest = hash_pixels(np.asarray(image))
        if digest not in seen:
            seen.add(digest)
            yield kind, image, turns


def crop_anywhere(image: Image.Image, rng: random.Random) -> Image.Image:
    """Crop to 95 % of each side."""
    width, height = round(0.95 * image.width), round(0.95 * image.height)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def turn_hue(image: Image.Image, rng: random.Random) -> Image.Image:
    hsv = np.asarray(image.convert("HSV")).copy()
    hsv[..., 0] += 85  # modulo 256: a third of the circle
    return Image.fromarray(hsv, "HSV").convert("RGB")


def is_coloured(image: Image.Image) -> bool:
    """Return True if a twentieth of the picture has a clear colour; otherwise turning the hue changes nothing that is seen."""
    hsv = np.asarray(image.convert("HSV"))
    return bool(((hsv[..., 1] > 80) & (hsv[..., 2] > 60)).mean() > 0.05)


def scale(factor: float) -> Callable[[Image.Image, random.Random], Image.Image]:
    return lambda image, rng: image.resize(
        (max(1, round(image.width * factor)), max(1, round(image.height * factor))), Image.Resampling.BICUBIC
    )


DUPLICATES: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "JPEG quality 40": lambda image, rng: image,
    "half size": scale(0.5),
    "double size": scale(2),
    "crop to 95 %": crop_anywhere,
}
OTHERS: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "flipped": lambda image, rng: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "hue turned": turn_hue,
    "captioned anew": lambda image, rng: image,
}


def plant(folder: Path, num_rows: int) -> list[dict[str, Any]]:
    """Plant rows in a folder. Returns what each row is: its change, its original and its kind of picture."""
    (folder / "images").mkdir(parents=True)
    rng, base = random.Random(7), iterate_base_rows(0)
    num_duplicates, num_others, num_leaks = num_rows // 20, num_rows // 40, num_rows // 100
    changes = [list(DUPLICATES)[n % len(DUPLICATES)] for n in range(num_duplicates)]
    changes += [list(OTHERS)[n % len(OTHERS)] for n in range(num_others)]
    facts: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    originals: dict[int, Image.Image] = {}
    num_base = num_rows - len(changes) - num_leaks
    chosen = set(rng.sample(range(num_base), min(num_base, 2 * len(changes))))

    def add(image: Image.Image, turns: list[str], quality: int, **fact: Any) -> None:
        number = len(rows)
        image.save(folder / "images" / f"{number}.jpg", quality=quality)
        conversation = [
            {"from": ("human", "gpt")[place % 2], "value": ("" if place else "<image>\n") + text}
            for place, text in enumerate(turns)
        ]
        rows.append({"id": str(number), "image": f"images/{number}.jpg", "conversations": conversation})
        facts.append({"turns": turns, **fact})

    for number in range(num_base):
        kind, image, turns = next(base)
        add(image, turns, 92, change="", original=None, kind=kind)
        if number in chosen:
            originals[number] = image
    unused = list(originals)
    rng.shuffle(unused)
    for change in changes:
        place = next(n for n, one in enumerate(unused) if change != "hue turned" or is_coloured(originals[one]))
        original = unused.pop(place)
        image = (DUPLICATES | OTHERS)[change](originals[original], rng)
        turns = facts[original]["turns"]
        turns = [make_sentence(rng, 5), make_sentence(rng)] if change == "captioned anew" else turns
        quality = 40 if change == "JPEG quality 40" else 90
        add(image, turns, quality, change=change, original=original, kind=facts[original]["kind"])
    plant_leaks(folder, num_leaks, add, rng)
    (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return facts


def plant_leaks(folder: Path, num_leaks: int, add: Callable[..., None], rng: random.Random) -> None:
    """Write a benchmark in MMStar's layout with twice as many rows as leaks, and add the leaks."""
    import datasets

    base, rows = iterate_base_rows(1), []
    for number in range(2 * num_leaks):
        _, image, _ = next(base)
        stream = io.BytesIO()
        image.save(stream, "PNG")
        question = f"{make_sentence(rng, 24)}?\nA. 하나, B. 둘, C. 셋, D. 넷"
        rows.append(
            {"index": number, "question": question, "answer": "A", "category": "math", "l2_category": "geometry"}
        )
        rows[-1]["image"] = {"bytes": stream.getvalue(), "path": None}
        if number >= num_leaks:
            continue
        if number % 2:
            question = question.partition("?")[0]
            spaced = question if question.isascii() else question.replace(" ", "", 3)
            turns = [f"{make_sentence(rng, 4)}. {spaced}", make_sentence(rng, 6)]
            add(next(base)[1], turns, 92, change="leak: question", original=number, kind="text")
        else:
            small = number % 4 == 0
            image = scale(0.5)(image, rng) if small else image
            change = "leak: half size" if small else "leak: JPEG quality 40"
            turns = [make_sentence(rng, 5), make_sentence(rng)]
            add(image, turns, 90 if small else 40, change=change, original=number, kind="picture")
    path = folder / "benchmarks" / "mmstar" / "val.parquet"
    path.parent.mkdir(parents=True)
    data = datasets.Dataset.from_list(rows)
    data.cast(datasets.Features({**data.features, "image": datasets.Image()})).to_parquet(path)
