"""Benchmark of CapFilt: the area under the ROC curve of the filter on planted false captions.

    python -m benchmarks.capfilt [--steps 1500] [--records 600] [--seeds 0 1 2]

A small BLIP (text encoder and vision tower of two layers) is trained on built-in captions of one coloured shape, English. Then a
source of other pictures is written, of which 30 % have the caption of another shape or colour, which is false of the picture because a
caption names both. `task=curate curate.method=capfilt` looks at it with the folders that `save_blip` wrote. Positive: the true
captions. The captions that the captioner wrote count as true if they are the caption of the picture. The result goes to
benchmarks/results/capfilt.json with versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

import lightning as L
import torch
import transformers
from sklearn.metrics import roc_auc_score
from transformers import BlipVisionConfig

from lit_vlm.config import parse
from lit_vlm.curation.capfilt import read_web_texts
from lit_vlm.curation.prune import score_captions
from lit_vlm.data.caption_pairs import CaptionDataModule, read_caption
from lit_vlm.data.generated import GENERATED_SUFFIX
from lit_vlm.data.sources import open_source
from lit_vlm.data.synthetic import BuiltinSource
from lit_vlm.files import read_json_lines
from lit_vlm.model.blip import build_blip, save_blip
from lit_vlm.model.image_text import load_blip_matcher
from lit_vlm.model.qformer.build import tokenize_captions
from lit_vlm.model.tiny import make_text_encoder
from lit_vlm.stages.caption_pairs import BlipStage
from lit_vlm.tasks.curate import curate, list_places
from lit_vlm.types import Language

RESULT = Path(__file__).parent / "results" / "capfilt.json"
IMAGE_SIZE, BATCH, SHARE_FALSE = 56, 32, 0.3
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def train_blip(folder: Path, training: list[BuiltinSource], num_steps: int, seed: int) -> None:
    """Train a small BLIP on true captions, and save its two folders, `retrieval` and `captions`."""
    make_text_encoder(folder / "bert", **SHAPE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    vision = BlipVisionConfig(**SHAPE, image_size=IMAGE_SIZE, patch_size=14)
    options = {"global_batch_size": BATCH, "queue_size": 8 * BATCH, "feature_width": 32, "seed": seed}
    model, tokenizer = build_blip(str(folder / "bert"), vision, **options)
    tokenize = partial(tokenize_captions, tokenizer, max_tokens=12)
    data = CaptionDataModule(
        training, [], tokenize, image_size=IMAGE_SIZE, global_batch_size=BATCH, num_steps=num_steps, seed=seed
    )
    stage = BlipStage(model, steps_per_epoch=sum(map(len, training)) // BATCH, learning_rate=1e-3, warmup_steps=50)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        max_steps=num_steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[_Printer()],
    )
    torch.manual_seed(seed)
    trainer.fit(stage, data)
    save_blip(model.eval(), tokenizer, folder)


class _Printer(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step % 100 == 0:
            losses = {name: round(float(value), 3) for name, value in trainer.callback_metrics.items()}
            print(trainer.global_step, losses, f"{time.process_time():.0f} CPU s", flush=True)


def write_planted(folder: Path, num_records: int, seed: int) -> tuple[list[str], list[bool]]:
    """Write a source of which 30 % of the captions are false. Returns the true captions, and True for those that were written."""
    source = BuiltinSource(
        "web", "caption", language=Language.en, num_samples=num_records, seed=seed + 1, held_out=True
    )
    truths, rng = [read_caption(source[number]) for number in range(num_records)], random.Random(seed)
    false = set(rng.sample(range(num_records), round(SHARE_FALSE * num_records)))
    rows = []
    for number, truth in enumerate(truths):
        source[number].images[0].load().save(folder / f"{number}.png")
        text = rng.choice([one for one in truths if one != truth]) if number in false else truth
        turns = [{"from": "human", "value": "<image>\nWhat do you see?"}, {"from": "gpt", "value": text}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "web.json").write_text(json.dumps(rows))
    return truths, [number not in false for number in range(num_records)]


def run(num_steps: int, num_records: int, seed: int) -> dict[str, Any]:
    """Train, plant, curate and measure."""
    folder, started = Path(tempfile.mkdtemp(prefix="capfilt-")), time.process_time()
    captions = BuiltinSource("captions", "caption", language=Language.en, num_samples=4000, seed=seed)
    train_blip(folder, [captions], num_steps, seed)
    trained = time.process_time()
    truths, is_true = write_planted(folder, num_records, seed)
    settings = [f"data.sources.mine.path={folder / 'web.json'}", "data.sources.mine.kind=caption"]
    models = [f"curate.model={folder / 'retrieval'}", f"curate.capfilt.captioner={folder / 'captions'}"]
    job = parse(
        ["task=curate", "data=llava_json", *settings, "curate.method=capfilt", *models, f"run_dir={folder / 'runs'}"]
    )
    curate(job)
    output = job.dir / "capfilt"
    source = open_source("mine", job.config.data.sources["mine"], max_image_pixels=10**8)
    texts, _ = read_web_texts([source], ["caption"], workers=1)
    matcher, index_dir = load_blip_matcher(folder / "retrieval", "model"), folder / "runs" / "index"
    scores, _ = score_captions(
        [source], list_places([source]), [text or "" for text in texts], matcher, index_dir, batch_size=32, workers=1
    )
    kept = read_json_lines(output / f"mine{GENERATED_SUFFIX}")[1:]
    answers = {row["id"]: (row["position"], row["messages"][-1]["content"][0]["text"]) for row in kept}
    web = [place for name, (place, _) in answers.items() if name.endswith("-web")]
    synthetic = [(place, text) for name, (place, text) in answers.items() if name.endswith("-synthetic")]
    return {
        "steps": num_steps,
        "seed": seed,
        "records": num_records,
        "area_under_roc": round(float(roc_auc_score(is_true, scores)), 4),
        "web_kept": len(web),
        "web_kept_true": sum(is_true[place] for place in web),
        "synthetic_kept": len(synthetic),
        "synthetic_kept_true": sum(truths[place] == text for place, text in synthetic),
        "training_cpu_seconds": round(trained - started, 1),
        "curation_cpu_seconds": round(time.process_time() - trained, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--records", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    results = []
    for seed in arguments.seeds:
        results.append(run(arguments.steps, arguments.records, seed))
        print(json.dumps(results[-1], indent=2), flush=True)
        RESULT.write_text(json.dumps({"versions": versions, "runs": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
