"""Tests of the files in conf/: each composes, none repeats a default, and schemas are no choices."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import OmegaConf

from lit_vlm.config import parse
from lit_vlm.config.compose import (
    CONF_DIR,
    VERSION_BASE,
    _compose_cached,
    _select_files,
    compose_config,
    list_choices,
    list_groups,
    register_schema,
)
from lit_vlm.config.key_validation import get_setting_type
from lit_vlm.config.settings import get_stage_config_class

FILES = sorted(path.relative_to(CONF_DIR).with_suffix("").as_posix() for path in CONF_DIR.rglob("*.yaml"))
NEEDS = {
    "data/auto": ["data.sources.mine.path=x"],
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
    "stage/represent": ["stage.text_encoder=tiny"],
    "stage/generate": ["init_from=owner/blip2"],
    "stage/blip_caption": ["init_from=owner/blip"],
    "stage/blip_retrieval": ["init_from=owner/blip", "stage.queue_size=1280"],
    "experiment/blip/2_caption": ["data.sources.mine.path=x"],
    "experiment/blip/2_retrieval": ["data.sources.mine.path=x"],
    "stage/blip_pretrain": ["stage.text_encoder=tiny", "stage.queue_size=1280"],
    "stage/mpo": ["data=builtin_preference"],
    "stage/rpo": ["data=builtin_preference"],
    "experiment/lora/1_sft": ["data.sources.mine.path=x"],
    "experiment/varco_vision_14b/4_dpo": ["data.sources.mine.path=x"],
}


# Files whose numbers come from a publication, or say that there is none
SOURCED = ("stage/", *(f"experiment/{name}" for name in ("varco", "llava", "kollava", "aiku", "blip")))


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
    assert list_choices("stage") == [
        "align",
        "blip_caption",
        "blip_pretrain",
        "blip_retrieval",
        "dpo",
        "generate",
        "highres",
        "mpo",
        "represent",
        "rpo",
        "sft",
    ]


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("experiment/")])
def test_experiments_begin_with_their_package(name):
    assert (CONF_DIR / f"{name}.yaml").read_text(encoding="utf-8").startswith("# @package _global_\n")


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(SOURCED)])
def test_every_number_of_a_recipe_carries_its_source(name):
    lines = (CONF_DIR / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if re.fullmatch(r"\s*\w+: [\d.e+-]+", line)] == []


@pytest.mark.parametrize(
    "name", [name for name in FILES if name.startswith(("model/", "stage/", "trainer/", "logger/"))]
)
def test_a_file_repeats_no_default(name):
    group = name.partition("/")[0]
    content = yaml.safe_load((CONF_DIR / f"{name}.yaml").read_text(encoding="utf-8")) or {}
    hint = get_setting_type(group, get_stage_config_class(content.get("name", "dpo")))
    defaults = asdict(hint())
    restated = {key for key, value in content.items() if key != "defaults" and defaults[key] == value}
    assert restated <= {"precision"}  # set for every machine, so that the reader can compare


def test_shipped_paths_are_below_the_working_folder():
    for path in (CONF_DIR / "data" / "source").glob("*.yaml"):
        for source in yaml.safe_load(path.read_text(encoding="utf-8")).values():
            assert Path(source["path"]).parts[0] == "data"


# Composition


@pytest.mark.parametrize(
    "overrides",
    [
        ["task=train", "experiment=tiny/2_sft", "trainer.max_steps=50", "stage.adam_betas=[0.9,0.95]"],
        ["experiment=tiny/4_dpo", "++trainer.extra.detect_anomaly=true", "stage.beta=1", "hydra.sweep.dir=elsewhere"],
        ["data/source@data.sources=[kollava_instruct]", "data=builtin_align", "~data.sources.caption_ko"],
        ["data={max_length: 4}", "data.max_length=8", "stage={learning_rate: 1}"],
    ],
)
def test_a_config_is_what_hydra_composes(overrides):
    composed = compose_config(overrides)
    register_schema()
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base=VERSION_BASE):
        by_hydra = compose("config", overrides=overrides)
    assert composed == by_hydra and OmegaConf.to_yaml(composed) == OmegaConf.to_yaml(by_hydra)
    assert OmegaConf.to_object(composed) == OmegaConf.to_object(by_hydra)


@pytest.mark.parametrize(
    ("overrides", "num_compositions"),
    [
        (["experiment=tiny/1_align", "trainer.max_steps=5", "seed=3"], 1),
        (["experiment=tiny/4_dpo", "trainer.max_steps=5", "init_from=null"], 1),
        (["experiment=tiny/4_dpo", "trainer.max_steps=5"], 2),  # and the stage before, whose folder is needed
    ],
)
def test_parsing_composes_the_files_of_a_stage_once(monkeypatch, overrides, num_compositions):
    _compose_cached.cache_clear()
    _select_files.cache_clear()
    composed, compose_files = [], ConfigLoaderImpl._compose_config_from_defaults_list

    def compose_and_count(*arguments, **options):
        composed.append(options)
        return compose_files(*arguments, **options)

    monkeypatch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", compose_and_count)
    parse(overrides)
    assert len(composed) == num_compositions


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "data" / "own.yaml"
    path.parent.mkdir()
    for number in (7, 11):
        path.write_text(f"sources:\n  a: {{format: builtin, path: caption, num_samples: {number}}}\n")
        run = parse([f"--config-dir={tmp_path}", "experiment=tiny/1_align", "data=own"])
        assert run.config.data.sources["a"].num_samples == number
