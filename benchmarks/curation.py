"""Benchmark of task=curate: planted duplicates and leaks, beside imagededup and datasketch, and the speed of each part.

    python -m benchmarks.curation [--rows 20000] [--libraries PYTHON] [--matching 100000 1000000] [--parts planted texts hashing matching]

Planted: rows with built-in pictures (large ones), parts of photographs of scikit-image and scikit-learn, and generated textures
with shapes. 1 in 20 rows is a duplicate (JPEG quality 40, half and double size, a crop to 95 % of each side at any place), 1 in 40
is none (flipped, hue turned by a third, the same picture with other turns), 1 in 100 is a leak of a benchmark in its published
layout (a re-encoded or halved picture, or a question with other spacing inside another text). `--libraries` is a Python with
imagededup and datasketch beside this project; both are used as their documentation shows. Times are CPU seconds of the process and
its children. The result goes to benchmarks/results/curation.json with versions.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

import numpy as np
from PIL import Image, ImageDraw

from lit_vlm.config.choices import Certainty, DuplicateKind, PictureMatch
from lit_vlm.config.schema import SourceConfig
from lit_vlm.curation.contamination import find_leaks, read_benchmarks
from lit_vlm.curation.duplicates import find_duplicates, group_pictures
from lit_vlm.curation.features import compute_features
from lit_vlm.curation.matching import match_pictures, match_texts
from lit_vlm.curation.picture_hashes import NUM_VIEWS, hash_picture
from lit_vlm.curation.text_hashes import (
    NUM_PERMUTATIONS,
    compute_signatures,
    hash_numbers,
    hash_shingles,
    iterate_shingles,
)
from lit_vlm.data.lazy_images import FileImage
from lit_vlm.data.sources import open_source
from lit_vlm.data.synthetic import BuiltinSource
from lit_vlm.types import Language

RESULT = Path(__file__).parent / "results" / "curation.json"
BUILTIN = ("caption", "grounding", "ocr", "document", "table", "chart", "instruction", "arithmetic")
NOUNS = (
    "사람 자동차 건물 나무 하늘 가게 간판 시장 다리 강아지 고양이 자전거 의자 책상 창문 커피 바다 산 버스 우산".split()
)
VERBS = "서 있습니다 보입니다 놓여 있습니다 지나갑니다 빛나고 있습니다 기다립니다 앉아 있습니다".split()
COLOURS = "빨간 파란 초록 노란 하얀 검은 보라색 주황색".split()
ENGLISH = (
    "person car building tree sky shop sign market bridge dog cat bicycle chair desk window coffee sea hill bus".split()
)


def measure_cpu() -> float:
    """Measure the CPU seconds of this process and its finished children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure_peak() -> float:
    """Measure the peak memory of this process, GiB. `ru_maxrss` would begin with that of the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


# ------------------------------------------------------------------------------------------------------ planted rows


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


def iterate_photo_parts() -> Iterator[Callable[[], Image.Image]]:
    """Iterate over functions that cut a part of a photograph. Two parts of one differ by at least 15 % of their side."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    arrays = [
        *load_sample_images().images,
        data.astronaut(),
        data.coffee(),
        data.chelsea(),
        data.rocket(),
        data.retina(),
    ]
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
        digest = hash_picture(image).pixels.tobytes()
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


# ------------------------------------------------------------------------------------------------------- measurements


def count_found(facts: list[dict[str, Any]], found: dict[int, set[int]]) -> dict[str, Any]:
    """Count, for each change, the rows that were matched with their original, and all other rows that were matched.

    Args:
        found: row -> rows that it was taken for a duplicate of.
    """
    table: dict[str, Any] = {}
    for change in {**DUPLICATES, **OTHERS}:
        rows = [number for number, fact in enumerate(facts) if fact["change"] == change]
        hits = [
            n
            for n in rows
            if any(
                one == facts[n]["original"] or facts[one].get("original") == facts[n]["original"]
                for one in found.get(n, ())
            )
        ]
        by_kind = Counter(facts[number]["kind"] for number in hits)
        table[change] = {"rows": len(rows), "found": len(hits), "found_by_kind": dict(by_kind)}
        table[change]["rows_by_kind"] = dict(Counter(facts[number]["kind"] for number in rows))
    planted = {number for number, fact in enumerate(facts) if fact["change"] in DUPLICATES}
    alarms = [number for number in found if number not in planted]
    return {
        "changes": table,
        "alarms": len(alarms),
        "alarms_by_kind": dict(Counter(facts[n]["kind"] for n in alarms)),
        "rows": len(facts),
    }


