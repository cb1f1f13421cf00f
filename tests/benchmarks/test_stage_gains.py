"""The tables of what each stage gains are those of the committed result file."""

import json

import pytest

from benchmarks import stage_gains
from lit_vlm.config.choices import Task
from lit_vlm.config.compose import compose_config

PAGE = stage_gains.ROOT / "docs/exam.md"


def test_the_tables_of_gains_are_those_of_their_result_file():
    result = json.loads(stage_gains.RESULT.read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    for name, render in stage_gains.RENDERERS.items():
        assert f"<!-- {name} -->\n{render(result)}\n<!-- /{name} -->" in page


def test_the_commands_of_the_comparison_are_valid(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(stage_gains, "run_command", lambda folder, *overrides: commands.append(overrides))
    (tmp_path / "run").mkdir()
    stage_gains.train(tmp_path, 1, "2_sft", "run", None, "trainer.max_steps=2")
    with pytest.raises(AssertionError, match=stage_gains.EXAM_FILE):  # nothing ran, so there are no answers
        stage_gains.take_exam(tmp_path, 1, "run", 150)
    seconds = stage_gains.read_seconds(tmp_path, "run")
    assert seconds >= 0
    train, exam = (compose_config(list(overrides)) for overrides in commands)
    assert (train.seed, train.run_name, train.trainer.max_steps) == (1, "run", 2)
    assert (exam.task, exam.seed, exam.evaluate.exam_items) == (Task.exam, 1, 150)
