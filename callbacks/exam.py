"""Exam callback: takes a part of the fixed exam between optimizer steps, with the items dealt over all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.checkpoint import Checkpoint
from callbacks.throughput import Throughput
from lit_vlm.compat.lightning import is_last_micro_step
from lit_vlm.data.datamodule import DataModule
from lit_vlm.distributed.collectives import gather_objects, make_rank_zero_error
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
from lit_vlm.evaluation.generation import count_answer_tokens, generate_answers, generate_answers_continuously
from lit_vlm.fault_tolerance.watchdog import Activity, Progress, get_progress
from lit_vlm.loggers.tracker import require_logged_metric
from lit_vlm.model.generate import use_eval_mode
from lit_vlm.types import UserError

TILE_LIMIT_FACTOR = 4  # factor on the training tile limit: generation keeps no activations for a backward pass


class Exam(L.Callback):
    """Takes the exam every `exam_every_steps` optimizer steps and after the last one, and logs `exam/*`.

    Training waits meanwhile. Each rank answers its share of the items; all ranks have all scores afterwards. Weights, modes and
    random generators of training stay as they are, so the run ends with the same weights as without exams.

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
        self.run_dir, self.say = Path(run_dir), say
        self.exam_every_steps, self.training_items = exam_every_steps, training_items
        settings = {"logger.metric": metric, "checkpoint.best_metric": best_metric}
        self.metrics = {key: name for key, name in settings.items() if name is not None and name.startswith("exam/")}
        self.history: dict[str, dict[str, float]] = {}  # step -> scores
        self._seconds = self._training_seconds = 0.0  # of exams, and of training with them
        self._started = time.monotonic()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for setting, metric in self.metrics.items():
            try:
                require_logged_metric(metric, set(list_exam_metrics()), setting)
            except UserError as error:
                raise make_rank_zero_error(trainer, str(error)) from None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # before the checkpoint of the same step, which then holds the scores
        step, every = trainer.global_step, self.exam_every_steps
        if every is None or not is_last_micro_step(trainer) or str(step) in self.history:
            return
        is_last = step == trainer.max_steps or batch_idx + 1 == trainer.num_training_batches
        if step % every == 0 or is_last:
            self._take_exam(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.history and trainer.is_global_zero:
            self.say(f"exams took {self._seconds:.1f} s, {self._compute_share():.0%} of the training time")

    def figures(self) -> dict[str, Any]:
        """Return figures for the manifest: number of exams, their seconds, their share of the time, and the last scores."""
        if not self.history:
            return {}
        last = list(self.history.values())[-1]
        share = self._compute_share()
        return {"exam": {"count": len(self.history), "seconds": self._seconds, "time_share": share, "last": last}}

    def state_dict(self) -> dict[str, Any]:
        seconds = self._training_seconds + time.monotonic() - self._started
        return {"history": self.history, "seconds": self._seconds, "training_seconds": seconds} if self.history else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = dict(state_dict.get("history") or {})
        self._seconds = float(state_dict.get("seconds") or 0.0)
        self._training_seconds = float(state_dict.get("training_seconds") or 0.0)

    def _compute_share(self) -> float:
        return self._seconds / max(self._training_seconds + time.monotonic() - self._started, 1e-9)

    def _take_exam(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        start, progress = time.monotonic(), get_progress(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                callback.pause()
        with (
            trainer.precision_plugin.forward_context(),
            progress.use_activity(Activity.generating),
            isolate_rng(),
            use_eval_mode(pl_module),
        ):
            rows = self._collect_rows(trainer, pl_module, progress)
        seconds = time.monotonic() - start
        self._seconds += seconds
        means = ExamAnswers(self.run_dir, get_identity(), "", rows).compute_means()
        self.history[str(trainer.global_step)] = means
        self._log(trainer, means | {"exam/seconds": seconds, "exam/time_share": self._compute_share()})
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoint):
                callback.update_best(trainer, pl_module, means)

    def _log(self, trainer: L.Trainer, values: dict[str, float]) -> None:
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)  # the row of this step; rows count from 0
        self.say(
            f"step {trainer.global_step:,}: exam {values[f'exam/{ALL_CELL}']:.3f}, {values['exam/seconds']:.1f} s "
            f"({values['exam/time_share']:.0%} of the training time so far)"
        )

    def _make_items(self) -> tuple[ExamItem, ...]:
        return make_items(self.training_items)

    def _collect_rows(
        self, trainer: L.Trainer, pl_module: L.LightningModule, progress: Progress
    ) -> list[dict[str, Any]]:
        """Answer this rank's items and gather the rows of all ranks, each item once."""
        items, world_size = self._make_items(), trainer.world_size
        # each rank has equally many items, so that ranks with sharded weights compute equally often; the last may be repeated
        rounds = -(-len(items) // world_size)
        own = [items[(trainer.global_rank + number * world_size) % len(items)] for number in range(rounds)]
        datamodule: DataModule = trainer.datamodule  # type: ignore[attr-defined]
        answer = _answer_together if _has_sharded_weights(pl_module.model) else _answer_alone
        answers = progress.iterate(answer(pl_module, datamodule, own, items))
        own_rows = [score_answer(item, text) for item, text in answers]
        rows = {row["id"]: row for part in gather_objects(own_rows, world_size) for row in part}
        return [rows[item.sample.id] for item in items]


def _has_sharded_weights(model: torch.nn.Module) -> bool:
    """Return True if no rank has all weights: FSDP2 and ZeRO-3."""
    parameter = next(model.parameters())
    return hasattr(parameter, "ds_id") or hasattr(parameter, "to_local")


def _answer_alone(
    pl_module: L.LightningModule, datamodule: DataModule, own: Sequence[ExamItem], items: Sequence[ExamItem]
) -> Iterator[tuple[ExamItem, str]]:
    max_tokens, max_tiles = datamodule.micro_batch_limits
    answers = generate_answers_continuously(
        pl_module.model,
        datamodule.processor,
        [item.sample for item in own],
        extra_tokens=EXTRA_TOKENS,
        max_tokens=max_tokens,
        max_tiles=TILE_LIMIT_FACTOR * max_tiles,
    )
    return ((own[number], text) for number, text in answers)


def _answer_together(
    pl_module: L.LightningModule, datamodule: DataModule, own: Sequence[ExamItem], items: Sequence[ExamItem]
) -> Iterator[tuple[ExamItem, str]]:
    """Answer in batches that all ranks compute at the same time: the size of a batch follows from the items of all ranks."""
    max_tokens, max_tiles = datamodule.micro_batch_limits
    costs = [datamodule.processor.compute_cost(item.sample) for item in items]
    longest = max(cost.num_tokens for cost in costs) + EXTRA_TOKENS
    most_tiles = max(1, *(cost.num_tiles for cost in costs))
    size = max(1, min(max_tokens // longest, TILE_LIMIT_FACTOR * max_tiles // most_tiles))
    for start in range(0, len(own), size):
        group = own[start : start + size]
        samples = [item.sample for item in group]
        limits = [count_answer_tokens(datamodule.processor, sample) + EXTRA_TOKENS for sample in samples]
        yield from zip(group, generate_answers(pl_module.model, datamodule.processor, samples, limits), strict=True)
