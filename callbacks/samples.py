"""The model's own answers to held-out samples, scored and shown, before training and after it."""

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

TILES = 4  # times the training cap: nothing of the tower is kept for a backward pass
LAYERS = {ASKED: "asked", REFERENCE: "reference", PREDICTED: "prediction"}  # colour of a box -> what it is
SLACK = 8  # tokens that an answer may be longer than the longest reference beside it; by then it is wrong


@dataclass(frozen=True, slots=True)
class Answer:
    """A held-out sample (of a pair, the chosen answer) and what the model says to it."""

    sample: Sample
    reference: str
    prediction: str

    @property
    def score(self) -> float:
        return score(self.sample.kind, self.prediction, self.reference)


class Samples(L.Callback):
    """Writes `samples.jsonl` and `samples/*.png` for a few samples of each kind and language, and scores many.

    Args:
        run_dir: where both are written, by rank 0; every rank generates all answers.
        max_samples: scored per kind and language, the first ones of the held-out data.
        shown: written per kind and language.
        max_new_tokens: most tokens of an answer; `SLACK` more than the longest reference beside it at any rate.
    """

    def __init__(self, run_dir: Path, max_samples: int = 200, shown: int = 4, max_new_tokens: int = 160) -> None:
        self.run_dir, self.max_samples = Path(run_dir), max_samples
        self.shown, self.max_new_tokens = shown, max_new_tokens
        self.scores: dict[str, dict[str, float]] = {}
        self.num_scored: dict[str, int] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if "before" not in self.scores:  # else this fit goes on from a checkpoint, and `before` is long past
            self._phase("before", trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not in on_fit_end: by then Lightning has moved the model off its device.
        self._phase("after", trainer, pl_module)
        metrics = {f"score/{group}": value for group, value in self.scores.get("after", {}).items()}
        if trainer.is_global_zero and metrics:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)

    def figures(self) -> dict[str, Any]:
        """For the manifest: mean score per phase, kind and language, and how many samples are behind each."""
        return {"scores": self.scores, "num_scored": self.num_scored} if self.scores else {}

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "num_scored": self.num_scored}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scores, self.num_scored = dict(state_dict["scores"]), dict(state_dict["num_scored"])

    def _phase(self, phase: str, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        datamodule = trainer.datamodule
        if datamodule is None or not datamodule.held_out:
            return
        pulse = pulse_of(trainer)
        with trainer.precision_plugin.forward_context(), pulse.during(Doing.generating):
            answers = self._answers(pl_module, datamodule, pulse)
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
        """In the order of the index, though generated in an order of like lengths."""
        index = datamodule.held_out
        lengths = reference_lengths(index)
        answers: dict[int, Answer] = {}
        caps = {"most_tokens": datamodule.budget[0], "most_tiles": TILES * datamodule.budget[1]}
        for numbers in pulse.along(alike(index, _chosen(index, self.max_samples), **caps)):
            most = min(self.max_new_tokens, int(lengths[numbers].max()) + SLACK)
            asked = partial(_asked, pl_module, datamodule, numbers, most)
            answers |= zip(numbers, datamodule.read_held_out(numbers, asked), strict=True)
        return [answers[number] for number in sorted(answers)]

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
        """Paths within the run's folder. Boxes are drawn where there is one picture that they can mean; that one lies there
        without them as well, and they beside it as numbers, for trackers that draw boxes themselves."""
        images = answer.sample.images
        asked = marks_of(readable_prompt(answer.sample.messages[:-1]), ASKED)
        answered = marks_of(answer.reference, REFERENCE, label_chars=False)
        answered += marks_of(answer.prediction, PREDICTED, below=True)
        alone, paths = len(images) == 1, []
        for number, image in enumerate(images):
            path = f"samples/{name}_{number}{'_' + phase if alone and answered else ''}.png"
            _save(self.run_dir / path, image, asked + answered if alone else [])
            paths.append(path)
        if not alone or not asked + answered:
            return {"images": paths}
        plain = f"samples/{name}_plain.png"
        readable(images[0].load()).save(self.run_dir / plain)
        return {"images": paths, "plain": plain, "boxes": [_row_of(mark) for mark in asked + answered]}


def _asked(pl_module: L.LightningModule, datamodule: DataModule, numbers: list[int], most: int) -> list[Answer]:
    """Of held-out samples, in one generation. RecordError when one cannot be read."""
    samples = [_as_sample(datamodule.held_out.record(number)) for number in numbers]
    said = ask(pl_module.model, datamodule.processor, samples, most)
    return [Answer(sample, sample.messages[-1].text.strip(), text) for sample, text in zip(samples, said, strict=True)]


def _as_sample(record: Record) -> Sample:
    if not isinstance(record, PreferencePair):
        return record
    messages = (*record.prompt, record.chosen)
    shown = record.images[: record.num_shown]
    return Sample(record.id, record.source, record.origin, record.kind, record.language, messages, shown)


def _chosen(index: Index, most: int) -> list[int]:
    """The first `most` of each kind and language."""
    seen: Counter[tuple[int, int]] = Counter()
    chosen = []
    for number, group in enumerate(zip(index.kind.tolist(), index.language.tolist(), strict=True)):
        if seen[group] < most:
            seen[group] += 1
            chosen.append(number)
    return chosen


def _save(path: Path, image: ImageSource, marks: list[Mark]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_boxes(image.load(), marks).save(path)


def _row_of(mark: Mark) -> dict[str, Any]:
    """A box as `samples.jsonl` has it: corners as shares of the picture's sides, cut at its edges."""
    corners = [min(max(value, 0.0), 1.0) for value in (mark.box.x1, mark.box.y1, mark.box.x2, mark.box.y2)]
    return {"layer": LAYERS[mark.colour], "label": mark.label, "box": corners}


def _phase_in(line: str) -> str | None:
    """Read the phase that a row is of; None of a line that was cut."""
    try:
        return str(json.loads(line)["phase"])
    except (ValueError, KeyError, TypeError):
        return None


def _rewrite(path: Path, phase: str, rows: list[dict[str, Any]]) -> None:
    """Put the rows of one phase behind those of the others: a phase that is run again replaces its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept: list[str] = []
    if path.is_file() and phase != "before":  # what a `before` finds is left from an earlier run
        # not splitlines(): answers may hold U+2028
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        kept = [line for line in lines if _phase_in(line) not in (None, phase)]
    lines = [*kept, *(json.dumps(redacted(row), ensure_ascii=False) for row in rows)]
    text = "".join(line + "\n" for line in lines)
    write_atomically(path, text.encode("utf-8", "replace").decode("utf-8"), redact=False)