def measure_planted(folder: Path, facts: list[dict[str, Any]]) -> dict[str, Any]:
    """Measure duplicates and leaks with this project, from the files to the decision."""
    began = measure_cpu()
    source = open_source(
        "planted", SourceConfig(path=str(folder / "rows.json")), max_image_pixels=10**8, cache=folder / "index"
    )
    features = compute_features([source], folder / "index", workers=1)
    hashed = measure_cpu()
    groups = group_pictures(features, PictureMatch.perceptual)
    no_selection = np.zeros(len(features.rows), bool)
    result: dict[str, Any] = {"rows_per_cpu_second": {}}
    for kind in (DuplicateKind.rows, DuplicateKind.pictures):
        found = defaultdict(set)
        for one in find_duplicates(features, groups, kind, 0.8, no_selection):
            found[one.record].add(one.kept)
        result[kind.value] = count_found(facts, found)
    matched = measure_cpu()
    benchmarks = read_benchmarks(["mmstar"], folder / "benchmarks", folder / "index", max_pixels=10**8, workers=1)
    leaks = find_leaks([source], features, benchmarks, folder / "index", min_overlap=0.8, workers=1)
    searched = measure_cpu()
    rows = {number: fact for number, fact in enumerate(facts) if fact["change"].startswith("leak")}
    right = {leak.record for leak in leaks if leak.record in rows and rows[leak.record]["original"] == leak.place.row}
    kinds = Counter(fact["change"] for fact in rows.values())
    result["leaks"] = {
        "changes": {
            kind: {"rows": count, "found": sum(rows[n]["change"] == kind for n in right)}
            for kind, count in kinds.items()
        },
        "alarms": sum(leak.record not in rows for leak in leaks),
        "alarms_left_out": sum(leak.record not in rows and leak.certainty is not Certainty.possible for leak in leaks),
    }
    for name, seconds in (("hashing", hashed - began), ("matching", matched - hashed), ("leaks", searched - matched)):
        result["rows_per_cpu_second"][name] = len(facts) / seconds
    result["rows_per_cpu_second"]["duplicates in all"] = len(facts) / (matched - began)
    return result | {"peak_gib": measure_peak()}


def measure_imagededup(folder: Path, facts: list[dict[str, Any]]) -> dict[str, Any]:
    """Measure imagededup's PHash with its default threshold."""
    from imagededup.methods import PHash

    began = measure_cpu()
    hasher = PHash(verbose=False)
    encodings = hasher.encode_images(image_dir=str(folder / "images"), num_enc_workers=0)
    hashed = measure_cpu()
    duplicates = hasher.find_duplicates(encoding_map=encodings, max_distance_threshold=10, num_dist_workers=0)
    searched = measure_cpu()
    found = {}
    for name, others in duplicates.items():
        number = int(Path(name).stem)
        if earlier := {int(Path(one).stem) for one in others if int(Path(one).stem) < number}:
            found[number] = earlier
    same_turns = {
        number: {one for one in others if facts[one]["turns"] == facts[number]["turns"]}
        for number, others in found.items()
    }
    speed = {"hashing": len(facts) / (hashed - began), "duplicates in all": len(facts) / (searched - began)}
    return {
        "rows_per_cpu_second": speed,
        "pictures": count_found(facts, found),
        "rows": count_found(facts, {number: others for number, others in same_turns.items() if others}),
        "peak_gib": measure_peak(),
    }


