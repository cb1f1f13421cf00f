"""Tests that follow the recipes of "How to add" in CONTRIBUTING.md, and hold the lists in two layers equal."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from waiting import PATIENCE

import callbacks
from callbacks import make_callbacks
from lit_vlm.config.callbacks import CALLBACKS, CallbackEntry, Use, choose_callbacks, find_callback_errors
from lit_vlm.config.choices import StageName
from lit_vlm.config.help import PAGE, format_help, write_tables
from lit_vlm.config.pair_stages import PAIR_STAGE_CONFIGS, PAIR_STAGES
from lit_vlm.stages import STAGES
from lit_vlm.tasks.pair_models import BUILDERS, RESOLVERS

ROOT = Path(callbacks.__file__).resolve().parents[1]


def insert_after(path: Path, line: str, added: str) -> None:
    """Insert a line after the first one that begins so."""
    lines = path.read_text(encoding="utf-8").splitlines()
    position = next(number for number, text in enumerate(lines) if text.startswith(line))
    path.write_text("\n".join([*lines[: position + 1], added, *lines[position + 1 :]]) + "\n", encoding="utf-8")


def test_a_task_is_a_member_an_entry_and_a_file(tmp_path):
    for folder in ("lit_vlm", "conf"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run.py", tmp_path)
    insert_after(tmp_path / "lit_vlm/config/choices.py", "class Task(Enum)", '    greet = "greet"  # greet the user')
    entry = (
        '    Task.greet: TaskEntry("lit_vlm.tasks.greet:greet", (lambda config: ["no seed"] * (config.seed == 0),)),'
    )
    insert_after(tmp_path / "lit_vlm/config/tasks.py", "TASKS: dict", entry)
    (tmp_path / "lit_vlm/tasks/greet.py").write_text('def greet(run):\n    print("hello", run.name)\n')

    def run_program(*arguments):
        command = [sys.executable, "run.py", *arguments]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)

    assert "greet       greet the user" in run_program("--help").stdout
    assert run_program("task=greet", "seed=1", "run_name=me").stdout == "hello me\n"
    assert run_program("task=greet").stderr.strip() == "no seed"


def test_a_callback_is_an_entry_and_a_file(tmp_path, monkeypatch):
    source = "import lightning as L\nclass Greet(L.Callback):\n    def __init__(self, run_dir, name='you'):\n        self.name = name\n"
    (tmp_path / "greet_callback.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    entry = CallbackEntry("greet_callback.Greet", Use.named, "greets the user", arguments=("name",), order=5)
    monkeypatch.setitem(CALLBACKS, "greet", entry)
    assert "greets the user; not by default" in format_help([])
    assert not list(find_callback_errors(["throughput", {"greet": {"name": "all"}}]))
    (error,) = find_callback_errors([{"greet": {"nme": 1}}])
    assert error == "callbacks: greet has no argument nme; it has name. Did you mean name?"
    chosen = choose_callbacks([{"greet": {"name": "all"}}, "throughput"], export=False, profile=False)
    *_, last = make_callbacks(chosen, tmp_path)
    assert (type(last).__name__, last.name) == ("Greet", "all")


def test_the_schema_lists_the_stages_that_have_a_class():
    assert {*STAGES, *PAIR_STAGES} == set(StageName.__members__) and not {*STAGES} & {*PAIR_STAGES}
    assert (
        {stage.name for stage in PAIR_STAGE_CONFIGS}
        == {stage.name for stage in RESOLVERS}
        == {one.name for one in BUILDERS}
    )


def test_the_tables_of_the_settings_page_are_those_of_the_schema():
    page = PAGE.read_text(encoding="utf-8")
    assert write_tables(page) == page, "write them anew: python -m lit_vlm.config.help"
