"""The ready files of sweeps/: each key is a setting, each value is valid for it, each range has its reason."""

import json
from pathlib import Path

import pytest
import yaml

from lit_vlm.config.parse import parse
from lit_vlm.sweep.sweep_file import SearchMethod, read_sweep
from lit_vlm.sweep.validation import find_sweep_errors

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "sweeps").glob("*.yaml"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def file(request, monkeypatch) -> Path:
    monkeypatch.chdir(ROOT)
    return request.param


def test_there_is_a_file_for_each_tuning_task():
    assert {"align", "sft", "mixture", "highres", "dpo", "proxy", "tiny"} <= {file.stem for file in FILES}
    assert {read_sweep(file).method for file in FILES} == set(SearchMethod)


def test_every_key_of_a_sweep_is_a_key_of_the_schema_and_every_value_composes(file):
    sweep = read_sweep(file)
    assert find_sweep_errors(sweep, []) == []
    columns = {key: one.list_example_values() for key, one in sweep.search_space.items()}
    for row in range(max(map(len, columns.values()))):  # each value once
        values = {**sweep.fixed, **{key: column[row % len(column)] for key, column in columns.items()}}
        config = parse(["task=train", "logger.wandb=true", json.dumps(values, ensure_ascii=False)]).config
        for key, value in values.items():
            assert _holds_value(config, key, value), f"{key}={value}"


def _holds_value(config, key: str, value) -> bool:
    """Return whether the config holds the value; the choice of a group is checked by its contents."""
    if key in ("experiment", "data", "stage", "model", "trainer", "init_from"):
        return True
    found = config
    for name in key.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    return (Path(found) == ROOT / value) if key.endswith(".path") else found == value


def test_trials_are_started_and_compared_in_the_same_way_with_and_without_wandb(file):
    sweep = read_sweep(file)
    assert sweep.command == ["bash", "sweeps/launch.sh", "${args_json}"] and (ROOT / sweep.command[1]).is_file()
    assert (ROOT / sweep.program).is_file() and sweep.project == "lit_vlm" and sweep.name == file.stem
    assert sweep.fixed["logger.metric"] == sweep.metric.name
    if sweep.early_terminate:
        assert sweep.fixed["data.validation.every_steps"] > 0
    assert f"sweep=sweeps/{file.name}" in file.read_text(encoding="utf-8")


def test_every_range_has_its_reason_in_a_comment(file):
    text = file.read_text(encoding="utf-8")
    for key in read_sweep(file).search_space:
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {key}:")]
        reason = line.partition("#")[2].strip()
        assert len(reason) > 20, f"{file.name}: {key}"
    assert yaml.safe_load(text)["parameters"]
