"""Samples callback: generates answers to held-out samples before and after training, scores and stores them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.index.columns import Index
from lit_vlm.engine.watch import Doing, Pulse, pulse_of
from lit_vlm.evaluation.answers import alike, ask, readable_prompt, reference_lengths
from lit_vlm.evaluation.drawing import ASKED, PREDICTED, REFERENCE, Mark, draw_boxes, marks_of, readable
from lit_vlm.evaluation.scoring import score
from lit_vlm.files import write_atomically
from lit_vlm.secrets import redacted
from lit_vlm.types import ImageSource, PreferencePair, Record, Sample

TILES = 4  # factor on the training tile limit: generation keeps no activations for a backward pass
# colour of a box -> name of its layer
LAYERS = {ASKED: "asked", REFERENCE: "reference", PREDICTED: "prediction"}
SLACK = 8  # tokens beyond the longest reference of the batch; a longer answer is wrong anyway


@dataclass(frozen=True, slots=True)
class Answer:
    """A held-out sample with its reference and the prediction of the model. The reference of a pair is the chosen response."""

    sample: Sample
    reference: str
    prediction: str

    @property
    def score(self) -> float:
        return score(self.sample.kind, self.prediction, self.reference)


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

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if "before" not in self.scores:  # else this fit resumes from a checkpoint, after `before` was done
            self._phase("before", trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # on_fit_end would be too late: Lightning has moved the model off its device by then.
        self._phase("after", trainer, pl_module)
        metrics = {f"score/{group}": value for group, value in self.scores.get("after", {}).items()}
        if trainer.is_global_zero and metrics:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)

    def figures(self) -> dict[str, Any]:
        """Return figures for the manifest: mean score per phase, kind and language, and the number of samples behind each."""
        return {"scores": self.scores, "num_scored": self.num_scored} if self.scores else {}

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "num_scored": self.num_scored}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scores, self.num_scored = dict(state_dict["scores"]), dict(state_dict["num_scored"])

    def _phase(self, phase: str, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        datamodule = trainer.datamodule
        if datamodule is None or not datamodule.held_out:
            return
        progress = pulse_of(trainer)
        with trainer.precision_plugin.forward_context(), progress.during(Doing.generating):
            answers = self._answers(pl_module, datamodule, progress)
        groups: dict[str, list[Answer]] = defaultdict(list)
        for answer in answers:
            groups[f"{answer.sample.kind}_{answer.sample.language}"].append(answer)
        self.scores[phase] = {name: float(np.mean([a.score for a in group])) for name, group in groups.items()}
        self.num_scored = {name: len(group) for name, group in groups.items()}
        if trainer.is_global_zero:
            rows = [row for name, group in groups.items() for row in self._written(phase, name, group[: self.shown])]
            _rewrite(self.run_dir / "samples.jsonl", phase, rows)
            for logger in trainer.loggers:
                if hasattr(logger, "log_samples"):
                    logger.log_samples(phase, rows, step=trainer.global_step)

    def _answers(self, pl_module: L.LightningModule, datamodule: DataModule, pulse: Pulse) -> list[Answer]:
        """Generate the answers in batches of similar length, and return them in the order of the index."""
        index = datamodule.held_out
        lengths = reference_lengths(index)
        answers: dict[int, Answer] = {}
        limits = {"most_tokens": datamodule.budget[0], "most_tiles": TILES * datamodule.budget[1]}
        for indices in pulse.along(alike(index, _chosen(index, self.max_samples), **limits)):
            max_new_tokens = min(self.max_new_tokens, int(lengths[indices].max()) + SLACK)
            generate = partial(_asked, pl_module, datamodule, indices, max_new_tokens)
            answers |= zip(indices, datamodule.read_held_out(indices, generate), strict=True)
        return [answers[i] for i in sorted(answers)]

    def _written(self, phase: str, group: str, answers: list[Answer]) -> Iterator[dict[str, Any]]:
        for number, answer in enumerate(answers):
            sample = answer.sample
            yield {
                "phase": phase,
                "id": sample.id,
                "source": sample.source,
                "kind": str(sample.kind),
                "language": str(sample.language),
                "prompt": readable_prompt(sample.messages[:-1]),
                "reference": answer.reference,
                "prediction": answer.prediction,
                "score": answer.score,
                **self._pictures(f"{group}_{number}", phase, answer),
            }

    def _pictures(self, name: str, phase: str, answer: Answer) -> dict[str, Any]:
        """Save the images of an answer and return their paths, relative to the run folder, and the boxes.

        Boxes are drawn only if the sample has exactly one image. That image is also saved without boxes, and the boxes are
        returned as numbers, for loggers that draw boxes themselves.
        """
        images = answer.sample.images
        prompt_boxes = marks_of(readable_prompt(answer.sample.messages[:-1]), ASKED)
        answer_boxes = marks_of(answer.reference, REFERENCE, label_chars=False)
        answer_boxes += marks_of(answer.prediction, PREDICTED, below=True)
        has_one_image, paths = len(images) == 1, []
        for number, image in enumerate(images):
            path = f"samples/{name}_{number}{'_' + phase if has_one_image and answer_boxes else ''}.png"
            _save(self.run_dir / path, image, prompt_boxes + answer_boxes if has_one_image else [])
            paths.append(path)
        if not has_one_image or not prompt_boxes + answer_boxes:
            return {"images": paths}
        plain = f"samples/{name}_plain.png"
        readable(images[0].load()).save(self.run_dir / plain)
        return {"images": paths, "plain": plain, "boxes": [_row_of(mark) for mark in prompt_boxes + answer_boxes]}


def _asked(pl_module: L.LightningModule, datamodule: DataModule, numbers: list[int], most: int) -> list[Answer]:
    """Generate the answers to a batch of held-out samples. Raise RecordError if one cannot be read."""
    samples = [_as_sample(datamodule.held_out.record(i)) for i in numbers]
    texts = ask(pl_module.model, datamodule.processor, samples, most)
    return [Answer(sample, sample.messages[-1].text.strip(), text) for sample, text in zip(samples, texts, strict=True)]


def _as_sample(record: Record) -> Sample:
    if not isinstance(record, PreferencePair):
        return record
    messages = (*record.prompt, record.chosen)
    shown = record.images[: record.num_shown]
    return Sample(record.id, record.source, record.origin, record.kind, record.language, messages, shown)


def _chosen(index: Index, most: int) -> list[int]:
    """Select the indices of the first `max_per_group` samples of each kind and language."""
    counts: Counter[tuple[int, int]] = Counter()
    selected = []
    for i, group in enumerate(zip(index.kind.tolist(), index.language.tolist(), strict=True)):
        if counts[group] < most:
            counts[group] += 1
            selected.append(i)
    return selected


def _save(path: Path, image: ImageSource, marks: list[Mark]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_boxes(image.load(), marks).save(path)


def _row_of(mark: Mark) -> dict[str, Any]:
    """Make the entry of a box in `samples.jsonl`: corners as fractions of the image's width and height, clipped to [0, 1]."""
    corners = [min(max(value, 0.0), 1.0) for value in (mark.box.x1, mark.box.y1, mark.box.x2, mark.box.y2)]
    return {"layer": LAYERS[mark.colour], "label": mark.label, "box": corners}


def _phase_in(line: str) -> str | None:
    """Read the phase of a row; None for a truncated line."""
    try:
        return str(json.loads(line)["phase"])
    except (ValueError, KeyError, TypeError):
        return None


def _rewrite(path: Path, phase: str, rows: list[dict[str, Any]]) -> None:
    """Append the rows of one phase after those of the other phases. A repeated phase replaces its old rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept: list[str] = []
    if path.is_file() and phase != "before":  # at `before`, existing rows are from an earlier run
        # not splitlines(): answers may contain U+2028
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        kept = [line for line in lines if _phase_in(line) not in (None, phase)]
    lines = [*kept, *(json.dumps(redacted(row), ensure_ascii=False) for row in rows)]
    text = "".join(line + "\n" for line in lines)
    write_atomically(path, text.encode("utf-8", "replace").decode("utf-8"), redact=False)
