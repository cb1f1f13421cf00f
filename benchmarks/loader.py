"""Benchmark of the data loader: images per second per core to decode, tile and collate, against TRL's collator.

    python -m benchmarks.loader [--images 4] [--repeats 7] [--steps 20]

TRL's collator uses the image processors of transformers. All contenders read the same JPEG files in one process on one
thread, with the real settings of LLaVA-OneVision (tiles of 384 pixels, a grid up to 6x6, anyres_max_9) and a tiny vocabulary.
First the outputs are compared. Then the contenders run in turn, and medians over CPU time are printed. Ours returns uint8
tiles that are normalised on the device; in one row they are normalised here too. The last line is the share of training time
of the tiny model that is spent waiting for data. The result goes to benchmarks/results/loader.json with versions.
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

if not find_spec("torchvision") and (Path(sys.prefix) / "torchvision").is_dir():  # installed there by make test
    # operators that need CUDA libraries; they are never called
    _library = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _library.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.path.append(str(Path(sys.prefix) / "torchvision"))
TORCHVISION = find_spec("torchvision") is not None

import numpy as np
import PIL
from PIL import Image
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lit_vlm.anyres import ImageSettings, Tiling, make_grid_pinpoints
from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.collate import collate
from lit_vlm.data.lazy_images import FileImage
from lit_vlm.data.processor import Processor
from lit_vlm.distributed.trainer import disable_library_warnings
from lit_vlm.model.plain_processor import make_plain_processor
from lit_vlm.model.spec import ModelSpec, load_model_spec
from lit_vlm.model.tiny import make_tiny_parts
from lit_vlm.runs.run_folder import get_package_versions
from lit_vlm.stages import SFTStage
from lit_vlm.types import Batch, ImagePlaceholder, Language, Message, Role, Sample, SampleKind

SIZES = ((640, 480), (1024, 768), (2000, 1500))
PIXEL_MEAN = (0.5, 0.5, 0.5)
ONEVISION_SETTINGS = {"tile_size": 384, "patch_size": 14, "grid_pinpoints": make_grid_pinpoints(384, 6), "max_tiles": 9}
PIL_NAME, FAST_NAME = "TRL + transformers (Pillow)", "TRL + transformers (torchvision)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4, help="pictures of a micro-batch")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    disable_library_warnings()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(Path(folder), arguments.images, arguments.repeats)
        result["data_wait_share"] = {
            f"{workers} workers": measure_data_wait(Path(folder), workers, arguments.steps) for workers in (0, 1)
        }
    result["versions"] = get_package_versions() | {"pillow": PIL.__version__, "numpy": np.__version__}
    if TORCHVISION:
        result["versions"]["torchvision"] = __import__("torchvision").__version__
    path = Path(__file__).parent / "results" / "loader.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print_result(result)


def compare(folder: Path, images: int, repeats: int) -> dict:
    """Compare the contenders for each image size and tiling.

    Returns:
        Images per second by size, tiling and contender, and the largest difference of their tiles.

    Raises:
        SystemExit: tiles or tokens of the Pillow processor of transformers differ from ours.
    """
    tower, language = make_tiny_parts(folder / "parts")
    tokenizer = load_model_spec(ModelConfig(vision_tower=tower, language_model=language)).tokenizer
    rates: dict[str, dict[str, list[float]]] = {}
    differences: dict[str, dict[str, float]] = {}
    for width, height in SIZES:
        paths = make_photographs(folder / f"{width}", width, height, images)
        for tiling_name, per_sample in {"anyres": 1, "one view each": 2, "base tiling": 1}.items():
            tiling = Tiling.base if tiling_name == "base tiling" else Tiling.anyres
            processor = Processor(
                tokenizer, ImageSettings(**ONEVISION_SETTINGS, mean=PIXEL_MEAN, std=PIXEL_MEAN, tiling=tiling)
            )
            samples = make_samples(paths, per_sample)
            # transformers has no base tiling
            runs = make_contenders(processor, samples, stock=tiling_name != "base tiling")
            name = f"{width}x{height} {tiling_name}"
            differences[name] = {
                contender: compare_outputs(runs["lit_vlm"](), runs[contender]())
                for contender in runs
                if "TRL" in contender
            }
            if differences[name].get(PIL_NAME, 0.0) > 1e-5:
                raise SystemExit(f"{name}: transformers' tiles differ: {differences[name]}. No rate is printed.")
            rates[name] = measure_interleaved(runs, len(paths), repeats)
    return {"images": images, "largest_tile_difference": differences, "images_per_second": rates}


def make_photographs(folder: Path, width: int, height: int, count: int) -> list[Path]:
    """Write JPEG files with camera noise, so that decoding costs as much as for real photographs."""
    from skimage import data

    folder.mkdir()
    sources = [Image.fromarray(picture) for picture in (data.astronaut(), data.coffee(), data.chelsea(), data.rocket())]
    for i in range(count):
        picture = np.asarray(sources[i % 4].resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noise = np.random.default_rng(i).normal(0, 4, picture.shape)
        noisy = Image.fromarray((picture + noise).clip(0, 255).astype(np.uint8))
        noisy.save(folder / f"{i}.jpg", quality=90)
    return [folder / f"{i}.jpg" for i in range(count)]


def make_samples(paths: list[Path], per_sample: int) -> list[Sample]:
    """Make caption samples over image files."""
    samples = []
    for start in range(0, len(paths), per_sample):
        chosen = paths[start : start + per_sample]
        images = tuple(FileImage(path.name, path.parent, f"line {start}", 64_000_000) for path in chosen)
        question = Message(
            Role.user, (*(ImagePlaceholder(number) for number in range(len(images))), "무엇이 보이나요?")
        )
        answer = Message(Role.assistant, ("사진입니다.",))
        samples.append(
            Sample(str(start), "mine", f"line {start}", SampleKind.caption, Language.ko, (question, answer), images)
        )
    return samples


def make_contenders(
    processor: Processor, samples: list[Sample], stock: bool
) -> dict[str, Callable[[], Batch | Mapping]]:
    """Make the contenders, by name, for one set of samples."""

    def run_ours() -> Batch:
        return collate(processor, copy_samples(samples))

    def run_ours_normalised() -> Mapping:
        tiles = run_ours().tiles
        return {"pixel_values": tiles.float().div_(255).sub_(0.5).div_(0.5)}

    scaled = Processor(processor.tokenizer, processor.images, scaled_decode=True)
    runs: dict[str, Callable[[], Batch | Mapping]] = {
        "lit_vlm": run_ours,
        "lit_vlm, normalised here": run_ours_normalised,
        "lit_vlm, data.scaled_decode": lambda: collate(scaled, copy_samples(samples)),
    }
    if stock:
        runs[PIL_NAME] = make_trl_collator(processor, samples, fast=False)
    if stock and TORCHVISION:
        runs[FAST_NAME] = make_trl_collator(processor, samples, fast=True)
    return runs


def copy_samples(samples: list[Sample]) -> list[Sample]:
    """Copy the samples as a source creates them for each micro-batch: without image headers read yet."""
    return [replace(sample, images=tuple(replace(image) for image in sample.images)) for sample in samples]


def make_trl_collator(processor: Processor, samples: list[Sample], fast: bool) -> Callable[[], Mapping]:
    """Make a call of TRL's collator over rows whose images are decoded lazily, as `datasets` does."""
    from transformers import LlavaOnevisionImageProcessor
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    tokenizer: PreTrainedTokenizerFast = processor.tokenizer
    plain = make_plain_processor(tokenizer, processor.images)
    if fast:
        options = {
            name: getattr(plain.image_processor, name) for name in ("image_grid_pinpoints", "image_mean", "image_std")
        }
        plain.image_processor = LlavaOnevisionImageProcessor(size={"height": 384, "width": 384}, **options)
    collator = DataCollatorForVisionLanguageModeling(plain)

    def run_trl() -> Mapping:
        rows = [
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [*({"type": "image"} for _ in sample.images), make_text_part(sample, 0)],
                    },
                    {"role": "assistant", "content": [make_text_part(sample, 1)]},
                ],
                "images": [Image.open(image.root / image.path) for image in sample.images],  # type: ignore[attr-defined]
            }
            for sample in samples
        ]
        return collator(rows)

    return run_trl


