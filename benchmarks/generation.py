"""Benchmark of generation: answers per CPU second of continuous batching, against transformers; and of the server.

    python -m benchmarks.generation FOLDER [--items 200] [--repeats 3] [--served]

FOLDER is an exported model, such as runs/tiny/4_dpo/hf. The items are built-in held-out samples of all kinds, easy and hard,
in both languages. Contenders, on one thread in float32: `model.generate` of plain transformers for one item after another and
for padded batches of 16, and `ContinuousBatcher`. Each gets the same encoded prompts, so tokenising and resizing are not
measured; the vision tower is. First the token ids are compared; an item whose two best logits are within 1e-4 of each other
where the answers part may differ. Then medians of CPU seconds over interleaved repeats.

`--served` asks this project's server and `transformers serve`, each as a process of its own, with ten clients at once. The
latter needs torchvision, which `make test` puts beside the environment. The result goes to
benchmarks/results/generation.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="disabled")
warnings.filterwarnings("ignore")

import torch
from transformers import AutoModelForImageTextToText

from benchmarks.served import measure_servers
from lit_vlm.anyres import Tiling
from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.data.synthetic import BuiltinSource
from lit_vlm.distributed.trainer import disable_library_warnings
from lit_vlm.evaluation.generation import get_end_of_answer_id
from lit_vlm.model.build import build_model
from lit_vlm.model.continuous_batching import ContinuousBatcher, DecodingParams
from lit_vlm.model.generate import find_prompt_positions
from lit_vlm.model.plain_processor import PlainProcessor
from lit_vlm.model.spec import load_model_spec
from lit_vlm.runs.run_folder import get_package_versions
from lit_vlm.types import Batch, ImagePlaceholder, Language, Sample

RESULT = Path(__file__).parent / "results/generation.json"
KINDS = (
    ("caption", False),
    ("word", False),
    ("number", False),
    ("grounding", False),
    ("text", False),
    ("multi_image", False),
    ("ocr", True),
    ("grounding", True),
    ("document", True),
    ("table", True),
)
MAX_NEW_TOKENS = 64
TIE = 1e-4
PADDED_BATCH = 16
GROUP = 32  # prompts of one flat batch, whose images are encoded together


@dataclass(frozen=True)
class Item:
    """One question: as a batch of this project and as inputs of plain transformers."""

    sample: Sample
    batch: Batch
    inputs: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--served", action="store_true")
    arguments = parser.parse_args()
    disable_library_warnings()
    torch.set_num_threads(1)
    folder = str(arguments.folder)
    settings = ModelConfig(special_tokens=[], grid=None, max_tiles=None)
    spec = load_model_spec(settings, folder, Tiling.anyres)  # as plain transformers cuts images, whatever the run did
    processor = Processor(spec.tokenizer, spec.images)
    stop_id = get_end_of_answer_id(processor)
    ours = build_model(spec, torch.float32, 0).eval()
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    items = make_items(arguments.items, processor, PlainProcessor.from_pretrained(folder))
    groups = [
        collate(processor, [item.sample for item in items[start : start + GROUP]])
        for start in range(0, len(items), GROUP)
    ]
    contenders: dict[str, Callable[[], list[list[int]]]] = {
        "transformers, one by one": lambda: generate_one_by_one(plain, items, stop_id),
        f"transformers, padded batches of {PADDED_BATCH}": lambda: generate_padded(plain, items, stop_id),
        "continuous batching": lambda: generate_continuously(ours, groups, stop_id),
    }
    answers = {name: run() for name, run in contenders.items()}
    differing = compare_answers(plain, items, answers, stop_id)
    seconds = measure_cpu_seconds(contenders, arguments.repeats)
    result: dict[str, Any] = {
        "items": len(items),
        "tokens": sum(map(len, answers["continuous batching"])),
        "differing": differing,
        "answers_per_cpu_second": {name: len(items) / value for name, value in seconds.items()},
        "versions": get_package_versions(),
    }
    if arguments.served:
        result["served"] = measure_servers(folder, [item.sample for item in items], MAX_NEW_TOKENS)
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1, ensure_ascii=False))


def make_items(count: int, processor: Processor, plain: PlainProcessor) -> list[Item]:
    """Make the questions, of all kinds and both languages in turn."""
    sources = [
        BuiltinSource(kind, kind, language=language, hard=hard, held_out=True, num_samples=count)
        for kind, hard in KINDS
        for language in (Language.ko, Language.en)
    ]
    samples = [sources[number % len(sources)][number // len(sources)] for number in range(count)]
    return [Item(sample, collate(processor, [sample]), encode_plainly(sample, plain)) for sample in samples]


def encode_plainly(sample: Sample, plain: PlainProcessor) -> dict[str, Any]:
    """Encode the question with transformers' processor."""
    parts = [
        {"type": "image"}
        if isinstance(piece, ImagePlaceholder)
        else {"type": "text", "text": getattr(piece, "token", piece)}
        for piece in sample.messages[0].content
    ]
    text = plain.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False)
    images = [image.load() for image in sample.images]
    return dict(plain(text=text, images=[images] if images else None, return_tensors="pt"))


