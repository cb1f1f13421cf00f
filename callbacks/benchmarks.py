"""Benchmark callback: asks slices of public benchmarks between optimizer steps, and has the harness score the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import lightning as L

from callbacks.evaluation import Evaluation, answer_on_all_ranks
from lit_vlm.distributed.collectives import gather_objects, make_rank_zero_error
from lit_vlm.evaluation.benchmark_slices import BenchmarkSlices
from lit_vlm.fault_tolerance.watchdog import Progress
from lit_vlm.types import UserError


class Benchmarks(Evaluation):
    """Scores slices of benchmarks every `exam_every_steps` optimizer steps and after the last one, and logs `benchmark/*`.

    Rank 0 runs the harness. If it fails, training continues without these scores, and the answers are kept.

    Args:
        run_dir: run folder; the answers of a step are in `benchmarks/step-<number>.jsonl`.
        benchmark_slices: questions, and the function that scores answers. None: no benchmark.
        exam_every_steps: optimizer steps between two evaluations. None: none.
        metric, best_metric: logger.metric and checkpoint.best_metric, of which those of benchmarks must exist.
        say: called with each line for the user.
    """

    def __init__(
        self,
        run_dir: Path,
        benchmark_slices: BenchmarkSlices | None = None,
        exam_every_steps: int | None = None,
        metric: str | None = None,
        best_metric: str | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        required = {"logger.metric": metric, "checkpoint.best_metric": best_metric}
        super().__init__("benchmark", exam_every_steps if benchmark_slices else None, required, say)
        self.run_dir, self.slices = Path(run_dir), benchmark_slices

    def list_metrics(self) -> Sequence[str]:
        return [f"benchmark/{name}" for name in self.slices.names] if self.slices else []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.slices is None or self.every_steps is None:
            return
        processor = trainer.datamodule.processor  # type: ignore[attr-defined]
        context = int(pl_module.model.config.text_config.max_position_embeddings)  # type: ignore[union-attr,arg-type]
        pairs = zip(self.slices.samples, self.slices.max_new_tokens, strict=True)
        longest = max(processor.compute_cost(sample).num_tokens + limit for sample, limit in pairs)
        if longest > context:
            raise make_rank_zero_error(
                trainer,
                f"benchmarks: a question with its answer may have {longest:,} tokens, and the language model takes"
                f" {context:,}. Set evaluate.max_new_tokens=<less>, or a tiling with fewer tiles.",
            )

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, progress: Progress) -> dict[str, float]:
        assert self.slices is not None
        slices = self.slices
        answers = answer_on_all_ranks(trainer, pl_module, slices.samples, slices.max_new_tokens, progress)
        scores: dict[str, float] = {}
        if trainer.is_global_zero:
            log = self.run_dir / "benchmarks" / f"step-{trainer.global_step:08}.jsonl"
            try:
                found = slices.score(answers, log, progress.mark_progress)
                scores = {f"benchmark/{name}": score for name, score in found.items()}
            except UserError as error:
                self.say(f"step {trainer.global_step:,}: no scores of benchmarks, training continues: {error}")
        return gather_objects(scores, trainer.world_size)[0]

    def describe_scores(self, scores: Mapping[str, float]) -> str:
        return (
            ", ".join(f"{name.partition('/')[2]} {score:.2f}" for name, score in scores.items())
            or "no scores of benchmarks"
        )
