"""Benchmark of what a tiny twin of BLIP-2 learns from built-in pictures with two things, over seeds and languages.

    python -m benchmarks.blip2 [--seeds 0,1,2] [--languages en,ko] [--folder runs/blip2] [--steps 600] [--docs]

Each seed and language is measured in four parts, all on held-out pictures:

- retrieval: the first stage (`RepresentStage`), then recall among 128 captions that all differ, also re-ranked by matching;
- captions: the second stage (`GenerateStage`) with a frozen language model that was trained on captions alone before;
- filter: the area under the ROC curve of the first stage's matching score over pairs of which 30 % have a false caption;
- cleaning: two first stages with equal settings, trained on a source with 30 % of false captions and on what the filter
  keeps of it; the paired difference of right answers in retrieval.

A caption names colour and shape of both things from left to right, so another text is false of the picture. Finished parts are
read from the folder. The result goes to benchmarks/results/blip2.json with versions; `--docs` writes its tables into docs/qformer.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc
from transformers import AutoModelForCausalLM, AutoTokenizer, Blip2VisionConfig
from transformers.utils.logging import disable_progress_bar

from benchmarks.index import describe_machine
from lit_vlm.data.caption_pairs import CaptionDataModule, CaptionPairs, DistinctCaptions, PairCollator, read_caption
from lit_vlm.data.subsets import PositionSubset
from lit_vlm.data.synthetic import BuiltinSource
from lit_vlm.evaluation.retrieval import RetrievalRecall, compute_ranks, evaluate_retrieval
from lit_vlm.evaluation.task_pack.text_scores import compute_chrf
from lit_vlm.model.qformer.build import build_blip2, tokenize_captions
from lit_vlm.model.qformer.generation import CAPTION_END, build_blip2_generator, generate_captions, tokenize_prompted
from lit_vlm.model.qformer.pretraining import Blip2ForPretraining
from lit_vlm.model.tiny import make_language_model, make_text_encoder
from lit_vlm.runs.run_folder import get_package_versions
from lit_vlm.stages.caption_pairs import GenerateStage, PairStage, RepresentStage
from lit_vlm.types import Language, Message, Record, Source

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/blip2.json"
DOCS = ROOT / "docs/qformer.md"
TABLE_PATTERN = re.compile(r"(?<=<!-- blip2-table -->\n).*?(?=<!-- /blip2-table -->)", re.DOTALL)

NUM_TRAINING, NUM_CAPTIONS, NUM_FILTERED, NUM_QUESTIONS = 20_000, 128, 2_000, 512
FALSE_SHARE = 0.3
TRUE_KEPT = 0.9  # share of clean held-out pairs that the filter's threshold keeps
FALSE_KINDS = ("other_picture", "one_word")  # false captions: of another picture, or with one other word
IMAGE_SIZE, PATCH_SIZE, BATCH_SIZE, MAX_TOKENS = 56, 8, 64, 10
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXT_ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
    **NO_DROPOUT,
}
TOWER = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
RATES = {"learning_rate": 4e-3, "warmup_steps": 100}
GENERATE_RATES = {"learning_rate": 5e-3, "warmup_steps": 50}
LANGUAGE_STEPS, GENERATE_STEPS, CLEANING_STEPS = 400, 600, 300


# ---- data


class FalseCaptions:
    """Source in which a share of the captions is replaced by those of other records of the source, false of the picture.

    Args:
        share: probability that a caption is replaced.
        one_word: the false caption is that of a record that differs in one word, if there is one; else of any record.
    """

    def __init__(self, source: Source, share: float, seed: int, *, one_word: bool = False) -> None:
        self.source, self.name = source, source.name
        self.digest = f"{source.digest}|{share}|{seed}|{one_word}"
        self.texts = [read_caption(source[number]) for number in range(len(source))]
        self.truth = list(self.texts)
        rng = np.random.default_rng(seed)
        distinct = sorted(set(self.truth))
        self.is_false = rng.random(len(source)) < share
        for number in np.flatnonzero(self.is_false):
            true = self.truth[number]
            near = [text for text in distinct if _count_other_words(text, true) == 1] if one_word else []
            others = near or [text for text in distinct if text != true]
            self.texts[number] = others[rng.integers(len(others))]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        last = record.messages[-1]
        return replace(record, messages=(*record.messages[:-1], Message(last.role, (self.texts[index],))))


def _count_other_words(text: str, other: str) -> int:
    words, others = text.split(), other.split()
    return sum(a != b for a, b in zip(words, others, strict=True)) if len(words) == len(others) else -1


def make_source(language: str, num_samples: int, seed: int = 0, *, held_out: bool = False) -> BuiltinSource:
    """Make a source of captions of two things."""
    options = {"num_samples": num_samples, "hard": True, "seed": seed, "held_out": held_out}
    return BuiltinSource("captions", "caption", language=Language(language), **options)


def make_data(source: Source, tokenize: Any, num_steps: int, seed: int) -> CaptionDataModule:
    """Make the data module of a training source."""
    sizes = {"image_size": IMAGE_SIZE, "global_batch_size": BATCH_SIZE, "num_steps": num_steps}
    return CaptionDataModule([source], [], tokenize, **sizes, seed=seed)


# ---- training


def fit(stage: PairStage, data: CaptionDataModule) -> float:
    """Train a stage for all steps of its data; returns CPU seconds."""
    start = time.process_time()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        max_steps=data.num_steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(stage, data)
    return time.process_time() - start


def build_first_stage(folder: Path, seed: int) -> tuple[Blip2ForPretraining, Any]:
    """Build a tiny first-stage model, and the function that tokenizes its captions."""
    if not folder.exists():
        make_text_encoder(folder, seed, **TEXT_ENCODER)
    vision = Blip2VisionConfig(**TOWER, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)
    options = {"num_queries": 4, "feature_width": 32, "freeze_vision_tower": False}
    model, tokenizer = build_blip2(str(folder), vision, **options, seed=seed)
    return model, functools.partial(tokenize_captions, tokenizer, max_tokens=MAX_TOKENS)


def train_first_stage(
    folder: Path, source: Source, num_steps: int, seed: int
) -> tuple[Blip2ForPretraining, Any, float]:
    """Train a first stage; returns the model in eval mode, the function that tokenizes captions, and CPU seconds."""
    model, tokenize = build_first_stage(folder, seed)
    seconds = fit(RepresentStage(model, **RATES, seed=seed), make_data(source, tokenize, num_steps, seed))
    return model.eval(), tokenize, seconds


def train_language_model(folder: Path, texts: Sequence[str], seed: int) -> None:
    """Train a tiny language model on captions alone, each twice in a row, so that it learns to repeat what it has read.

    A frozen model of random weights cannot write captions, and one that never repeats anything ignores its soft prompts.
    """
    make_language_model(folder, seed)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, LANGUAGE_STEPS)
    for step in range(LANGUAGE_STEPS):
        rows = [(text + CAPTION_END) * 2 for text in texts[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]]
        batch = tokenizer(rows, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


# ---- measurements


def collate(source: Source, tokenize: Any) -> Any:
    """Collate all records of a source to one batch."""
    pairs = CaptionPairs([source], IMAGE_SIZE)
    return PairCollator(tokenize)([pairs[number] for number in range(len(pairs))])


def measure_retrieval(model: Blip2ForPretraining, tokenize: Any, language: str) -> dict[str, float]:
    """Measure retrieval among the held-out captions, which all differ."""
    source = DistinctCaptions(make_source(language, 4 * NUM_TRAINING, held_out=True), NUM_CAPTIONS)
    batch = collate(source, tokenize)
    assert len(set(batch.pair_ids[:, 1].tolist())) == NUM_CAPTIONS
    return evaluate_retrieval(model, [batch], num_candidates=16)


def measure_captions(folder: Path, model: Blip2ForPretraining, language: str, seed: int) -> dict[str, float]:
    """Train the second stage and compare its captions of held-out pictures with the true ones."""
    training = make_source(language, NUM_TRAINING, seed)
    if not (folder / "config.json").exists():
        texts = [read_caption(training[number]) for number in range(len(training))]
        train_language_model(folder, texts * math.ceil(LANGUAGE_STEPS * BATCH_SIZE / len(texts)), seed)
    generator, tokenizer = build_blip2_generator(model, str(folder), seed=seed)
    tokenize = functools.partial(tokenize_prompted, tokenizer, num_queries=model.num_queries)
    stage = GenerateStage(generator, tokenizer, **GENERATE_RATES, seed=seed)
    seconds = fit(stage, make_data(training, tokenize, GENERATE_STEPS, seed))
    source = DistinctCaptions(make_source(language, 4 * NUM_TRAINING, held_out=True), NUM_CAPTIONS)
    truth = [read_caption(source[number]) for number in range(len(source))]
    written = generate_captions(generator.eval(), tokenizer, collate(source, tokenize).pixel_values)
    return {
        "exact": mean(a == b for a, b in zip(written, truth, strict=True)),
        "chrf": mean(compute_chrf(a, [b]) for a, b in zip(written, truth, strict=True)),
        "chrf_of_another_picture": mean(
            compute_chrf(a, [b]) for a, b in zip(written, truth[1:] + truth[:1], strict=True)
        ),
        "cpu_seconds": seconds,
        "examples": written[:3],
    }


@torch.no_grad()
def score_matches(model: Blip2ForPretraining, source: Source, tokenize: Any) -> Tensor:
    """Score each pair of a source by the probability of a match, [records]."""
    pairs, collator, scores = CaptionPairs([source], IMAGE_SIZE), PairCollator(tokenize), []
    for first in range(0, len(pairs), 128):
        batch = collator([pairs[number] for number in range(first, min(first + 128, len(pairs)))])
        logits = model.match(model.encode_images(batch.pixel_values), batch.input_ids, batch.attention_mask)
        scores.append(logits.softmax(1)[:, 1])
    return torch.cat(scores)


def measure_filter(model: Blip2ForPretraining, tokenize: Any, language: str, seed: int) -> dict[str, Any]:
    """Measure how well the matching score separates true from false held-out captions, of other pictures and with one other word."""
    result: dict[str, Any] = {}
    for name in FALSE_KINDS:
        source = make_source(language, NUM_FILTERED, seed, held_out=True)
        dirty = FalseCaptions(source, FALSE_SHARE, seed, one_word=name == "one_word")
        scores, is_true = score_matches(model, dirty, tokenize), torch.from_numpy(~dirty.is_false)
        bins = {
            part: torch.histc(scores[rows], 10, 0, 1).int().tolist()
            for part, rows in (("true", is_true), ("false", ~is_true))
        }
        result[name] = {"auroc": float(binary_auroc(scores, is_true.int())), "histogram": bins}
    return result


def answer_questions(model: Blip2ForPretraining, tokenize: Any, language: str) -> np.ndarray:
    """Answer retrieval in both directions among the held-out captions: whether the first is right, [2 * NUM_QUESTIONS]."""
    source = DistinctCaptions(make_source(language, 4 * NUM_TRAINING, held_out=True), NUM_QUESTIONS)
    batch, recall = collate(source, tokenize), RetrievalRecall()
    with torch.no_grad():
        images = model.compute_image_features(model.encode_images(batch.pixel_values))
        texts = model.compute_text_features(batch.input_ids, batch.attention_mask)
    recall.update(images, batch.pair_ids[:, 1], texts, batch.pair_ids[:, 1])
    scores, own = recall.compute_similarities(), torch.eye(NUM_QUESTIONS, dtype=torch.bool)
    return torch.cat([compute_ranks(scores, own), compute_ranks(scores.T, own)]).eq(1).numpy()


def measure_cleaning(folder: Path, judge: Blip2ForPretraining, language: str, seed: int) -> dict[str, Any]:
    """Train on a dirty source and on what the filter keeps of it, and compare their answers one by one."""
    dirty = FalseCaptions(make_source(language, NUM_TRAINING, seed + 100), FALSE_SHARE, seed)
    _, tokenize = build_first_stage(folder, seed)
    # Matching learns with two negatives for each pair, some very similar, so 0.5 keeps few pairs and another share for each seed
    clean = score_matches(judge, make_source(language, 500, seed, held_out=True), tokenize)
    threshold = float(clean.quantile(1 - TRUE_KEPT))
    kept = np.flatnonzero(score_matches(judge, dirty, tokenize).numpy() >= threshold)
    answers = []
    for source in (dirty, PositionSubset(dirty, kept, f"{dirty.digest}|kept")):
        model, tokenize, _ = train_first_stage(folder, source, CLEANING_STEPS, seed)
        answers.append(answer_questions(model, tokenize, language))
    difference = answers[1].astype(float) - answers[0]
    half = 1.96 * difference.std(ddof=1) / math.sqrt(NUM_QUESTIONS)  # as if both questions about a pair had one answer
    return {
        "threshold": threshold,
        "kept": len(kept) / len(dirty),
        "false_among_kept": float(dirty.is_false[kept].mean()),
        "true_kept": float((~dirty.is_false[kept]).sum() / (~dirty.is_false).sum()),
        "r1_dirty": float(answers[0].mean()),
        "r1_kept": float(answers[1].mean()),
        "difference": float(difference.mean()),
        "interval": [float(difference.mean() - half), float(difference.mean() + half)],
    }


def measure_seed(folder: Path, language: str, seed: int, steps: int, parts: Sequence[str]) -> dict[str, Any]:
    """Measure the missing parts of a seed and a language; the folder keeps what is finished."""
    folder = folder / f"{language}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    file, encoder, weights = folder / "result.json", folder / "text_encoder", folder / "first_stage.pt"
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    result |= {"language": language, "seed": seed, "steps": steps}
    if not weights.exists():
        model, tokenize, seconds = train_first_stage(encoder, make_source(language, NUM_TRAINING, seed), steps, seed)
        torch.save(model.state_dict(), weights)
        result |= {"cpu_seconds": seconds, "parameters": sum(value.numel() for value in model.parameters())}
    model, tokenize = build_first_stage(encoder, seed)
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval()
    measures = {
        "retrieval": lambda: measure_retrieval(model, tokenize, language),
        "filter": lambda: measure_filter(model, tokenize, language, seed),
        "captions": lambda: measure_captions(folder / "language_model", model, language, seed),
        "cleaning": lambda: measure_cleaning(encoder, model, language, seed),
    }
    for name in parts:
        if name not in result:
            result[name] = measures[name]()
            file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"{language} seed {seed} {name}: {json.dumps(result[name], ensure_ascii=False)}", flush=True)
    return result


# ---- tables


def render_tables(result: dict[str, Any]) -> str:
    """Render a table of each part, with the runs that have it."""
    tables = {
        "retrieval": render_retrieval,
        "captions": render_captions,
        "filter": render_filter,
        "cleaning": render_cleaning,
    }
    measured = {part: [run for run in result["runs"] if part in run] for part in tables}
    return "\n".join(render(measured[part]) for part, render in tables.items() if measured[part])


def render_rows(head: str, rows: Sequence[Sequence[str]]) -> str:
    """Render a table of Markdown, from `head` with its columns separated by |."""
    lines = [f"| {head} |", "|" + "---|" * len(head.split(" | ")), *(f"| {' | '.join(row)} |" for row in rows)]
    return "".join(f"{line}\n" for line in lines)


def name_run(run: dict[str, Any]) -> list[str]:
    return [{"en": "English", "ko": "Korean"}[run["language"]], str(run["seed"])]


def render_retrieval(runs: Sequence[dict[str, Any]]) -> str:
    """Render recall at 1, 5 and 10 in both directions, by features and re-ranked."""
    rows = [
        [
            *name_run(run),
            *(
                ", ".join(f"{run['retrieval'][f'{prefix}{way}_r{cutoff}']:.2f}" for cutoff in (1, 5, 10))
                for prefix in ("", "reranked_")
                for way in ("image_to_text", "text_to_image")
            ),
            f"{run['cpu_seconds']:.0f}",
        ]
        for run in runs
    ]
    head = (
        "language | seed | image to text R@1, 5, 10 | text to image | re-ranked: image to text | text to image | CPU s"
    )
    return render_rows(head, rows)


def render_captions(runs: Sequence[dict[str, Any]]) -> str:
    """Render how the captions of the second stage compare with the true ones."""
    names = ("exact", "chrf", "chrf_of_another_picture")
    rows = [
        [*name_run(run), *(f"{run['captions'][name]:.2f}" for name in names), f"{run['captions']['cpu_seconds']:.0f}"]
        for run in runs
    ]
    return render_rows(
        "language | seed | exact captions | chrF | chrF with the caption of another picture | CPU s", rows
    )


def render_filter(runs: Sequence[dict[str, Any]]) -> str:
    """Render the areas under the ROC curve of the filter."""
    rows = [[*name_run(run), *(f"{run['filter'][name]['auroc']:.3f}" for name in FALSE_KINDS)] for run in runs]
    return render_rows("language | seed | captions of other pictures | captions with one other word", rows)


def render_cleaning(runs: Sequence[dict[str, Any]]) -> str:
    """Render what the filter keeps, and what a model learns from it."""
    rows = []
    for run in runs:
        part = run["cleaning"]
        low, high = part["interval"]
        shares = [part[name] for name in ("true_kept", "false_among_kept", "r1_dirty", "r1_kept")]
        difference = f"{part['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        rows.append([*name_run(run), *(f"{share:.3f}" for share in shares), difference])
    head = "language | seed | true pairs kept | false among the kept | R@1 of the dirty source | R@1 of the kept | difference (95 %)"
    return render_rows(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--languages", default="en,ko")
    parser.add_argument("--parts", default="retrieval,filter,captions,cleaning")
    parser.add_argument("--folder", type=Path, default=Path("runs/blip2"))
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of the first stage")
    parser.add_argument("--docs", action="store_true")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    disable_progress_bar()
    torch.set_num_threads(1)
    results = [
        measure_seed(arguments.folder, language, int(seed), arguments.steps, arguments.parts.split(","))
        for language in arguments.languages.split(",")
        for seed in arguments.seeds.split(",")
    ]
    result = {"runs": results, "machine": describe_machine(), "versions": get_package_versions()}
    print(render_tables(result))
    if arguments.docs:
        RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        text = DOCS.read_text(encoding="utf-8")
        DOCS.write_text(TABLE_PATTERN.sub(lambda _: render_tables(result), text), encoding="utf-8")


if __name__ == "__main__":
    main()