def generate_one_by_one(model: Any, items: Sequence[Item], stop_id: int) -> list[list[int]]:
    return [
        crop(output, stop_id) for item in items for output in generate_plainly(model, item.inputs, stop_id).tolist()
    ]


def generate_padded(model: Any, items: Sequence[Item], stop_id: int) -> list[list[int]]:
    """Generate in batches of neighbours in prompt length, padded on the left."""
    order = sorted(range(len(items)), key=lambda number: items[number].inputs["input_ids"].shape[1])
    answers: list[list[int]] = [[] for _ in items]
    for start in range(0, len(order), PADDED_BATCH):
        numbers = order[start : start + PADDED_BATCH]
        inputs = pad_left([items[number].inputs for number in numbers], stop_id)
        for number, output in zip(numbers, generate_plainly(model, inputs, stop_id).tolist(), strict=True):
            answers[number] = crop(output, stop_id)
    return answers


def pad_left(inputs: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """Pad token ids on the left, and tiles at the end, as transformers' processor does for a batch."""
    longest = max(one["input_ids"].shape[1] for one in inputs)
    ids = torch.full((len(inputs), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(inputs):
        length = one["input_ids"].shape[1]
        ids[row, longest - length :] = one["input_ids"][0]
        mask[row, longest - length :] = 1
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    pictured = [one for one in inputs if "pixel_values" in one]
    if pictured:
        tiles = [picture for one in pictured for picture in one["pixel_values"]]
        most = max(picture.shape[0] for picture in tiles)
        batch["pixel_values"] = torch.stack(
            [torch.cat([each, each.new_zeros(most - each.shape[0], *each.shape[1:])]) for each in tiles]
        )
        batch["image_sizes"] = torch.cat([one["image_sizes"] for one in pictured])
        batch["batch_num_images"] = torch.cat([one["batch_num_images"] for one in pictured])
    return batch


@torch.inference_mode()
def generate_plainly(model: Any, inputs: dict[str, Any], stop_id: int) -> torch.Tensor:
    settings = {
        "max_new_tokens": MAX_NEW_TOKENS,
        "do_sample": False,
        "eos_token_id": stop_id,
        "pad_token_id": stop_id,
    }
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]


def generate_continuously(model: Any, groups: Sequence[Batch], stop_id: int) -> list[list[int]]:
    batcher = ContinuousBatcher(model, {stop_id})
    sequences = [
        sequence
        for batch in groups
        for sequence in batcher.add(batch, [DecodingParams(MAX_NEW_TOKENS)] * len(find_prompt_positions(batch)))
    ]
    batcher.run()
    return [sequence.ids for sequence in sequences]


def crop(ids: list[int], stop_id: int) -> list[int]:
    """Crop token ids after the first stop token."""
    return ids[: ids.index(stop_id) + 1] if stop_id in ids else ids


def compare_answers(
    plain: Any, items: Sequence[Item], answers: dict[str, list[list[int]]], stop_id: int
) -> dict[str, dict[str, list[int]]]:
    """Compare the answers of each contender with those of the first; list the items that differ, with and without a tie.

    Raises:
        SystemExit: more than one item of forty differs without a tie.
    """
    reference, *others = answers.values()
    found: dict[str, dict[str, list[int]]] = {}
    for name, ours in zip(list(answers)[1:], others, strict=True):
        numbers = [number for number, pair in enumerate(zip(reference, ours, strict=True)) if pair[0] != pair[1]]
        ties = [number for number in numbers if is_tie(plain, items[number], reference[number], ours[number], stop_id)]
        found[name] = {"ties": ties, "different": [number for number in numbers if number not in ties]}
        if 40 * len(found[name]["different"]) > len(items):
            raise SystemExit(f"{name}: other answers than transformers to the items {found[name]['different']}")
    return found


@torch.inference_mode()
def is_tie(plain: Any, item: Item, theirs: list[int], ours: list[int], stop_id: int) -> bool:
    """Return True if the two best logits are nearly equal where the two answers part."""
    place = next(number for number, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1])
    settings = {"max_new_tokens": place + 1, "do_sample": False, "eos_token_id": stop_id, "pad_token_id": stop_id}
    output = plain.generate(**item.inputs, **settings, return_dict_in_generate=True, output_logits=True)
    first, second = output.logits[place][0].topk(2).values.tolist()
    return first - second < TIE


def measure_cpu_seconds(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Measure the median CPU seconds of each contender; the contenders run in turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
