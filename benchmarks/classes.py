"""Benchmark of one SFT step of each class (LLaVA, LLaVA-NeXT, OneVision): packed here, and padded in HF Trainer.

    python -m benchmarks.classes [--repeats 5] [--steps 2] [--batch 4]

Both contenders run transformers' class with the same weights on the same records, on a CPU with one thread, in float32: processing,
forward, backward, gradient clipping, AdamW. Losses, gradients and weights are compared first. The result goes to
benchmarks/results/classes.json, with samples per second of CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.compare.cases import HF_TUNED, OURS, Case
from benchmarks.compare.clock import compute_spread, measure_interleaved
from benchmarks.compare.contender import Ours, Placement, setup_process
from benchmarks.compare.gate import check_equal
from benchmarks.compare.peers import HFTrainer
from benchmarks.compare.sizes import TEMPLATE
from lit_vlm.anyres import ImageSettings, ModelClass, Tiling
from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.processor import Processor
from lit_vlm.distributed.trainer import disable_library_warnings
from lit_vlm.model.build import build_model
from lit_vlm.model.classes import get_transformers_class
from lit_vlm.model.export import export_model
from lit_vlm.model.hub import disable_transformers_logging
from lit_vlm.model.spec import ModelSpec, load_model_spec
from lit_vlm.model.tiny import make_language_model, make_vision_tower
from lit_vlm.runs.run_folder import get_package_versions
from lit_vlm.stages import SFTStage

RESULT = Path(__file__).parent / "results" / "classes.json"
# proportions of the 7B twin of benchmarks/compare/sizes.py; the layer behind the selected one is dropped
TEXT = {"hidden_size": 192, "intermediate_size": 1016, "num_hidden_layers": 6, "num_attention_heads": 6}
TOWER = {"hidden_size": 64, "intermediate_size": 240, "num_hidden_layers": 5, "num_attention_heads": 4}
TILE = {"image_size": 224, "patch_size": 14}


@dataclass(frozen=True, slots=True)
class FixedSize:
    """Image settings of a model that exists, in the place of a size from which it is made."""

    images: ImageSettings

    def make_image_settings(self, tiling: Tiling) -> ImageSettings:
        return self.images


@dataclass(frozen=True)
class ClassCase(Case):
    """Comparison case of one class of transformers."""

    spec: ModelSpec | None = None

    @property
    def model_size(self) -> Any:
        assert self.spec is not None
        return FixedSize(self.spec.images)

    @cached_property
    def processor(self) -> Processor:
        assert self.spec is not None
        return Processor(self.spec.tokenizer, self.spec.images)


@dataclass(frozen=True, slots=True)
class ClassPlacement(Placement):
    """Placement whose folder holds a model of any class."""

    model_class: ModelClass = ModelClass.llava_onevision

    def load_model(self, case: Case) -> Any:
        with disable_transformers_logging():
            return get_transformers_class(self.model_class).from_pretrained(self.folder, dtype=self.dtype)


def make_parts(folder: Path) -> dict[ModelClass, dict[str, Any]]:
    """Make towers and a language model. Returns the settings of each class."""
    make_language_model(
        folder / "language", **TEXT, num_key_value_heads=1, vocab_size=1752, max_position_embeddings=32768
    )
    make_vision_tower(folder / "siglip", **TOWER, **TILE)
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**TOWER, **TILE)).save_pretrained(folder / "clip")
    language = {"language_model": str(folder / "language"), "special_tokens": []}
    clip, siglip = ({**language, "vision_tower": str(folder / name)} for name in ("clip", "siglip"))
    return {
        ModelClass.llava: clip | {"model_class": ModelClass.llava},
        ModelClass.llava_next: clip | {"model_class": ModelClass.llava_next},
        ModelClass.llava_onevision: siglip | {"model_class": ModelClass.llava_onevision},
    }


def measure_class(model_class: ModelClass, settings: dict[str, Any], folder: Path, options: Any) -> dict[str, Any]:
    """Compare both contenders on the class's twin: equal results first, then CPU seconds."""
    spec = load_model_spec(ModelConfig(**settings))
    spec.tokenizer.chat_template = TEMPLATE
    export_model(build_model(spec), spec.tokenizer, spec.images, folder)
    spec = load_model_spec(ModelConfig(special_tokens=[]), init_from=str(folder))
    case = ClassCase(
        model_class.value, "twin7b", "anyres", SFTStage, Tiling.anyres, options.batch, options.steps, (OURS, HF_TUNED),
        spec=spec,
    )  # fmt: skip
    placement = ClassPlacement(folder, model_class=model_class)
    contenders = [Ours(case, placement), HFTrainer(case, placement, HF_TUNED, checkpointing=False)]
    gate = check_equal(contenders, case.batches)
    limits = {"repeats": options.repeats, "most": 2 * options.repeats, "budget": options.minutes * 60}
    times = measure_interleaved(contenders, case.batches, **limits)
    seconds = {name: [each.cpu for each in own] for name, own in times.items()}
    medians = {name: statistics.median(own) for name, own in seconds.items()}
    padded = contenders[1].count_tokens(contenders[1].prepare(case.batches[0]), case.batches[0])
    return {
        "gate": gate,
        "samples_per_second": {name: options.batch * options.steps / value for name, value in medians.items()},
        "ratio": medians[HF_TUNED] / medians[OURS],
        "spread": {name: compute_spread(own) for name, own in seconds.items()},
        "tokens_of_first_step": {"real": padded[0], "with_padding": padded[1]},
        "batch": options.batch,
        "steps": options.steps,
    }


def make_table(result: dict[str, Any]) -> str:
    """Make the table of docs/benchmarks.md."""
    lines = [
        "| class | packed, samples/s | padded in HF Trainer, samples/s | ratio | real tokens of a padded step |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["classes"].items():
        own, theirs = (row["samples_per_second"][key] for key in (OURS, HF_TUNED))
        tokens = row["tokens_of_first_step"]
        share = f"{tokens['real']:,} of {tokens['with_padding']:,}"
        lines.append(f"| `{name}` | {own:.2f} | {theirs:.2f} | {row['ratio']:.2f} | {share} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("repeats", 5), ("steps", 2), ("batch", 4), ("minutes", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    disable_library_warnings()
    setup_process()
    load, rows = os.getloadavg(), {}
    with tempfile.TemporaryDirectory() as name:
        for model_class, settings in make_parts(Path(name)).items():
            rows[model_class.value] = row = measure_class(
                model_class, settings, Path(name) / model_class.value, options
            )
            own, theirs = (row["samples_per_second"][key] for key in (OURS, HF_TUNED))
            print(
                f"{model_class.value}: packed {own:.2f}, padded {theirs:.2f} samples/s, ratio {row['ratio']:.2f}",
                flush=True,
            )
    result = {
        "classes": rows,
        "machine": {"load_before": load, "load_after": os.getloadavg(), "cores": os.cpu_count()},
        "date": datetime.now(UTC).date().isoformat(),
        "versions": get_package_versions(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
