"""Short runs that take the exam while they train: in this process, or `torchrun --nproc-per-node=N exam_runs.py PARTS OUT`."""

import json
import logging
import os
import sys
from datetime import timedelta
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import lightning as L
from support import blueprint_of, builtin

from callbacks import Benchmarks, Exam, Exchange, Throughput
from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.processor import Processor
from lit_vlm.distributed.trainer import close_process_group
from lit_vlm.evaluation.benchmark_slices import BenchmarkSlices
from lit_vlm.evaluation.exam import make_items
from lit_vlm.loggers.file_loggers import MetricsCsv
from lit_vlm.stages import SFTStage


class RecordingExam(Exam):
    """Exam of every seventh item that keeps the rows of its exams."""

    def _make_items(self):
        return super()._make_items()[::7]

    def _collect_rows(self, trainer, pl_module, progress):
        rows = super()._collect_rows(trainer, pl_module, progress)
        self.exams = [*getattr(self, "exams", []), rows]
        return rows


def make_benchmarks(run_dir, say=lambda text: None):
    """Make the callback with questions of the exam as a benchmark; its score is the number of different answers."""
    samples = tuple(item.sample for item in make_items(1)[::11])
    history = []

    def score(answers, log, on_wait):
        history.append(list(answers))
        return {"made": float(len(set(answers)))}

    slices = BenchmarkSlices(("made",), samples, tuple(4 + number for number in range(len(samples))), score)
    callback = Benchmarks(run_dir, slices, exam_every_steps=2, say=say)
    callback.answers = history
    return callback


def fit(model_parts, run_dir, *callbacks, stage_class=SFTStage, max_steps=4, strategy="auto", **settings):
    """Train `max_steps` steps of two micro-batches; return stage and trainer."""
    blueprint = blueprint_of(model_parts)
    stage = stage_class(blueprint, learning_rate=0.01, **settings)
    module = DataModule(
        Processor(blueprint.tokenizer, blueprint.images),
        builtin("caption", "text", n=24),
        0.1,
        global_batch_size=4,
        tokens_per_micro_batch=150,
        tiles_per_micro_batch=16,
        max_steps=max_steps,
        num_workers=0,
    )
    quiet = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        strategy=strategy,
        logger=MetricsCsv(run_dir),
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        max_steps=max_steps,
        callbacks=[Exchange(), Throughput(), *callbacks],
        **dict.fromkeys(quiet, False),
    )
    trainer.fit(stage, module)
    return stage, trainer


def main(tower: str, language: str, out: str, kind: str) -> None:
    logging.getLogger("lightning").setLevel(logging.ERROR)
    exam = RecordingExam(Path(out), exam_every_steps=2, training_items=1, say=lambda text: None)
    strategy = kind
    if kind == "fsdp2":
        from lit_vlm.distributed.fsdp import FSDP2Strategy

        strategy = FSDP2Strategy()
    elif kind == "zero3":
        from lit_vlm.distributed.zero import ZeroStrategy

        strategy = ZeroStrategy(
            3, offload=False, persistence_threshold=0, timeout=timedelta(minutes=10), bucket_size=10**5
        )
    benchmarks = make_benchmarks(Path(out))
    _, trainer = fit((tower, language), out, exam, benchmarks, strategy=strategy)
    results = [exam.history, exam.exams, benchmarks.history, benchmarks.answers]
    Path(out, f"rank{trainer.global_rank}.json").write_text(json.dumps(results), encoding="utf-8")
    close_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
