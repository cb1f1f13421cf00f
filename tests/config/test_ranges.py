"""Tests of the ranges: each number of the schema declares its range, which is checked for all tasks."""

import copy
import functools
import math
import typing
from dataclasses import fields, is_dataclass

import pytest

from lit_vlm.config import ConfigError, parse
from lit_vlm.config.help import format_help
from lit_vlm.config.ranges import MAX_COUNT, NumberRange, find_range_errors
from lit_vlm.config.settings import list_settings
from lit_vlm.config.tasks import find_config_errors

NUMBERS = (int, float)


def collect_errors(*overrides):
    with pytest.raises(ConfigError) as error:
        parse(list(overrides))
    return error.value.errors


def list_leaf_types(hint):
    """Return the types that a setting can hold, including those inside lists and tables."""
    found = [leaf for part in typing.get_args(hint) for leaf in list_leaf_types(part)]
    return found or [hint]


def list_number_settings():
    return [row for row in list_settings() if {int, float} & set(list_leaf_types(row.type))]


STAGES = {  # experiments that together have all settings of a stage
    "tiny/4_dpo": ["task=prepare"],
    "tiny_blip2/1_represent": ["task=preflight"],
    "tiny_blip/2_caption": ["task=preflight"],
    "tiny_blip/2_retrieval": ["task=preflight"],
}


@functools.cache
def parse_stage(experiment: str):
    return parse([f"experiment={experiment}", *STAGES[experiment]]).config


@pytest.fixture
def config(request):
    """Config of the first stage that has the setting of the test, if it has one."""
    row = getattr(request.node, "callspec", None) and request.node.callspec.params.get("row")
    group, _, name = row.key.partition(".") if row else ("", "", "")
    configs = [parse_stage(experiment) for experiment in STAGES]
    return next(one for one in configs if group != "stage" or hasattr(one.stage, name.partition(".")[0]))


def set_value(config, row, value):
    """Return a copy of the config with `value` in the setting `row`, and the full key of the value."""
    config = copy.deepcopy(config)
    group, key = config, []
    *path, last = row.key.split(".")
    if row.key.startswith("data.validation.sources"):
        config.data.validation.sources = copy.deepcopy(config.data.sources)
    for part in path:
        part = next(iter(group)) if part == "<name>" else part
        group = group[part] if isinstance(group, dict) else getattr(group, part)
        key.append(part)
    origin = typing.get_origin(next((one for one in typing.get_args(row.type) if typing.get_origin(one)), row.type))
    inside = {list: [value], tuple: (value, 0.5), dict: {"ocr": value}}.get(origin, value)
    setattr(group, last, inside)
    return config, ".".join([*key, last]) + {list: "[0]", tuple: "[0]", dict: ".ocr"}.get(origin, "")


def iter_outside(row):
    """Yield the nearest values outside the range, and NaN and infinity."""
    r, whole = row.range, int in list_leaf_types(row.type)
    if whole:
        yield int(r.low) if r.excludes_low else int(r.low) - 1
        yield int(r.high) + 1
        return
    yield r.low if r.excludes_low else math.nextafter(r.low, -math.inf)
    if math.isfinite(r.high):
        yield r.high if r.excludes_high else math.nextafter(r.high, math.inf)
    yield from (math.nan, math.inf, -math.inf)


def iter_bounds(row):
    r, whole = row.range, int in list_leaf_types(row.type)
    if whole:
        yield from (int(r.low) + r.excludes_low, int(r.high))
        return
    yield math.nextafter(r.low, math.inf) if r.excludes_low else r.low
    if math.isfinite(r.high):
        yield math.nextafter(r.high, -math.inf) if r.excludes_high else r.high


def test_every_number_of_the_schema_has_a_range_and_nothing_else_has():
    assert len(list_number_settings()) > 60
    assert [row.key for row in list_settings() if (row.range is not None) != (row in list_number_settings())] == []


@pytest.mark.parametrize("row", list_number_settings(), ids=lambda row: row.key)
def test_a_value_outside_its_range_is_refused_with_key_value_and_range(row, config):
    for value in iter_outside(row):
        changed, key = set_value(config, row, value)
        assert f"{key}: must be {row.range}, found {value}." in find_config_errors(changed)


