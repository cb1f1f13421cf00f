"""Samples callback: generates answers to held-out samples before and after training, scores and stores them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.evaluation.box_drawing import (
    ASKED,
    PREDICTED,
    REFERENCE,
    BoxMark,
    draw_boxes,
    parse_box_marks,
    resize_to_readable,
)
from lit_vlm.evaluation.generation import batch_by_length, format_prompt, generate_answers, get_reference_lengths
from lit_vlm.evaluation.metrics import compute_score, compute_text_scores
from lit_vlm.fault_tolerance.watchdog import Activity, Progress, get_progress
from lit_vlm.files import read_json_lines, write_text_atomically
from lit_vlm.redaction import redact
from lit_vlm.types import LazyImage, PreferencePair, Record, Sample

TILE_LIMIT_FACTOR = 4  # factor on the training tile limit: generation keeps no activations for a backward pass
# colour of a box -> name of its layer
BOX_LAYERS = {ASKED: "asked", REFERENCE: "reference", PREDICTED: "prediction"}
EXTRA_TOKENS = 8  # tokens beyond the longest reference of the batch; a longer answer is wrong anyway


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """A held-out sample with its reference and the prediction of the model. The reference of a pair is the chosen response."""

    sample: Sample
    reference: str
    prediction: str
    score: float  # of the main metric of its kind, 0 to 1
    text_scores: dict[str, float]  # of the other metrics of its kind: name -> score, 0 to 1


class Samples(L.Callback):
    """Scores held-out samples, and writes `samples.jsonl` and `samples/*.png` for a few of each kind and language.

    Args:
        run_dir: run folder. Rank 0 writes both there; every rank generates all answers.
        max_samples: maximum number of scored samples per kind and language, the first ones of the held-out data.
        shown: number of written samples per kind and language.
        max_new_tokens: maximum number of tokens of an answer. It is at most `EXTRA_TOKENS` above the longest reference of
            the same batch.
    """

    def __init__(self, run_dir: Path, max_samples: int = 200, shown: int = 4, max_new_tokens: int = 160) -> None:
        self.run_dir, self.max_samples = Path(run_dir), max_samples
        self.shown, self.max_new_tokens = shown, max_new_tokens
        self.scores: dict[str, dict[str, float]] = {}
        self.num_scored: dict[str, int] = {}
        self.text_scores: dict[str, dict[str, dict[str, float]]] = {}  # phase -> metric -> kind and language -> mean

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if "before" not in self.scores:  # else this fit resumes from a checkpoint, after `before` was done
            self._run_phase("before", trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # on_fit_end would be too late: Lightning has moved the model off its device by then.
        self._run_phase("after", trainer, pl_module)
        metrics = {f"score/{group}": value for group, value in self.scores.get("after", {}).items()}
        for name, scores in self.text_scores.get("after", {}).items():
            metrics |= {f"score/{name}/{group}": value for group, value in scores.items()}
        if trainer.is_global_zero and metrics:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)

    def figures(self) -> dict[str, Any]:
        """Return figures for the manifest: mean scores per phase, kind and language, and the number of samples behind each."""
        return self.state_dict() if self.scores else {}

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "num_scored": self.num_scored, "text_scores": self.text_scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scores, self.num_scored = dict(state_dict["scores"]), dict(state_dict["num_scored"])
        self.text_scores = dict(state_dict.get("text_scores") or {})  # an older checkpoint has none

    def _run_phase(self, phase: str, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        datamodule = trainer.datamodule
        if datamodule is None or not datamodule.held_out:
            return
        progress = get_progress(trainer)
        with trainer.precision_plugin.forward_context(), progress.use_activity(Activity.generating):
            answers = self.generate_scored_answers(pl_module, datamodule, progress)
        groups: dict[str, list[ScoredAnswer]] = defaultdict(list)
        for answer in answers:
            groups[f"{answer.sample.kind}_{answer.sample.language}"].append(answer)
        self.scores[phase] = {name: float(np.mean([a.score for a in group])) for name, group in groups.items()}
        self.num_scored = {name: len(group) for name, group in groups.items()}
        self.text_scores[phase] = _average_text_scores(groups)
        if trainer.is_global_zero:
            rows = [row for name, group in groups.items() for row in self._make_rows(phase, name, group[: self.shown])]
            _replace_rows(self.run_dir / "samples.jsonl", phase, rows)
            for logger in trainer.loggers:
                if hasattr(logger, "log_samples"):
                    logger.log_samples(phase, rows, step=trainer.global_step)

    def generate_scored_answers(
        self, pl_module: L.LightningModule, datamodule: DataModule, progress: Progress
    ) -> list[ScoredAnswer]:
        """Generate the answers in batches of similar length, and return them in the order of the index."""
        index = datamodule.held_out
        assert index is not None
        lengths = get_reference_lengths(index)
        answers: dict[int, ScoredAnswer] = {}
        limits = {
            "max_tokens": datamodule.micro_batch_limits[0],
            "max_tiles": TILE_LIMIT_FACTOR * datamodule.micro_batch_limits[1],
        }
        for indices in progress.iterate(batch_by_length(index, select_samples(index, self.max_samples), **limits)):
            max_new_tokens = min(self.max_new_tokens, int(lengths[indices].max()) + EXTRA_TOKENS)
            generate = partial(_generate_batch, pl_module, datamodule, indices, max_new_tokens)
            answers |= zip(indices, datamodule.read_held_out(indices, generate), strict=True)
        return [answers[i] for i in sorted(answers)]

    def _make_rows(self, phase: str, group: str, answers: list[ScoredAnswer]) -> Iterator[dict[str, Any]]:
        for number, answer in enumerate(answers):
            sample = answer.sample
            yield {
                "phase": phase,
                "id": sample.id,
                "source": sample.source,
                "kind": str(sample.kind),
                "language": str(sample.language),
                "prompt": format_prompt(sample.messages[:-1]),
                "reference": answer.reference,
                "prediction": answer.prediction,
                "score": answer.score,
                "text_scores": answer.text_scores,
                **self._save_images(f"{group}_{number}", phase, answer),
            }

    def _save_images(self, name: str, phase: str, answer: ScoredAnswer) -> dict[str, Any]:
        """Save the images of an answer and return their paths, relative to the run folder, and the boxes.

        Boxes are drawn only if the sample has exactly one image. That image is also saved without boxes, and the boxes are
        returned as numbers, for loggers that draw boxes themselves.
        """
        images = answer.sample.images
        prompt_boxes = parse_box_marks(format_prompt(answer.sample.messages[:-1]), ASKED)
        answer_boxes = parse_box_marks(answer.reference, REFERENCE, label_chars=False)
        answer_boxes += parse_box_marks(answer.prediction, PREDICTED, label_below=True)
        has_one_image, paths = len(images) == 1, []
        for number, image in enumerate(images):
            path = f"samples/{name}_{number}{'_' + phase if has_one_image and answer_boxes else ''}.png"
            _save_image(self.run_dir / path, image, prompt_boxes + answer_boxes if has_one_image else [])
            paths.append(path)
        if not has_one_image or not prompt_boxes + answer_boxes:
            return {"images": paths}
        plain = f"samples/{name}_plain.png"
        resize_to_readable(images[0].load()).save(self.run_dir / plain)
        return {"images": paths, "plain": plain, "boxes": [_make_box_row(mark) for mark in prompt_boxes + answer_boxes]}


def _generate_batch(
    pl_module: L.LightningModule, datamodule: DataModule, indices: list[int], max_new_tokens: int
) -> list[ScoredAnswer]:
    """Generate the answers to a batch of held-out samples. Raise RecordError if one cannot be read."""
    index = datamodule.held_out
    assert index is not None
    samples = [to_sample(index.get_record(i)) for i in indices]
    texts = generate_answers(pl_module.model, datamodule.processor, samples, max_new_tokens)
    return [score_answer(sample, text) for sample, text in zip(samples, texts, strict=True)]


def score_answer(sample: Sample, prediction: str, others: Sequence[str] = ()) -> ScoredAnswer:
    """Score an answer against the last message of its sample, and against other references; the best one counts."""
    reference = sample.messages[-1].text.strip()
    references = [reference, *others]
    score = max(compute_score(sample.kind, prediction, text) for text in references)
    return ScoredAnswer(sample, reference, prediction, score, compute_text_scores(sample.kind, prediction, references))


def _average_text_scores(groups: dict[str, list[ScoredAnswer]]) -> dict[str, dict[str, float]]:
    """Average the scores of each metric over the answers of each group: metric -> group -> mean."""
    means: dict[str, dict[str, float]] = {}
    for group, answers in groups.items():
        for name in answers[0].text_scores:
            means.setdefault(name, {})[group] = float(np.mean([answer.text_scores[name] for answer in answers]))
    return means


def to_sample(record: Record) -> Sample:
    """Convert a preference pair to a sample with the chosen answer; a sample stays as it is."""
    if not isinstance(record, PreferencePair):
        return record
    messages = (*record.prompt, record.chosen)
    shown = record.images[: record.num_prompt_images]
    return Sample(record.id, record.source, record.origin, record.kind, record.language, messages, shown)


def select_samples(index: SampleIndex, max_per_group: int) -> list[int]:
    """Select the indices of the first `max_per_group` samples of each kind and language."""
    counts: Counter[tuple[int, int]] = Counter()
    selected = []
    for i, group in enumerate(zip(index.kind.tolist(), index.language.tolist(), strict=True)):
        if counts[group] < max_per_group:
            counts[group] += 1
            selected.append(i)
    return selected


def _save_image(path: Path, image: LazyImage, marks: list[BoxMark]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_boxes(image.load(), marks).save(path)


def _make_box_row(mark: BoxMark) -> dict[str, Any]:
    """Make the entry of a box in `samples.jsonl`: corners as fractions of the image's width and height, clipped to [0, 1]."""
    corners = [min(max(value, 0.0), 1.0) for value in (mark.box.x1, mark.box.y1, mark.box.x2, mark.box.y2)]
    return {"layer": BOX_LAYERS[mark.colour], "label": mark.label, "box": corners}


def _replace_rows(path: Path, phase: str, rows: list[dict[str, Any]]) -> None:
    """Append the rows of one phase after those of the other phases. A repeated phase replaces its old rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # at `before`, existing rows are from an earlier run
    known = [row for row in read_json_lines(path) if row.get("phase") != phase] if phase != "before" else []
    lines = [json.dumps(redact(row), ensure_ascii=False) for row in [*known, *rows]]
    text = "".join(line + "\n" for line in lines)
    write_text_atomically(path, text.encode("utf-8", "replace").decode("utf-8"), remove_secrets=False)