def make_texts(count: int, seed: int = 3) -> tuple[list[str], dict[str, list[tuple[int, int]]]]:
    """Make texts, the last twentieth of them changed copies. Returns them and, for each change, (copy, original)."""
    rng = random.Random(seed)
    texts = [f"{make_sentence(rng, 22)} {rng.randint(1, 10**6)}" for _ in range(count - count // 20)]
    changes: dict[str, Callable[[str], str]] = {
        "spaces taken away": lambda text: text.replace(" ", "", 8),
        "one word of 22 changed": lambda text: text.replace(text.split()[7], "지하철", 1),
        "capitals and a full stop": lambda text: text.upper() + ".",
        "a number changed": lambda text: text.rpartition(" ")[0] + f" {rng.randint(10**6, 10**7)}",
    }
    pairs = defaultdict(list)
    for place, original in enumerate(rng.sample(range(len(texts)), count // 20)):
        name = list(changes)[place % len(changes)]
        pairs[name].append((len(texts), original))
        texts.append(changes[name](texts[original]))
    return texts, dict(pairs)


def count_texts(pairs: dict[str, list[tuple[int, int]]], found: set[tuple[int, int]]) -> dict[str, Any]:
    planted = {tuple(sorted(pair)) for one in pairs.values() for pair in one}
    changes = {
        name: {"rows": len(one), "found": sum(tuple(sorted(pair)) in found for pair in one)}
        for name, one in pairs.items()
    }
    return {"changes": changes, "alarms": len(found - planted)}


def measure_texts(count: int) -> dict[str, Any]:
    """Measure the search for near-equal texts of this project."""
    texts, pairs = make_texts(count)
    began = measure_cpu()
    signatures = compute_signatures([hash_shingles(iterate_shingles(text)) for text in texts])
    numbers = np.array([hash_numbers(text) for text in texts], np.uint64)
    found = match_texts(signatures, numbers, 0.8)
    seconds = measure_cpu() - began
    matches = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    return count_texts(pairs, matches) | {"rows_per_cpu_second": count / seconds, "peak_gib": measure_peak()}


def measure_datasketch(count: int) -> dict[str, Any]:
    """Measure datasketch with its defaults: MinHash of words, MinHashLSH at 0.8."""
    from datasketch import MinHash, MinHashLSH

    texts, pairs = make_texts(count)
    began = measure_cpu()
    index, matches = MinHashLSH(threshold=0.8, num_perm=128), set()
    for number, text in enumerate(texts):
        signature = MinHash(num_perm=128)
        signature.update_batch([word.encode() for word in set(text.split())])
        matches |= {(other, number) for other in index.query(signature)}
        index.insert(number, signature)
    seconds = measure_cpu() - began
    return count_texts(pairs, matches) | {"rows_per_cpu_second": count / seconds, "peak_gib": measure_peak()}


def measure_hashing(folder: Path, count: int) -> dict[str, Any]:
    """Measure pictures per CPU second of decoding alone, and of decoding and hashing, on JPEG files of 640 x 480."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(5)
    for number in range(count):
        draw_texture(rng, 640, 480).save(folder / f"{number}.jpg", quality=90)
    times: dict[str, list[float]] = {"decode": [], "decode and hash": []}
    for _ in range(3):
        for name in times:
            began = measure_cpu()
            for number in range(count):
                image = FileImage(f"{number}.jpg", folder, "", 10**8)
                loaded = image.load()
                if name != "decode":
                    image.content()
                    hash_picture(loaded)
            times[name].append(measure_cpu() - began)
    rates = {name: count / float(np.median(seconds)) for name, seconds in times.items()}
    return {"pictures": count, "pictures_per_cpu_second": rates, "ratio": rates["decode and hash"] / rates["decode"]}


def measure_matching(count: int) -> dict[str, Any]:
    """Measure the search among stored hashes of pictures, and signatures of texts, of which 1 in 100 has a near copy."""
    rng = np.random.default_rng(9)
    views = rng.integers(0, 1 << 63, (count, NUM_VIEWS), np.uint64)
    copies = np.arange(count // 100)
    views[-len(copies) :] = views[copies]
    for _ in range(6):
        views[-len(copies) :, 0] ^= np.uint64(1) << rng.integers(0, 63, len(copies)).astype(np.uint64)
    began = measure_cpu()
    pairs = match_pictures(views, rng.uniform(0, 255, count))
    pictures = measure_cpu() - began
    found = set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    recall = sum((one, count - len(copies) + one) in found for one in copies.tolist()) / len(copies)
    del views, pairs
    texts, planted = make_texts(count)
    began = measure_cpu()
    signatures = compute_signatures([hash_shingles(iterate_shingles(text)) for text in texts])
    signed = measure_cpu()
    numbers = np.array([hash_numbers(text) for text in texts], np.uint64)
    matches = match_texts(signatures, numbers, 0.8)
    matched = measure_cpu()
    text_pairs = set(zip(matches.first.tolist(), matches.second.tolist(), strict=True))
    assert signatures.shape == (count, NUM_PERMUTATIONS)
    return {
        "rows": count,
        "picture_seconds": pictures,
        "picture_recall": recall,
        "minhash_seconds": signed - began,
        "text_seconds": matched - signed,
        "texts": count_texts(planted, text_pairs),
        "peak_gib": measure_peak(),
    }


def run_child(name: str, *arguments: str, python: str = sys.executable) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    command = [python, "-W", "ignore", "-m", "benchmarks.curation", "--child", name, *arguments]
    print(f"{time.strftime('%H:%M:%S')} {name} {' '.join(arguments)}", flush=True)
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def run_measurement(name: str, arguments: list[str]) -> dict[str, Any]:
    if name in ("measure_texts", "measure_datasketch", "measure_matching"):
        return globals()[name](int(arguments[0]))
    if name == "measure_hashing":
        return measure_hashing(Path(arguments[0]), int(arguments[1]))
    folder = Path(arguments[0])
    return globals()[name](folder, json.loads((folder / "facts.json").read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--pictures", type=int, default=2_000, help="of 640 x 480 for the hashing rate")
    parser.add_argument("--libraries", help="python with imagededup and datasketch")
    parser.add_argument("--matching", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--parts", nargs="*", default=["planted", "texts", "hashing", "matching"])
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_measurement(options.child[0], options.child[1:])))
        return
    result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result["machine"] = {"python": platform.python_version(), "numpy": np.__version__, "pillow": Image.__version__}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "planted" in options.parts:
            facts = plant(folder / "planted", options.rows)
            (folder / "planted" / "facts.json").write_text(json.dumps(facts))
            result["planted"] = {"lit_vlm": run_child("measure_planted", str(folder / "planted"))}
            if options.libraries:
                found = run_child("measure_imagededup", str(folder / "planted"), python=options.libraries)
                result["planted"]["imagededup"] = found
        if "texts" in options.parts:
            result["texts"] = {"lit_vlm": run_child("measure_texts", str(options.rows))}
            if options.libraries:
                result["texts"]["datasketch"] = run_child(
                    "measure_datasketch", str(options.rows), python=options.libraries
                )
        if "hashing" in options.parts:
            result["hashing"] = run_child("measure_hashing", str(folder / "hashing"), str(options.pictures))
        if "matching" in options.parts:
            result["matching"] = [run_child("measure_matching", str(count)) for count in options.matching]
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
