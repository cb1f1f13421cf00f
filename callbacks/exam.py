"""Exam callback: takes a part of the fixed exam between optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L

from callbacks.evaluation import Evaluation, answer_on_all_ranks
from lit_vlm.data.datamodule import DataModule
from lit_vlm.evaluation.exam import (
    ALL_CELL,
    EXTRA_TOKENS,
    ExamAnswers,
    ExamItem,
    get_identity,
    list_exam_metrics,
    make_items,
    score_answer,
)
from lit_vlm.evaluation.generation import count_answer_tokens
from lit_vlm.fault_tolerance.watchdog import Progress


class Exam(Evaluation):
    """Takes the exam every `exam_every_steps` optimizer steps and after the last one, and logs `exam/*`.

    Args:
        run_dir: run folder.
        exam_every_steps: optimizer steps between two exams. None: no exam.
        training_items: items of each cell.
        metric, best_metric: logger.metric and checkpoint.best_metric, of which those of the exam must exist.
        say: called with each line for the user.
    """

    def __init__(
        self,
        run_dir: Path,
        exam_every_steps: int | None = None,
        training_items: int = 5,
        metric: str | None = None,
        best_metric: str | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        super().__init__(
            "exam", exam_every_steps, {"logger.metric": metric, "checkpoint.best_metric": best_metric}, say
        )
        self.run_dir, self.training_items = Path(run_dir), training_items

    def list_metrics(self) -> Sequence[str]:
        return list_exam_metrics()

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, progress: Progress) -> dict[str, float]:
        rows = self._collect_rows(trainer, pl_module, progress)
        return ExamAnswers(self.run_dir, get_identity(), "", rows).compute_means()

    def describe_scores(self, scores: Mapping[str, float]) -> str:
        return f"exam {scores[f'exam/{ALL_CELL}']:.3f}"

    def _make_items(self) -> tuple[ExamItem, ...]:
        return make_items(self.training_items)

    def _collect_rows(
        self, trainer: L.Trainer, pl_module: L.LightningModule, progress: Progress
    ) -> list[dict[str, Any]]:
        """Answer the items and score the answers. The rows are in the order of the items."""
        items = self._make_items()
        samples = [item.sample for item in items]
        datamodule: DataModule = trainer.datamodule  # type: ignore[attr-defined]
        limits = [count_answer_tokens(datamodule.processor, sample) + EXTRA_TOKENS for sample in samples]
        answers = answer_on_all_ranks(trainer, pl_module, samples, limits, progress)
        return [score_answer(item, text) for item, text in zip(items, answers, strict=True)]
