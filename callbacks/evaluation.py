"""Evaluation between optimizer steps, with the questions dealt over all ranks. The exam and the benchmarks derive from it."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.checkpoint import Checkpoint
from callbacks.throughput import Throughput
from lit_vlm.compat.lightning import is_last_micro_step
from lit_vlm.data.datamodule import DataModule
from lit_vlm.distributed.collectives import gather_objects, make_rank_zero_error
from lit_vlm.evaluation.generation import generate_answers, generate_answers_continuously
from lit_vlm.fault_tolerance.watchdog import Activity, Progress, get_progress
from lit_vlm.loggers.tracker import require_logged_metric
from lit_vlm.model.generate import use_eval_mode
from lit_vlm.types import Sample, UserError

TILE_LIMIT_FACTOR = 4  # factor on the training tile limit: generation keeps no activations for a backward pass


class Evaluation(L.Callback):
    """Evaluation every `every_steps` optimizer steps and after the last one; it logs `<name>/*`.

    Training waits meanwhile. All ranks have all scores afterwards. Weights, modes and random generators of training stay as they
    are, so the run ends with the same weights as without an evaluation.

    Args:
        name: first part of the names of the scores.
        every_steps: optimizer steps between two evaluations. None: none.
        required: setting -> name of a score that must exist, or of another metric.
        say: called with each line for the user.
    """

    def __init__(
        self, name: str, every_steps: int | None, required: Mapping[str, str | None], say: Callable[[str], None]
    ) -> None:
        self.name, self.every_steps, self.say = name, every_steps, say
        self.required = {key: metric for key, metric in required.items() if metric and metric.startswith(f"{name}/")}
        self.history: dict[str, dict[str, float]] = {}  # step -> scores
        self._seconds = self._training_seconds = 0.0  # of evaluations, and of training with them
        self._started = time.monotonic()

    @abstractmethod
    def list_metrics(self) -> Sequence[str]:
        """List the names of the scores."""

    @abstractmethod
    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, progress: Progress) -> dict[str, float]:
        """Return the scores by their names. All ranks call it at the same point, and get the same scores."""

    @abstractmethod
    def describe_scores(self, scores: Mapping[str, float]) -> str:
        """Describe the scores for the terminal."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for setting, metric in self.required.items():
            try:
                require_logged_metric(metric, set(self.list_metrics()), setting)
            except UserError as error:
                raise make_rank_zero_error(trainer, str(error)) from None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # before the checkpoint of the same step, which then holds the scores
        step, every = trainer.global_step, self.every_steps
        if every is None or not is_last_micro_step(trainer) or str(step) in self.history:
            return
        is_last = step == trainer.max_steps or batch_idx + 1 == trainer.num_training_batches
        if step % every == 0 or is_last:
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.history and trainer.is_global_zero:
            self.say(
                f"{self.name}: all together {self._seconds:.1f} s, {self._compute_share():.0%} of the training time"
            )

    def figures(self) -> dict[str, Any]:
        """Return figures for the manifest: number of evaluations, their seconds, share of the time, and the last scores."""
        if not self.history:
            return {}
        last = list(self.history.values())[-1]
        share = self._compute_share()
        return {self.name: {"count": len(self.history), "seconds": self._seconds, "time_share": share, "last": last}}

    def state_dict(self) -> dict[str, Any]:
        seconds = self._training_seconds + time.monotonic() - self._started
        return {"history": self.history, "seconds": self._seconds, "training_seconds": seconds} if self.history else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = dict(state_dict.get("history") or {})
        self._seconds = float(state_dict.get("seconds") or 0.0)
        self._training_seconds = float(state_dict.get("training_seconds") or 0.0)

    def _compute_share(self) -> float:
        return self._seconds / max(self._training_seconds + time.monotonic() - self._started, 1e-9)

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
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
            scores = self.evaluate(trainer, pl_module, progress)
        seconds = time.monotonic() - start
        self._seconds += seconds
        self.history[str(trainer.global_step)] = scores
        self._log(trainer, scores, seconds)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoint):
                callback.update_best(trainer, pl_module, scores)

    def _log(self, trainer: L.Trainer, scores: dict[str, float], seconds: float) -> None:
        share = self._compute_share()
        values = scores | {f"{self.name}/seconds": seconds, f"{self.name}/time_share": share}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)  # the row of this step; rows count from 0
        self.say(
            f"step {trainer.global_step:,}: {self.describe_scores(scores)}; {seconds:.1f} s "
            f"({share:.0%} of the training time so far)"
        )


def answer_on_all_ranks(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    samples: Sequence[Sample],
    max_new_tokens: Sequence[int],
    progress: Progress,
) -> list[str]:
    """Answer each question on one rank with greedy decoding, and gather the answers on all, in the order of the questions.

    Args:
        samples: conversations whose last answer is generated.
        max_new_tokens: maximum number of tokens of each answer.
    """
    world_size = trainer.world_size
    # each rank has equally many questions, so that ranks with sharded weights compute equally often; the last may be repeated
    rounds = -(-len(samples) // world_size)
    own = [(trainer.global_rank + number * world_size) % len(samples) for number in range(rounds)]
    answer = _answer_together if _has_sharded_weights(pl_module.model) else _answer_alone
    datamodule: DataModule = trainer.datamodule  # type: ignore[attr-defined]
    found = dict(progress.iterate(answer(pl_module, datamodule, samples, max_new_tokens, own)))
    answers = {number: text for part in gather_objects(found, world_size) for number, text in part.items()}
    return [answers[number] for number in range(len(samples))]


def _has_sharded_weights(model: torch.nn.Module) -> bool:
    """Return True if no rank has all weights: FSDP2 and ZeRO-3."""
    parameter = next(model.parameters())
    return hasattr(parameter, "ds_id") or hasattr(parameter, "to_local")


def _answer_alone(
    pl_module: L.LightningModule,
    datamodule: DataModule,
    samples: Sequence[Sample],
    max_new_tokens: Sequence[int],
    own: Sequence[int],
) -> Iterator[tuple[int, str]]:
    max_tokens, max_tiles = datamodule.micro_batch_limits
    answers = generate_answers_continuously(
        pl_module.model,
        datamodule.processor,
        [samples[number] for number in own],
        [max_new_tokens[number] for number in own],
        max_tokens=max_tokens,
        max_tiles=TILE_LIMIT_FACTOR * max_tiles,
    )
    return ((own[position], text) for position, text in answers)


def _answer_together(
    pl_module: L.LightningModule,
    datamodule: DataModule,
    samples: Sequence[Sample],
    max_new_tokens: Sequence[int],
    own: Sequence[int],
) -> Iterator[tuple[int, str]]:
    """Answer in batches that all ranks compute at the same time: their size follows from the questions of all ranks."""
    max_tokens, max_tiles = datamodule.micro_batch_limits
    costs = [datamodule.processor.compute_cost(sample) for sample in samples]
    longest = max(cost.num_tokens + limit for cost, limit in zip(costs, max_new_tokens, strict=True))
    most_tiles = max(1, *(cost.num_tiles for cost in costs))
    size = max(1, min(max_tokens // longest, TILE_LIMIT_FACTOR * max_tiles // most_tiles))
    for start in range(0, len(own), size):
        group = own[start : start + size]
        limits = [max_new_tokens[number] for number in group]
        texts = generate_answers(pl_module.model, datamodule.processor, [samples[number] for number in group], limits)
        yield from zip(group, texts, strict=True)
