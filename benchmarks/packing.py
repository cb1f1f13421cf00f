"""Exactness of packing: difference of loss and gradients between packed steps and the same samples one by one.

    python -m benchmarks.packing [--steps 20]

It uses the tiny model in float32 on a mixture of text-only samples, samples with one image in one to five tiles (anyres),
and samples with several images.
The result goes to benchmarks/results/packing.json with versions.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="disabled")
warnings.filterwarnings("ignore")

import torch

from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.collate import collate
from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.processor import Processor
from lit_vlm.data.synthetic import BuiltinSource
from lit_vlm.distributed.trainer import disable_library_warnings
from lit_vlm.model.spec import load_model_spec
from lit_vlm.model.tiny import make_tiny_parts
from lit_vlm.runs.run_folder import get_package_versions
from lit_vlm.stages import SFTStage
from lit_vlm.types import Language, Record

KINDS = ("text", "caption", "multi_image", "ocr", "document", "chart")
BATCH, RANKS = 32, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    disable_library_warnings()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(Path(folder), arguments.steps)
    path = Path(__file__).parent / "results" / "packing.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['steps']} optimizer steps of {BATCH} samples in {result['packs_per_step']} packs: {result['held']}")
    print(f"largest relative difference of the loss: {result['largest_loss_difference']:.1e}")
    print(f"smallest cosine of the gradients:        {result['smallest_cosine']:.8f}")


def compare(folder: Path, steps: int) -> dict:
    """Compare loss and gradients of packed steps with those of single samples."""
    tower, language = make_tiny_parts(folder / "parts")
    blueprint = load_model_spec(ModelConfig(vision_tower=tower, language_model=language, grid=2, max_tiles=4))
    processor = Processor(blueprint.tokenizer, blueprint.images)
    stage = SFTStage(blueprint)
    stage.configure_model()
    sources = [
        BuiltinSource(f"{kind}_{lang}", kind, language=lang, num_samples=200, hard=kind not in ("text", "caption"))
        for kind in KINDS
        for lang in (Language.ko, Language.en)
    ]
    data = DataModule(processor, sources, 0.0, global_batch_size=BATCH, max_steps=steps, tokens_per_micro_batch=1024)
    plan = data.make_plan(RANKS)
    differences, cosines, counts = [], [], {"text only": 0, "tiled": 0, "several pictures": 0}
    for i in range(steps):
        step = plan.get_step(i)
        packs = [[plan.index.get_record(sample) for sample in pack] for pack in step.packs]
        records = [record for pack in packs for record in pack]
        counts["text only"] += sum(not record.images for record in records)
        counts["several pictures"] += sum(len(record.images) > 1 for record in records)
        counts["tiled"] += sum(
            len(record.images) == 1 and processor.compute_cost(record).num_tiles > 1 for record in records
        )
        loss, gradients = _compute_gradients(stage, processor, packs, step.num_supervised)
        single_loss, single_gradients = _compute_gradients(
            stage, processor, [[record] for record in records], step.num_supervised
        )
        differences.append(abs(loss - single_loss) / single_loss)
        cosines.append(float(torch.cosine_similarity(gradients, single_gradients, dim=0)))
    return {
        "steps": steps,
        "packs_per_step": plan.accumulate_grad_batches * RANKS,
        "held": counts,
        "largest_loss_difference": max(differences),
        "smallest_cosine": min(cosines),
        "versions": get_package_versions(),
    }


def _compute_gradients(
    stage: SFTStage, processor: Processor, packs: list[list[Record]], count: int
) -> tuple[float, torch.Tensor]:
    """Compute loss and gradients of an optimizer step whose samples are packed like this."""
    stage.model.zero_grad()
    total = 0.0
    for pack in packs:
        loss = stage.compute_token_losses(collate(processor, pack)).double().sum() / count
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([p.grad.flatten().double() for p in stage.model.parameters() if p.grad is not None])


if __name__ == "__main__":
    main()
