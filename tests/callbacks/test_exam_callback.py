"""The exam while a stage trains: scores, logs, the best checkpoint, and training that stays as it is."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import exam_runs
import lightning as L
import pytest
import torch
from exam_runs import RecordingExam, fit, make_benchmarks
from waiting import PATIENCE

from callbacks import Checkpoint, Exam, Throughput, evaluation
from lit_vlm.evaluation.exam import ExamAnswers, list_exam_metrics, make_items
from lit_vlm.files import read_csv_rows
from lit_vlm.reports.report import write_report
from lit_vlm.stages import AlignStage
from lit_vlm.types import UserError

WORKER = Path(exam_runs.__file__)


def make_exam(run_dir, **settings):
    return RecordingExam(run_dir, **{"exam_every_steps": 2, "training_items": 1, "say": lambda text: None, **settings})


class ModeRecorder(L.Callback):
    """Records the modules in train mode at the start of each micro-batch."""

    def __init__(self):
        self.modes = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.modes.append([name for name, module in pl_module.named_modules() if module.training])


def test_a_run_with_exams_ends_with_the_weights_of_one_without_bit_for_bit(small_parts, tmp_path):
    """With dropout, so that a random number more or less would show."""
    lora = {"parts": {"language_model": {"lora": {"rank": 4, "dropout": 0.3}}}}
    weights, modes = [], []
    for exams in ([], [make_exam(tmp_path), make_benchmarks(tmp_path)]):
        recorder = ModeRecorder()
        stage, _ = fit(small_parts, tmp_path, *exams, recorder, **lora)
        weights.append(stage.model.state_dict())
        modes.append(recorder.modes)
    assert modes[0] == modes[1] and modes[0][0]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_exams_are_logged_at_their_steps_with_their_share_of_the_time(small_parts, tmp_path):
    said = []
    exam = Exam(tmp_path, exam_every_steps=2, training_items=1, say=said.append)
    _, trainer = fit(small_parts, tmp_path, exam, max_steps=5)
    rows = [row for row in read_csv_rows(tmp_path / "metrics.csv") if row["exam/mean"]]
    assert [int(row["step"]) for row in rows] == [1, 3, 4]  # rows count from 0; the last step has an exam too
    assert set(list_exam_metrics()) <= set(rows[0])
    assert float(trainer.callback_metrics["exam/mean"]) == float(rows[-1]["exam/mean"])
    figures = exam.figures()["exam"]
    assert figures["count"] == 3 and 0 < figures["time_share"] < 1 and figures["last"] == exam.history["5"]
    assert figures["seconds"] == pytest.approx(sum(float(row["exam/seconds"]) for row in rows))
    assert "% of the training time" in said[-1]
    write_report(tmp_path / "report.html", [tmp_path], "run")
    assert f'aria-label="exam of {tmp_path.name} by step"' in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_time_of_an_exam_does_not_count_as_training(small_parts, tmp_path, monkeypatch):
    exam = make_exam(tmp_path)
    exam._collect_rows = lambda *arguments: (time.sleep(5), [])[1]
    monkeypatch.setattr(ExamAnswers, "compute_means", lambda self: {"exam/mean": 0.0})
    _, trainer = fit(small_parts, tmp_path, exam, max_steps=2)
    throughput = next(callback for callback in trainer.callbacks if isinstance(callback, Throughput))
    assert exam.figures()["exam"]["seconds"] > 5 > throughput.figures()["seconds"]


def test_answers_in_turn_and_in_common_batches_are_the_same_also_with_rows_of_new_tokens(small_parts, tmp_path):
    """Sharded weights need common batches. `align` keeps the rows of new tokens apart."""
    stage, trainer = fit(small_parts, tmp_path, stage_class=AlignStage, max_steps=2)
    samples, datamodule = [item.sample for item in make_items(1)[::5]], trainer.datamodule
    limits = [8 + number for number in range(len(samples))]
    stage.eval()
    answers = [
        dict(answer(stage, datamodule, samples, limits, range(len(samples))))
        for answer in (evaluation._answer_alone, evaluation._answer_together)
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 12 and any(answers[0].values())


@pytest.mark.parametrize("kind", ["ddp", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fsdp2", "zero3"))])
def test_two_ranks_give_the_answers_and_scores_of_one(small_parts, tmp_path, kind):
    exam, benchmarks = make_exam(tmp_path), make_benchmarks(tmp_path)
    fit(small_parts, tmp_path, exam, benchmarks)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, str(WORKER), *small_parts, str(tmp_path), kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert ranks[0][:3] == ranks[1][:3]
    assert ranks[0] == [exam.history, exam.exams, benchmarks.history, benchmarks.answers]
    assert ranks[1][3] == []  # rank 0 alone runs the harness
    assert len({row["answer"] for row in exam.exams[0]}) > 1


def test_a_killed_run_resumes_with_its_exams_and_takes_none_twice(small_parts, tmp_path):
    class Kill(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                raise RuntimeError("killed")

    whole = make_exam(tmp_path / "whole")
    fit(small_parts, tmp_path / "whole", whole)
    folder = tmp_path / "killed"
    options = {"every_steps": 2, "every_minutes": None, "say": lambda text: None}
    with pytest.raises(RuntimeError, match="killed"):
        fit(small_parts, folder, make_exam(folder), Checkpoint(folder, **options), Kill())
    resumed = make_exam(folder)
    fit(small_parts, folder, resumed, Checkpoint(folder, **options))
    assert len(resumed.exams) == 1 and resumed.history == whole.history
    assert resumed.figures()["exam"]["count"] == 2
    rows = [row for row in read_csv_rows(folder / "metrics.csv") if row["exam/mean"]]
    assert [int(row["step"]) for row in rows] == [1, 3]


def test_the_best_checkpoint_is_that_of_the_highest_exam_score(small_parts, tmp_path, monkeypatch):
    scores = iter([0.1, 0.3, 0.2])
    monkeypatch.setattr(ExamAnswers, "compute_means", lambda self: {"exam/mean": 0.0, "exam/word_ko": next(scores)})
    checkpoint = Checkpoint(
        tmp_path, every_minutes=None, keep_last=1, keep_best=True, best_metric="exam/word_ko", say=lambda text: None
    )
    fit(small_parts, tmp_path, make_exam(tmp_path), checkpoint, max_steps=6)
    assert checkpoint.folder.read_best() == checkpoint.folder.read_best("exam/word_ko") == (4, 0.3)
    assert checkpoint.folder.read_best("val/loss") is None
    assert checkpoint.folder.list_steps() == [6, 4]


def test_a_question_of_a_benchmark_that_does_not_fit_the_context_is_refused_before_the_first_step(
    small_parts, tmp_path
):
    benchmarks = make_benchmarks(tmp_path)
    benchmarks.slices = replace(benchmarks.slices, max_new_tokens=(10**6,) * len(benchmarks.slices.samples))
    with pytest.raises(UserError, match=r"may have 1,000,\d+ tokens.*evaluate\.max_new_tokens"):
        fit(small_parts, tmp_path, benchmarks)


def test_a_score_that_the_exam_does_not_have_is_refused_before_the_first_step(small_parts, tmp_path):
    with pytest.raises(UserError, match=r"exam/wrod_ko.*Did you mean exam/word_ko\?"):
        fit(small_parts, tmp_path, Exam(tmp_path, exam_every_steps=2, metric="exam/wrod_ko"))
    assert not (tmp_path / "metrics.csv").exists()