@pytest.mark.parametrize("row", list_number_settings(), ids=lambda row: row.key)
def test_the_bounds_of_a_range_are_accepted(row, config):
    for value in iter_bounds(row):
        assert list(find_range_errors(set_value(config, row, value)[0])) == []


def test_every_default_lies_within_its_range():
    def walk_fields(owner):
        for one in fields(owner):
            value = getattr(owner, one.name)
            if is_dataclass(value):
                yield from walk_fields(value)
            elif (r := one.metadata.get("range")) and isinstance(value, NUMBERS):
                yield one.name, r.contains(value)

    assert all(holds for _, holds in walk_fields(parse(["experiment=tiny/4_dpo"]).config))


def test_help_shows_the_range_after_the_type():
    text = format_help(["settings"])
    assert "  trainer.timeout_minutes   a number (above 0 and at most 527040); default 30.0" in text
    assert "  stage.beta   a number (above 0); default 0.1" in text
    assert "  data.validation.fraction   a number (from 0 to below 1); default 0.01" in text


@pytest.mark.parametrize(
    ("range_", "text"),
    [
        (NumberRange(0, MAX_COUNT, excludes_low=True), "above 0"),
        (NumberRange(0), "0 or above"),
        (NumberRange(0, 2**32 - 1), "from 0 up to 4294967295"),
        (NumberRange(0, 1, excludes_low=True), "above 0 and at most 1"),
        (NumberRange(0, 0.5, excludes_high=True), "from 0 to below 0.5"),
        (NumberRange(0, 3, True, True), "above 0 and below 3"),
    ],
)
def test_a_range_reads_as_a_sentence(range_, text):
    assert str(range_) == text


@pytest.mark.parametrize(
    "override",
    [
        "trainer.timeout_minutes=0",
        "guard.heartbeat_seconds=nan",
        "guard.heartbeat_seconds=1e-4",
        "stage.learning_rate=1e300",
        "stage.learning_rate=inf",
        "seed=-1",
        "seed=4294967296",
        "stage.adam_betas=[0.9,1.0]",
        "data.num_workers=-1",
        "checkpoint.every_minutes=1e12",
    ],
)
def test_values_that_no_run_can_use_are_refused_on_the_command_line(override):
    (found,) = collect_errors("experiment=tiny/2_sft", override)
    assert found.startswith(override.partition("=")[0]) and "must be" in found and "found" in found


@pytest.mark.parametrize("task", ["prefer", "chat", "train", "submit"])
def test_ranges_hold_for_every_task(task):
    overrides = ["init_from=x"] if task in ("prefer", "chat") else ["experiment=tiny/2_sft"]
    assert any("seed: must be" in found for found in collect_errors(f"task={task}", *overrides, "seed=-1"))


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "/x",
        "",
        " ",
        "a//b",
        "a/",
        "./a",
        "a/../b",
        "~/x",
        "C:\\x",
        "\\\\host\\x",
        "a\nb",
        "a\x1b[31m",
        "a\u202eb",
    ]
    + ["x" * 256, "a /b", "index", "index/x", "c:/x", "tiny/1_align/hf", "b/checkpoints", "a/wandb/b", "a/samples"],
)
def test_a_run_name_outside_run_dir_or_without_a_valid_folder_name_is_refused(name, config):
    changed = copy.deepcopy(config)
    changed.run_name = name
    (found,) = find_config_errors(changed)
    assert found.startswith("run_name: ") and repr(name) in found and "below run_dir" in found


@pytest.mark.parametrize(
    "name",
    ["a", "tiny/2_sft", "sweeps/tiny/3", "실험-1", "a b", "v1.0", "..a", "a..b", "1:30:00", "on", "x" * 255]
    + ["a:b", "hf", "samples/a", "a/hf2"],
)
def test_ordinary_run_names_are_accepted(name, config):
    changed = copy.deepcopy(config)
    changed.run_name = name
    assert find_config_errors(changed) == []
