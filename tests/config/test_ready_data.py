"""Tests of the named sets and ready mixtures of conf/data: complete, composable, and open to overrides."""

import re

import pytest
import yaml
from omegaconf import OmegaConf

from lit_vlm.config import parse
from lit_vlm.config.choices import Format
from lit_vlm.config.compose import CONF_DIR, compose_config
from lit_vlm.config.mapping import MappingConfig, find_mapping_errors
from lit_vlm.config.overrides import ConfigError
from lit_vlm.config.settings import KEY_ALIASES, list_settings

STAGES = {"align": "tiny/1_align", "sft": "tiny/2_sft", "highres": "tiny/3_highres", "preference": "tiny/4_dpo"}
MIXTURES = [f"{stage}_{languages}" for stage in STAGES for languages in ("ko", "en", "ko_en")]
SETS = sorted(path.stem for path in (CONF_DIR / "data" / "source").glob("*.yaml"))
COUNTS = {
    "lcs_558k": 558_128,
    "llava_cc3m_595k": 595_375,
    "kollava_cc3m_595k": 595_375,
    "mix665k": 665_298,
    "rlaif_v": 82_300,
}


def parse_sources(mixture, *overrides):
    stage = mixture.split("_")[0]
    own_path = [f"data.sources.mine_ko.path={CONF_DIR}"] if mixture in ("preference_ko", "preference_ko_en") else []
    return parse([f"experiment={STAGES[stage]}", f"data={mixture}", *own_path, *overrides]).config.data.sources


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_ready_mixture_composes_for_its_stage(mixture):
    found = parse_sources(mixture)
    languages = set(mixture.split("_")[1:])
    assert {source.language.name for source in found.values()} == languages
    weights = [source.weight for source in found.values()]
    assert all(weight is None for weight in weights) or sum(weights) == pytest.approx(1.0)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_mixture_consists_of_named_sets_and_states_the_origin_of_its_weights(mixture):
    text = (CONF_DIR / "data" / f"{mixture}.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    named = [entry.split("@")[0].removeprefix("source/") for entry in content.get("defaults", []) if entry != "_self_"]
    assert set(named) <= set(SETS)
    assert all("path" not in source for source in content.get("sources", {}).values())
    assert re.search(r"[Ww]eights: ours|[Nn]o weights|No public set", text.replace("\n# ", " "))


def test_mixtures_in_both_languages_are_half_korean():
    for mixture in ("sft_ko_en", "highres_ko_en", "preference_ko_en"):
        found = parse_sources(mixture).values()
        assert sum(source.weight for source in found if source.language.name == "ko") == pytest.approx(0.5)


@pytest.mark.parametrize("name", SETS)
def test_a_named_set_documents_licence_source_and_size(name):
    composed_source = compose_config(["task=train", "data=ready", f"data/source@data.sources=[{name}]"]).data.sources[
        name
    ]
    source = OmegaConf.to_object(composed_source)
    assert source.licence and source.obtain and source.homepage
    assert re.fullmatch(r"https://(huggingface\.co/datasets|aihub\.or\.kr)/\S+", source.homepage)
    assert source.expected_records == COUNTS.get(name)
    text = (CONF_DIR / "data" / "source" / f"{name}.yaml").read_text(encoding="utf-8")
    assert source.expected_records or re.search(r"expected_records: null  # .*not verified", text)
    assert source.format is not Format.mapped or not list(find_mapping_errors(name, source.mapping))


def test_sets_without_public_structure_are_marked_and_in_no_mixture():
    hidden = [
        name
        for name in SETS
        if "Structure not public" in (CONF_DIR / "data" / "source" / f"{name}.yaml").read_text(encoding="utf-8")
    ]
    assert hidden == ["aihub_71711_gqa", "aihub_71730_ocr"]
    assert not {name for mixture in MIXTURES for name in parse_sources(mixture)} & set(hidden)


def test_the_command_line_changes_a_ready_mixture():
    overrides = [
        "data.sources.mix665k.weight=2",
        "data.sources.kollava_instruct.image_root=/photos",
        "data.sources.aihub_144_objects.mapping.text=thing",
        "~data.sources.aihub_79_food",
    ]
    config = parse(["experiment=varco_vision_14b/2_sft", "data=sft_ko_en", *overrides]).config
    found = config.data.sources
    assert found["mix665k"].weight == 2 and found["kollava_instruct"].image_root == "/photos"
    assert found["aihub_144_objects"].mapping.text == "thing" and "aihub_79_food" not in found
    assert found["aihub_81_glyphs"].path.startswith("/")


def test_a_named_set_can_be_added_to_a_mixture():
    overrides = ["data/source@data.sources=[aihub_71730_ocr]", "data.sources.aihub_71730_ocr.weight=0.1"]
    assert "aihub_71730_ocr" in parse_sources("sft_ko", *overrides)


MINE = "data.sources.mine"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=mapped", f"{MINE}.mapping.anwser=x"], f"Did you mean {MINE}.mapping.answer?"),
        (["data=mapped", f"{MINE}.mapping.answer=x", f"{MINE}.mapping.task=orc"], "Did you mean ocr?"),
        (["data=mapped", f"{MINE}.mapping.answer='{{@fodler}}'"], "Did you mean {@folder}?"),
        (["data=mapped"], f"{MINE}.mapping.answer is not set"),
        (["data=mapped", f"{MINE}.mapping.answer=x", f"{MINE}.markup='on'"], f"{MINE}.markup: format=mapped takes"),
        (
            ["data=llava_json", f"{MINE}.mapping.answer=x"],
            f"{MINE}.mapping is null, and a command line cannot begin it",
        ),
        (["data=llava_json", f"{MINE}.format=mapped"], f"{MINE}.mapping is not set"),
        (["data=mapped", f"{MINE}.format=llava", f"{MINE}.mapping.answer=x"], "is read with format=mapped only"),
    ],
)
def test_errors_in_a_mapping_are_reported(overrides, message):
    with pytest.raises(ConfigError) as caught:
        parse(["task=train", f"{MINE}.path=x", *overrides])
    assert message in str(caught.value)


def test_a_mapping_can_be_set_in_a_user_file_and_on_the_command_line(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "own.yaml").write_text(
        "sources:\n  own:\n    path: x\n    format: mapped\n    mapping: {answer: '{a.b}', image: '{f}'}\n",
        "utf-8",
    )
    overrides = [
        "task=train",
        f"--config-dir={tmp_path}",
        "data=own",
        "data.sources.own.mapping.questions=['{q}','뭐?']",
    ]
    mapping = parse(overrides).config.data.sources["own"].mapping
    assert mapping == MappingConfig(answer="{a.b}", image="{f}", questions=["{q}", "뭐?"])
    (tmp_path / "data" / "own.yaml").write_text(
        "sources:\n  own:\n    path: x\n    format: mapped\n    mapping:\n      labls: '*.json'\n      answer: a\n",
        "utf-8",
    )
    with pytest.raises(ConfigError, match=r"own\.yaml:6: unknown setting .*mapping\.labls\. Did you mean .*labels\?"):
        parse(["task=train", f"--config-dir={tmp_path}", "data=own"])


def test_every_field_of_a_mapping_is_in_the_list_of_settings():
    rows = {row.key: row for row in list_settings()}
    for name in MappingConfig.__dataclass_fields__:
        row = rows[f"data.sources.<name>.mapping.{name}"]
        assert row.comment or name in ("box_format", "box_unit")
    assert not any("mapping" in key for key in KEY_ALIASES.values())
