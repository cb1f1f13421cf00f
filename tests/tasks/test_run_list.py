"""task=runs: figures, differing settings, damaged folders and the promise to import no torch."""

import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from lit_vlm.config import parse
from lit_vlm.runs.run_folder import to_plain
from lit_vlm.tasks.runs import find_differing_settings, find_run_folders, list_runs, shorten_keys, summarize_run
from lit_vlm.types import UserError

ROOT = Path(__file__).resolve().parents[2]
METRICS = "epoch,step,train/loss,val/loss\n0,0,6.5,\n0,1,4.25,3.5\n0,2,3.25,2.75\n0,3,3.0,2.875\n"


@pytest.fixture(scope="module")
def configs() -> list[dict]:
    """Settings of two runs as in a manifest; they differ in the learning rate, in LoRA and in where they were run."""
    first = ["experiment=tiny/2_sft", "init_from=none/hf"]
    second = [*first, "stage.learning_rate=5e-4", "stage.parts.language_model.lora.rank=8", "logger=wandb"]
    return [to_plain(asdict(parse(overrides).config)) for overrides in (first, second)]


def write_run(path: Path, config: dict, **entries) -> Path:
    path.mkdir(parents=True)
    manifest = {
        "status": "finished",
        "name": path.name,
        "stage": "sft",
        "started": "2026-11-28T21:25:03+00:00",
        "finished": "2026-11-28T22:25:03+00:00",
        "config": config,
        "data": {},
        "parent": None,
        "plan": {"steps": 4},
        "figures": {
            "steps": 4,
            "seconds": 3600.0,
            "loss_last": 3.0,
            "val/loss": 2.875,
            "scores": {"after": {"caption_ko": 0.5, "caption_en": 0.25}},
            "text_scores": {"after": {"chrf": {"caption_ko": 0.8, "caption_en": 0.7}}},
        },
    }
    (path / "manifest.json").write_text(json.dumps(manifest | entries), encoding="utf-8")
    (path / "metrics.csv").write_text(METRICS, encoding="utf-8")
    return path


@pytest.fixture
def runs(tmp_path, configs) -> Path:
    write_run(tmp_path / "a" / "one", configs[0])
    two = write_run(tmp_path / "a" / "two", configs[1], status="running", figures={}, plan={"steps": 9})
    (two / "held.json").write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
    (two / "hf").mkdir()
    (two / "hf" / "manifest.json").write_text("{}")  # belongs to the run, is none itself
    return tmp_path


def list_as_text(root: Path, capsys, monkeypatch, *overrides: str, width: int = 240) -> str:
    monkeypatch.setattr("lit_vlm.tasks.runs.console.width", width)
    list_runs(parse(["task=runs", f"run_dir={root}", *overrides]))
    return capsys.readouterr().out


def test_the_list_shows_figures_and_only_the_settings_that_differ(runs, capsys, monkeypatch):
    text = list_as_text(runs, capsys, monkeypatch)
    assert "sft: 2 runs" in text
    heading, first, second = (line.split() for line in text.splitlines() if "train" in line or "a/" in line)
    assert {"stage.learning_rate", "lora.rank", "chrF", "best"} <= set(heading)
    assert not any("logger" in word or "adam" in word for word in heading)
    assert {"a/one", "finished", "4", "2.75", "2.88", "0.375", "0.75", "0.0005"} - set(first) == {"0.0005"}
    assert {"a/two", "running", "9", "2.75", "0.0005", "8"} <= set(second) and "0.375" not in second
    assert "1 h 0 min" in text and "2026-11-28 21:25" in text and "kB" in text


def test_json_lines_hold_the_same_figures_with_unrounded_values(runs, capsys, monkeypatch):
    rows = [json.loads(line) for line in list_as_text(runs, capsys, monkeypatch, "runs.json=true").splitlines()]
    assert [row["name"] for row in rows] == ["a/one", "a/two"]
    assert rows[0]["best_val_loss"] == 2.75 and rows[0]["text_scores"] == {"chrf": pytest.approx(0.75)}
    assert rows[1]["settings"]["stage.learning_rate"] == 5e-4 and rows[1]["step"] == 4 and rows[1]["steps"] == 9
    keys = {key for row in rows for key in row["settings"]}
    assert all(key.startswith(("stage.learning_rate", "stage.parts.language_model.lora")) for key in keys), keys


