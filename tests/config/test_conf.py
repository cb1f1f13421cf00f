"""Tests of the files in conf/: each composes, none repeats a default, and schemas are no choices."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from lit_vlm.config import parse
from lit_vlm.config.compose import CONF_DIR, list_choices, list_groups
from lit_vlm.config.key_validation import get_setting_type
from lit_vlm.config.schema import DPOStageConfig

FILES = sorted(path.relative_to(CONF_DIR).with_suffix("").as_posix() for path in CONF_DIR.rglob("*.yaml"))
NEEDS = {
    "data/llava_json": ["data.sources.mine.path=x"],
    "data/messages": ["data.sources.mine.path=x"],
    "data/preference": ["data.sources.mine.path=x", "stage=dpo"],
    "data/builtin_preference": ["stage=dpo"],
    "data/ready": ["data/source@data.sources=[mix665k]"],
    "data/mapped": ["data.sources.mine.path=x", "data.sources.mine.mapping.answer='{answer}'"],
    "data/preference_en": ["stage=dpo"],
    "data/preference_ko": ["data.sources.mine_ko.path=x", "stage=dpo"],
    "data/preference_ko_en": ["data.sources.mine_ko.path=x", "stage=dpo"],
    "data/source/rlaif_v": ["stage=dpo"],
    "stage/dpo": ["data=builtin_preference"],
    "stage/mpo": ["data=builtin_preference"],
    "experiment/lora/1_sft": ["data.sources.mine.path=x"],
    "experiment/varco_vision_14b/4_dpo": ["data.sources.mine.path=x"],
}


def build_overrides(name: str) -> list[str]:
    """Return the overrides that choose one file."""
    if name == "config":
        return ["task=train"]
    if name.startswith("experiment/"):
        return [f"experiment={name.removeprefix('experiment/')}"]
    group, _, choice = name.rpartition("/")
    return ["task=train", f"data/source@data.sources=[{choice}]" if group == "data/source" else f"{group}={choice}"]


@pytest.mark.parametrize("name", FILES)
def test_every_file_composes(name):
    parse([*build_overrides(name), *NEEDS.get(name, [])])


def test_the_groups_and_choices_are_those_of_the_command_line():
    assert list_groups() == ["data", "data/source", "experiment", "logger", "model", "stage", "trainer"]
    assert list_choices("stage") == ["align", "dpo", "highres", "mpo", "sft"]


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("experiment/")])
def test_experiments_begin_with_their_package(name):
    assert (CONF_DIR / f"{name}.yaml").read_text(encoding="utf-8").startswith("# @package _global_\n")


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(("stage/", "experiment/varco"))])
def test_every_number_of_a_recipe_carries_its_source(name):
    lines = (CONF_DIR / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if re.fullmatch(r"\s*\w+: [\d.e+-]+", line)] == []


@pytest.mark.parametrize(
    "name", [name for name in FILES if name.startswith(("model/", "stage/", "trainer/", "logger/"))]
)
def test_a_file_repeats_no_default(name):
    group = name.partition("/")[0]
    hint = get_setting_type(group, DPOStageConfig)
    defaults = asdict(hint())
    content = yaml.safe_load((CONF_DIR / f"{name}.yaml").read_text(encoding="utf-8")) or {}
    restated = {key for key, value in content.items() if key != "defaults" and defaults[key] == value}
    assert restated <= {"precision"}  # set for every machine, so that the reader can compare


def test_shipped_paths_are_below_the_working_folder():
    for path in (CONF_DIR / "data" / "source").glob("*.yaml"):
        for source in yaml.safe_load(path.read_text(encoding="utf-8")).values():
            assert Path(source["path"]).parts[0] == "data"
