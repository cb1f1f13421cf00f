"""task=exam with a finished model, and the exam of a pipeline."""

import json

import pytest
from run_helpers import RUN

from lit_vlm.config import parse
from lit_vlm.config.overrides import ConfigError
from lit_vlm.evaluation.exam import make_items, read_answers, score_answer
from lit_vlm.fault_tolerance.exit_status import INTERRUPTED
from lit_vlm.files import compute_weights_digest
from lit_vlm.model.build import build_model
from lit_vlm.model.export import export_model
from lit_vlm.reports.exam import list_exams
from lit_vlm.reports.report import write_report
from lit_vlm.tasks import exam, pipeline
from lit_vlm.tasks.exam import run_exam


def make_run(blueprint, folder, parent=None, seed=0):
    """Make the folder of a finished run with an untrained model."""
    export_model(build_model(blueprint, seed=seed), blueprint.tokenizer, blueprint.images, folder / "hf")
    manifest = {
        "status": "finished",
        "name": folder.name,
        "stage": folder.name,
        "weights_digest": compute_weights_digest(folder / "hf"),
        "parent": {"path": str(parent / "hf"), "digest": ""} if parent else None,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def take_exam(folder, *overrides):
    run_exam(parse(["task=exam", f"init_from={folder / 'hf'}", "trainer=tiny", f"run_dir={folder.parent}", *overrides]))


@pytest.fixture
def scripted(monkeypatch):
    """Return a function that makes models give the right answer to these kinds, and returns the questions asked."""

    def set_kinds(*kinds, stop_after=None):
        asked = []

        def answer(model, processor, samples, max_new_tokens, **limits):
            for number, sample in enumerate(samples):
                if len(asked) == stop_after:
                    raise KeyboardInterrupt
                asked.append(sample.id)
                yield number, sample.messages[-1].text if sample.kind in kinds else "?"

        monkeypatch.setattr(exam, "generate_answers_continuously", answer)
        return asked

    return set_kinds


def test_an_exam_answers_each_question_scores_it_and_is_not_taken_again(blueprint, tmp_path, capsys):
    folder = make_run(blueprint, tmp_path / "sft")
    take_exam(folder, "evaluate.exam_items=1")
    answers = read_answers(folder / "exam.jsonl")
    assert answers.weights == compute_weights_digest(folder / "hf")
    assert {row["id"] for row in answers.rows} == {item.sample.id for item in make_items(1)}
    for row, item in zip(answers.rows, sorted(make_items(1), key=lambda item: 0), strict=True):
        assert set(row) == set(score_answer(item, ""))
    assert "Exam of 56 questions" in capsys.readouterr().out
    before = (folder / "exam.jsonl").read_bytes()
    take_exam(folder, "evaluate.exam_items=1")
    assert (folder / "exam.jsonl").read_bytes() == before
    output = capsys.readouterr().out
    assert "Exam of 56 questions" in output and "answered before" not in output


def test_an_interrupted_exam_keeps_its_answers_and_resumes(blueprint, tmp_path, scripted, capsys):
    folder = make_run(blueprint, tmp_path / "sft")
    first = scripted(stop_after=100)
    with pytest.raises(SystemExit) as stopped:
        take_exam(folder, "evaluate.exam_items=2")
    assert stopped.value.code == INTERRUPTED and len(first) == 100
    second = scripted()
    take_exam(folder, "evaluate.exam_items=2")
    assert not set(first) & set(second) and len(first) + len(second) == 112
    assert "exam of 112 questions, 100 answered before" in capsys.readouterr().out


def test_an_exam_is_compared_with_that_of_the_run_before(blueprint, tmp_path, scripted, capsys):
    align = make_run(blueprint, tmp_path / "align")
    sft = make_run(blueprint, tmp_path / "sft", parent=align, seed=1)
    scripted("word", "ocr")
    take_exam(align, "evaluate.exam_items=30")
    scripted("word", "caption")
    take_exam(sft, "evaluate.exam_items=31")
    output = capsys.readouterr().out
    # ocr in 4 cells, and its text lines; one more question of each cell makes no difference
    assert "gained in 4 of 69 cells, lost in 8 (ocr ko easy -1.00 [" in output
    assert "1.00▲" in (sft / "report.html").read_text(encoding="utf-8")
    write_report(tmp_path / "report.html", [align, sft], "both")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "gained in 4 of 69 cells, lost in 8 (ocr ko easy -1.00 [" in page and "1,680 questions" in page
    assert page.count("1.00▲") == 4 and page.count("0.00▼") == 8


def test_answers_of_weights_that_were_trained_again_are_not_shown(blueprint, tmp_path, scripted):
    folder = make_run(blueprint, tmp_path / "sft")
    scripted()
    take_exam(folder, "evaluate.exam_items=1")
    assert len(list_exams([folder])) == 1
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8")) | {"weights_digest": "other"}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert not list_exams([folder])


def test_a_model_without_a_run_folder_has_its_answers_below_run_dir(blueprint, tmp_path, scripted):
    export_model(build_model(blueprint), blueprint.tokenizer, blueprint.images, tmp_path / "mine")
    scripted()
    overrides = ["task=exam", f"init_from={tmp_path / 'mine'}", f"run_dir={tmp_path / 'runs'}", "trainer=tiny"]
    run_exam(parse([*overrides, "evaluate.exam_items=1"]))
    assert len(read_answers(tmp_path / "runs/exam/mine/exam.jsonl").rows) == 56


def test_a_failed_exam_does_not_stop_the_pipeline_and_one_without_a_model_is_named(tmp_path, monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(pipeline, "run_process", lambda command, start: (commands.append(command), (1, []))[1])
    pipeline.take_exam(tmp_path, ["experiment=tiny/2_sft"], 1)
    assert "No exam" in capsys.readouterr().out and not commands
    (tmp_path / "hf").mkdir()
    pipeline.take_exam(tmp_path, ["experiment=tiny/2_sft", "init_from=previous", "seed=3"], None)
    assert "ended with exit status 1" in capsys.readouterr().out
    (command,) = commands
    assert command[1:] == [
        str(RUN),
        "task=exam",
        "experiment=tiny/2_sft",
        "seed=3",
        "evaluate.exam_items=null",
        f"init_from='{tmp_path / 'hf'}'",
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=exam"], "init_from is not set: task=exam asks a finished model"),
        (["task=exam", "init_from=a/b", "evaluate.exam_items=0"], "at least 1 question"),
        (["experiment=tiny/1_align", "logger.metric=exam/mean"], "logger.metric=exam/mean: nothing is evaluated"),
        (["experiment=tiny/1_align", "checkpoint.best_metric=exam/mean"], "Set evaluate.every_steps=<steps>"),
        (["experiment=tiny/1_align", "checkpoint.best_metric=val/lss"], "is val/loss, a score of the exam"),
    ],
)
def test_settings_of_the_exam_that_cannot_be_meant_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        parse(overrides)