@pytest.mark.parametrize(
    ("holder", "status"),
    [
        (None, "interrupted"),
        ({"host": socket.gethostname(), "process": 2**22 + 1}, "interrupted"),  # beyond the largest process id
        ({"host": "another", "process": 1}, "running"),
    ],
)
def test_a_killed_run_is_interrupted_although_its_manifest_says_running(holder, status, runs):
    held = runs / "a" / "two" / "held.json"
    held.unlink()
    if holder:
        held.write_text(json.dumps(holder))
    assert summarize_run(runs / "a" / "two", runs).status == status


@pytest.mark.parametrize(
    ("manifest", "note"),
    [
        ("{ half a fi", "is damaged"),
        ("[]", "is damaged"),
        ('{"config": 3}', "its config is int"),
        (None, "it has no manifest.json"),
    ],
)
def test_a_damaged_manifest_is_listed_with_a_note(manifest, note, runs, capsys, monkeypatch):
    file = runs / "a" / "one" / "manifest.json"
    file.unlink() if manifest is None else file.write_text(manifest)
    text = list_as_text(runs, capsys, monkeypatch)
    assert "unknown stage: 1 run" in text and "damaged" in text and note in text
    assert "2.75" in text  # from metrics.csv


def test_no_content_of_a_manifest_or_of_the_metrics_ends_the_list(tmp_path, configs):
    rng = random.Random(0)
    odd = [None, 3, -1e999, "x", [], {}, {"after": 3}, {"after": {"a": "b"}}, [[1]], True, "\x1b[31m[bold]", 10**400]
    path, run = write_run(tmp_path / "one", configs[0]), parse(["task=runs", f"run_dir={tmp_path}"])
    manifest = json.loads((path / "manifest.json").read_text())
    for _ in range(60):
        changed = json.loads(json.dumps(manifest))
        for table in rng.sample([changed, changed["figures"], changed["plan"], changed["config"]], 2):
            table[rng.choice(list(table))] = rng.choice(odd)
        (path / "manifest.json").write_text(json.dumps(changed))
        start = rng.randrange(len(METRICS))
        (path / "metrics.csv").write_text(
            METRICS[:start] + rng.choice(["\0", '"', "\n,,\n", "x,", "nan"]) + METRICS[start:]
        )
        list_runs(run)


def test_a_folder_without_runs_says_so_and_a_missing_one_is_an_error(tmp_path, capsys, monkeypatch):
    assert "holds no run" in list_as_text(tmp_path, capsys, monkeypatch)
    with pytest.raises(UserError, match="there is no such folder"):
        list_runs(parse(["task=runs", f"run_dir={tmp_path}/nowhere"]))


def test_a_run_folder_itself_may_be_named(runs):
    assert [path.name for path in find_run_folders(runs / "a" / "one")] == ["one"]
    assert summarize_run(runs / "a" / "one", runs / "a" / "one").name == "one"


def test_a_setting_that_an_older_manifest_lacks_is_no_difference(runs, configs):
    file = runs / "a" / "one" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["config"]["stage"]["weight_decay"]
    file.write_text(json.dumps(manifest))
    summaries = [summarize_run(path, runs) for path in find_run_folders(runs)]
    assert "stage.weight_decay" not in find_differing_settings(summaries)


def test_headings_are_the_shortest_ends_that_tell_the_settings_apart():
    keys = ["seed", "stage.learning_rate", "stage.parts.projector.lora.rank", "stage.parts.language_model.lora.rank"]
    assert list(shorten_keys(keys).values()) == [
        "seed",
        "stage.learning_rate",
        "projector.lora.rank",
        "language_model.lora.rank",
    ]


def test_the_list_imports_no_torch(runs):
    code = (
        "import sys, run; run.dispatch(sys.argv[1:]);"
        "print(sorted({'torch', 'lightning', 'transformers', 'sacrebleu'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "task=runs", f"run_dir={runs}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "a/one" in done.stdout and done.stdout.splitlines()[-1] == "[]"
