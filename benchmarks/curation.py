"""Benchmark of task=curate: planted duplicates and leaks, beside imagededup and datasketch, and the speed of each part.

    python -m benchmarks.curation [--rows 20000] [--libraries PYTHON] [--matching 100000 1000000] [--parts planted texts hashing matching labels]

Planted: rows with built-in pictures (large ones), parts of photographs of scikit-image and scikit-learn, and generated textures
with shapes. 1 in 20 rows is a duplicate (JPEG quality 40, half and double size, a crop to 95 % of each side at any place), 1 in 40
is none (flipped, hue turned by a third, the same picture with other turns), 1 in 100 is a leak of a benchmark in its published
layout (a re-encoded or halved picture, or a question with other spacing inside another text). Labels: handwritten digits, 5, 10 or 20 %
of them with another label, three seeds, two small towers. `--libraries` is a Python with
imagededup and datasketch beside this project; both are used as their documentation shows. Times are CPU seconds of the process and
its children. The result goes to benchmarks/results/curation.json with versions.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

import numpy as np
from PIL import Image

from benchmarks.planted_rows import DUPLICATES, OTHERS, draw_texture, load_photos, make_sentence, plant
from lit_vlm.config.choices import Certainty, DuplicateKind, PictureMatch
from lit_vlm.config.schema import SourceConfig
from lit_vlm.curation.benchmark_features import read_benchmarks
from lit_vlm.curation.contamination import find_leaks
from lit_vlm.curation.duplicates import find_duplicates, group_pictures
from lit_vlm.curation.features import PictureHasher, compute_features
from lit_vlm.curation.matching import match_pictures, match_texts
from lit_vlm.curation.picture_hashes import NUM_VIEWS
from lit_vlm.curation.text_hashes import (
    NUM_PERMUTATIONS,
    compute_signatures,
    hash_numbers,
    hash_shingles,
    iterate_shingles,
)
from lit_vlm.data.lazy_images import FileImage
from lit_vlm.data.sources import open_source

LABEL_SHARES = (0.05, 0.1, 0.2)  # of the labels that are wrong
RESULT = Path(__file__).parent / "results" / "curation.json"


def measure_cpu() -> float:
    """Measure the CPU seconds of this process and its finished children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure_peak() -> float:
    """Measure the peak memory of this process, GiB. `ru_maxrss` would begin with that of the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


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
    groups = group_pictures([source], features, PictureMatch.perceptual, workers=1)
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
    """Measure pictures per CPU second of decoding alone, and of decoding and hashing, on JPEG files of 640 x 480 at quality 90.

    Drawn textures, and the photographs of scikit-learn and scikit-image, which take longer to decode.
    """
    folder.mkdir(parents=True)
    rng, names = np.random.default_rng(5), dict[str, list[str]]()
    names["textures"] = [f"{number}.jpg" for number in range(count)]
    for name in names["textures"]:
        draw_texture(rng, 640, 480).save(folder / name, quality=90)
    photos = [Image.fromarray(array).convert("RGB").resize((640, 480)) for array in load_photos()]
    names["photographs"] = [f"photo{number}.jpg" for number in range(count)]
    for number, name in enumerate(names["photographs"]):
        photos[number % len(photos)].save(
            folder / name, quality=90, comment=str(number)
        )  # equal bytes are decoded once
    result: dict[str, Any] = {"pictures": count}
    for kind, files in names.items():
        rates = {part: count / seconds for part, seconds in time_hashing(folder, files).items()}
        result[kind] = {"pictures_per_cpu_second": rates, "ratio": rates["decode and hash"] / rates["decode"]}
    return result


def time_hashing(folder: Path, names: list[str]) -> dict[str, float]:
    """Time decoding, and decoding with hashing: median CPU seconds of three rounds."""
    times: dict[str, list[float]] = {"decode": [], "decode and hash": []}
    for _ in range(3):
        for part in times:
            began, hasher = measure_cpu(), PictureHasher()
            for name in names:
                image = FileImage(name, folder, "", 10**8)
                if part == "decode":
                    image.load()
                else:
                    hasher.add(image)
            hasher.get_hashes()
            times[part].append(measure_cpu() - began)
    return {part: float(np.median(seconds)) for part, seconds in times.items()}


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


def measure_labels(folder: Path) -> dict[str, Any]:
    """Measure what is found of planted wrong labels, by share of them and tower: one result for each seed."""
    from benchmarks.planted_labels import check_planted, make_towers, plant_labels  # torch, and a larger process

    result: dict[str, Any] = {"cleanlab": version("cleanlab"), "scikit-learn": version("scikit-learn"), "towers": {}}
    for name, tower in make_towers(folder).items():
        result["towers"][name] = {}
        for share in LABEL_SHARES:
            runs = []
            for seed in range(3):
                place = folder / f"{tower.name}-{share}-{seed}"
                runs.append(check_planted(place, tower, plant_labels(place, share, seed), seed))
            result["towers"][name][f"{share:.0%}"] = runs
    return result


def run_child(name: str, *arguments: str, python: str = sys.executable) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    command = [python, "-W", "ignore", "-m", "benchmarks.curation", "--child", name, *arguments]
    print(f"{time.strftime('%H:%M:%S')} {name} {' '.join(arguments)}", flush=True)
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def run_measurement(name: str, arguments: list[str]) -> dict[str, Any]:
    if name in ("measure_texts", "measure_datasketch", "measure_matching"):
        return globals()[name](int(arguments[0]))
    if name == "measure_labels":
        return measure_labels(Path(arguments[0]))
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
    parser.add_argument("--parts", nargs="*", default=["planted", "texts", "hashing", "matching", "labels"])
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
            known = result.get("planted", {})  # imagededup's figures on the same rows stay if it is not measured anew
            result["planted"] = {**known, "lit_vlm": run_child("measure_planted", str(folder / "planted"))}
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
        if "labels" in options.parts:
            result["labels"] = run_child("measure_labels", str(folder / "labels"))
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
