"""Pictures per second and core: decode, tile and collate, beside transformers' image processors in TRL's collator.

    python -m benchmarks.loader [--images 4] [--repeats 7] [--steps 20]

All read the same JPEG files in one process on one thread, with LLaVA-OneVision's real settings (tiles of 384 pixels, a
grid up to 6x6, anyres_max_9) and a tiny vocabulary. First the outputs are held against each other; then the contenders
run in turn, and medians over the processor's time are printed. Ours hands over uint8 tiles that are normalised on the
device; in one row they are normalised here too. The last line is the share of a training step of the tiny model that is
spent waiting for data. The result goes to benchmarks/results/loader.json with versions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="disabled")
warnings.filterwarnings("ignore")

import torch

if not find_spec("torchvision") and (Path(sys.prefix) / "torchvision").is_dir():  # make test puts it there
    _library = torch.library.Library("torchvision", "DEF")  # operators that want CUDA's libraries; nothing calls them
    for _name in ("nms", "qnms"):
        _library.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.path.append(str(Path(sys.prefix) / "torchvision"))
TORCHVISION = find_spec("torchvision") is not None

import numpy as np
import PIL
from PIL import Image
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lit_vlm.anyres import ImageSettings, Tiling, grid_pinpoints
from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.collate import collate
from lit_vlm.data.images import FileImage
from lit_vlm.data.processor import Processor
from lit_vlm.engine.run_folder import versions
from lit_vlm.engine.trainer import quiet
from lit_vlm.model.build import Blueprint, draw_up
from lit_vlm.model.hub import plain_processor
from lit_vlm.model.tiny import tiny_parts
from lit_vlm.stages import SFTStage
from lit_vlm.types import Batch, ImageSlot, Kind, Language, Message, Role, Sample

SIZES = ((640, 480), (1024, 768), (2000, 1500))
HALF = (0.5, 0.5, 0.5)
REAL = {"tile_size": 384, "patch_size": 14, "grid_pinpoints": grid_pinpoints(384, 6), "max_tiles": 9}
PIL_NAME, FAST_NAME = "TRL + transformers (Pillow)", "TRL + transformers (torchvision)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4, help="pictures of a micro-batch")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(Path(folder), arguments.images, arguments.repeats)
        result["data_wait_share"] = {
            f"{workers} workers": data_wait(Path(folder), workers, arguments.steps) for workers in (0, 1)
        }
    result["versions"] = versions() | {"pillow": PIL.__version__, "numpy": np.__version__}
    if TORCHVISION:
        result["versions"]["torchvision"] = __import__("torchvision").__version__
    out = Path(__file__).parent / "results" / "loader.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    show(result)


def compare(folder: Path, images: int, repeats: int) -> dict:
    """Sizes and ways of tiling -> contenders -> pictures per second; and how far their outputs lie apart.

    Raises:
        SystemExit: the tiles or tokens of transformers' Pillow processor are others than ours.
    """
    tower, language = tiny_parts(folder / "parts")
    tokenizer = draw_up(ModelConfig(vision_tower=tower, language_model=language)).tokenizer
    rates: dict[str, dict[str, list[float]]] = {}
    differences: dict[str, dict[str, float]] = {}
    for width, height in SIZES:
        paths = photographs(folder / f"{width}", width, height, images)
        for way, per_sample in {"anyres": 1, "one view each": 2, "base tiling": 1}.items():
            tiling = Tiling.base if way == "base tiling" else Tiling.anyres
            processor = Processor(tokenizer, ImageSettings(**REAL, mean=HALF, std=HALF, tiling=tiling))
            samples = samples_of(paths, per_sample)
            runs = contenders(processor, samples, stock=way != "base tiling")  # transformers has no such way
            name = f"{width}x{height} {way}"
            differences[name] = {other: apart(runs["lit_vlm"](), runs[other]()) for other in runs if "TRL" in other}
            if differences[name].get(PIL_NAME, 0.0) > 1e-5:
                raise SystemExit(f"{name}: transformers' tiles differ: {differences[name]}. No rate is printed.")
            rates[name] = interleaved(runs, len(paths), repeats)
    return {"images": images, "largest_tile_difference": differences, "images_per_second": rates}


def photographs(folder: Path, width: int, height: int, count: int) -> list[Path]:
    """JPEG files with a camera's noise, so that decoding costs what it costs in life."""
    from skimage import data

    folder.mkdir()
    sources = [Image.fromarray(picture) for picture in (data.astronaut(), data.coffee(), data.chelsea(), data.rocket())]
    for number in range(count):
        picture = np.asarray(sources[number % 4].resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noise = np.random.default_rng(number).normal(0, 4, picture.shape)
        noisy = Image.fromarray((picture + noise).clip(0, 255).astype(np.uint8))
        noisy.save(folder / f"{number}.jpg", quality=90)
    return [folder / f"{number}.jpg" for number in range(count)]


def samples_of(paths: list[Path], per_sample: int) -> list[Sample]:
    samples = []
    for start in range(0, len(paths), per_sample):
        chosen = paths[start : start + per_sample]
        images = tuple(FileImage(path.name, path.parent, f"line {start}", 64_000_000) for path in chosen)
        question = Message(Role.user, (*(ImageSlot(number) for number in range(len(images))), "무엇이 보이나요?"))
        answer = Message(Role.assistant, ("사진입니다.",))
        samples.append(
            Sample(str(start), "mine", f"line {start}", Kind.caption, Language.ko, (question, answer), images)
        )
    return samples


def contenders(processor: Processor, samples: list[Sample], stock: bool) -> dict[str, Callable[[], Batch | Mapping]]:
    def ours() -> Batch:
        return collate(processor, fresh(samples))

    def normalised() -> Mapping:
        tiles = ours().tiles
        return {"pixel_values": tiles.float().div_(255).sub_(0.5).div_(0.5)}

    scaled = Processor(processor.tokenizer, processor.images, scaled_decode=True)
    runs: dict[str, Callable[[], Batch | Mapping]] = {
        "lit_vlm": ours,
        "lit_vlm, normalised here": normalised,
        "lit_vlm, data.scaled_decode": lambda: collate(scaled, fresh(samples)),
    }
    if stock:
        runs[PIL_NAME] = trls(processor, samples, fast=False)
    if stock and TORCHVISION:
        runs[FAST_NAME] = trls(processor, samples, fast=True)
    return runs


def fresh(samples: list[Sample]) -> list[Sample]:
    """As a source makes them anew for each micro-batch: no header has been read yet."""
    return [replace(sample, images=tuple(replace(image) for image in sample.images)) for sample in samples]


def trls(processor: Processor, samples: list[Sample], fast: bool) -> Callable[[], Mapping]:
    """TRL's collator over rows whose pictures are decoded when they are asked for, as `datasets` does."""
    from transformers import LlavaOnevisionImageProcessor
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    tokenizer: PreTrainedTokenizerFast = processor.tokenizer
    plain = plain_processor(tokenizer, processor.images)
    if fast:
        options = {
            name: getattr(plain.image_processor, name) for name in ("image_grid_pinpoints", "image_mean", "image_std")
        }
        plain.image_processor = LlavaOnevisionImageProcessor(size={"height": 384, "width": 384}, **options)
    collator = DataCollatorForVisionLanguageModeling(plain)

    def run() -> Mapping:
        rows = [
            {
                "messages": [
                    {"role": "user", "content": [*({"type": "image"} for _ in sample.images), text(sample, 0)]},
                    {"role": "assistant", "content": [text(sample, 1)]},
                ],
                "images": [Image.open(image.root / image.path) for image in sample.images],  # type: ignore[attr-defined]
            }
            for sample in samples
        ]
        return collator(rows)

    return run


def text(sample: Sample, number: int) -> dict[str, str]:
    return {"type": "text", "text": sample.messages[number].text}


def apart(ours: Batch | Mapping, theirs: Batch | Mapping) -> float:
    """The largest difference of normalised pixels. SystemExit when tokens or numbers of tiles differ."""
    assert isinstance(ours, Batch)
    ids = theirs["input_ids"][theirs["attention_mask"].bool()]
    if not torch.equal(ids, ours.input_ids):
        raise SystemExit("The tokens differ. No rate is printed.")
    pixels, start, largest = theirs["pixel_values"], 0, 0.0
    for number, layout in enumerate(ours.layouts):
        stack = (ours.tiles[start : start + layout.num_tiles].float() / 255 - 0.5) / 0.5
        largest = max(largest, float((stack - pixels[number][: layout.num_tiles].float()).abs().max()))
        start += layout.num_tiles
    return largest


def interleaved(runs: dict[str, Callable], num_images: int, repeats: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs) if repeat % 2 == 0 else list(runs)[::-1]:
            began = time.process_time()  # of the core, whatever else the machine does
            runs[name]()
            rates[name].append(num_images / (time.process_time() - began))
    return {name: sorted(values) for name, values in rates.items()}


def training_step(blueprint: Blueprint) -> Callable[[Batch], None]:
    stage = SFTStage(blueprint)
    stage.configure_model()
    optimizer = torch.optim.AdamW(stage.model.parameters(), lr=1e-3, fused=True)

    def step(batch: Batch) -> None:
        batch.step_supervised_tokens = batch.num_supervised_tokens
        stage.step_loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class MicroBatches:
    """The same pictures again and again, as records of a source."""

    def __init__(self, processor: Processor, samples: list[Sample], count: int) -> None:
        self.processor, self.samples, self.count = processor, samples, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Batch:
        if number >= self.count:
            raise IndexError(number)
        return collate(self.processor, fresh(self.samples))


def data_wait(folder: Path, workers: int, steps: int) -> float:
    """Share of the time of the tiny model's training steps in which it waits for a micro-batch of 32 photographs."""
    tower, language = tiny_parts(folder / "parts")
    blueprint = draw_up(ModelConfig(vision_tower=tower, language_model=language, grid=2, max_tiles=4))
    paths = sorted((folder / "640").glob("*.jpg"))
    samples = samples_of(paths * (32 // len(paths)), 1)
    processor = Processor(blueprint.tokenizer, blueprint.images)
    step = training_step(blueprint)
    loader = DataLoader(MicroBatches(processor, samples, steps + 2), batch_size=None, num_workers=workers)
    waited, total, batches = 0.0, 0.0, iter(loader)
    for number in range(steps + 2):
        began = time.perf_counter()
        batch = next(batches)
        ready = time.perf_counter()
        step(batch)
        if number >= 2:  # the first start the workers
            waited, total = waited + ready - began, total + time.perf_counter() - began
    return waited / total


def show(result: dict) -> None:
    for name, rates in result["images_per_second"].items():
        medians = {contender: statistics.median(values) for contender, values in rates.items()}
        print(name)
        for contender, median in medians.items():
            ratio = medians["lit_vlm"] / median
            far = result["largest_tile_difference"][name].get(contender)
            note = "" if far is None else f"   largest difference of a normalised pixel {far:.1e}"
            print(f"  {contender:34} {median:7.1f} images/s/core   lit_vlm / this = {ratio:.2f}{note}")
    print("waiting for data:", ", ".join(f"{k} {v:.0%}" for k, v in result["data_wait_share"].items()))


if __name__ == "__main__":
    main()