def make_text_part(sample: Sample, number: int) -> dict[str, str]:
    return {"type": "text", "text": sample.messages[number].text}


def compare_outputs(ours: Batch | Mapping, theirs: Batch | Mapping) -> float:
    """Return the largest difference of normalised pixels. Raise SystemExit if the tokens differ."""
    assert isinstance(ours, Batch)
    ids = theirs["input_ids"][theirs["attention_mask"].bool()]
    if not torch.equal(ids, ours.input_ids):
        raise SystemExit("The tokens differ. No rate is printed.")
    pixels, start, largest = theirs["pixel_values"], 0, 0.0
    for i, layout in enumerate(ours.layouts):
        stack = (ours.tiles[start : start + layout.num_tiles].float() / 255 - 0.5) / 0.5
        largest = max(largest, float((stack - pixels[i][: layout.num_tiles].float()).abs().max()))
        start += layout.num_tiles
    return largest


def measure_interleaved(runs: dict[str, Callable], num_images: int, repeats: int) -> dict[str, list[float]]:
    """Measure images per CPU second of all contenders in turn."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs) if repeat % 2 == 0 else list(runs)[::-1]:
            start = time.process_time()  # CPU time, independent of other load
            runs[name]()
            rates[name].append(num_images / (time.process_time() - start))
    return {name: sorted(values) for name, values in rates.items()}


def make_training_step(blueprint: ModelSpec) -> Callable[[Batch], None]:
    """Make the training step of the tiny sft stage."""
    stage = SFTStage(blueprint)
    stage.configure_model()
    optimizer = torch.optim.AdamW(stage.model.parameters(), lr=1e-3, fused=True)

    def step(batch: Batch) -> None:
        batch.step_supervised_tokens = batch.num_supervised_tokens
        stage.compute_loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class MicroBatches:
    """Dataset that collates the same samples for each micro-batch."""

    def __init__(self, processor: Processor, samples: list[Sample], count: int) -> None:
        self.processor, self.samples, self.count = processor, samples, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Batch:
        if number >= self.count:
            raise IndexError(number)
        return collate(self.processor, copy_samples(self.samples))


def measure_data_wait(folder: Path, workers: int, steps: int) -> float:
    """Measure the share of training time that the tiny model waits for a micro-batch of 32 photographs."""
    tower, language = make_tiny_parts(folder / "parts")
    blueprint = load_model_spec(ModelConfig(vision_tower=tower, language_model=language, grid=2, max_tiles=4))
    paths = sorted((folder / "640").glob("*.jpg"))
    samples = make_samples(paths * (32 // len(paths)), 1)
    processor = Processor(blueprint.tokenizer, blueprint.images)
    step = make_training_step(blueprint)
    loader = DataLoader(MicroBatches(processor, samples, steps + 2), batch_size=None, num_workers=workers)
    wait_seconds, total_seconds, batches = 0.0, 0.0, iter(loader)
    for i in range(steps + 2):
        start = time.perf_counter()
        batch = next(batches)
        batch_time = time.perf_counter()
        step(batch)
        if i >= 2:  # the first two batches start the workers
            wait_seconds, total_seconds = wait_seconds + batch_time - start, total_seconds + time.perf_counter() - start
    return wait_seconds / total_seconds


def print_result(result: dict) -> None:
    for name, rates in result["images_per_second"].items():
        medians = {contender: statistics.median(values) for contender, values in rates.items()}
        print(name)
        for contender, median in medians.items():
            ratio = medians["lit_vlm"] / median
            difference = result["largest_tile_difference"][name].get(contender)
            note = "" if difference is None else f"   largest difference of a normalised pixel {difference:.1e}"
            print(f"  {contender:34} {median:7.1f} images/s/core   lit_vlm / this = {ratio:.2f}{note}")
    print("waiting for data:", ", ".join(f"{k} {v:.0%}" for k, v in result["data_wait_share"].items()))


if __name__ == "__main__":
    main()
