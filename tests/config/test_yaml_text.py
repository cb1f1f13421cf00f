"""Tests of text settings: they stay as written in config files, in sweep files and on the command line."""

import pytest
import yaml

from lit_vlm.config import parse
from lit_vlm.config.yaml_reader import quote_text, read_yaml
from lit_vlm.sweep.sweep_file import read_sweep

# Numbers, booleans and dates of YAML 1.1, or of Hydra's command line
WORDS = (
    "1:30:00 2:15 190:20:30.15 2026-11-28 0x1F 0b101 012 08 1_000 1e3 1.5e+3 1e-5 1e400 .5 5. 1.0 +1 -0 12 on off On OFF yes no"
    " Yes NO true false True FALSE .inf .nan inf nan"
).split()
HEAD = "# @package _global_\ndefaults:\n  - override /stage: align\n  - override /data: builtin_align\n  - override /model: tiny\n"


def parse_config(tmp_path, text, group="experiment/my/1_x", *overrides):
    path = tmp_path / "mine" / f"{group}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return parse([f"--config-dir={tmp_path / 'mine'}", *(overrides or ["experiment=my/1_x"])]).config


def test_a_time_limit_like_1_30_00_stays_text(tmp_path):
    assert parse_config(tmp_path, HEAD + "submit: {time: 1:30:00}\n").submit.time == "1:30:00"


def test_text_in_a_file_stays_unchanged_also_in_lists_and_tables(tmp_path):
    lines = "".join(f"    V{place}: {word}\n" for place, word in enumerate(WORDS))
    text = HEAD + f"logger:\n  tags: [{', '.join(WORDS)}]\nsubmit:\n  env:\n{lines}"
    config = parse_config(tmp_path, text)
    assert config.logger.tags == WORDS
    assert list(config.submit.env.values()) == WORDS


@pytest.mark.parametrize("word", ["1:30:00", "on", "012"])
def test_text_of_a_source_and_its_mapping_stays_unchanged(word, tmp_path):
    text = f"mine:\n  path: x\n  format: mapped\n  prompts: [{word}]\n  mapping: {{answer: {word}, labels: {word}}}\n"
    overrides = ["experiment=tiny/1_align", "data/source@data.sources=[mine]", "task=prepare"]
    source = parse_config(tmp_path, text, "data/source/mine", *overrides).data.sources["mine"]
    assert (source.prompts, source.mapping.answer, source.mapping.labels) == ([word], word, word)


def test_a_plain_equals_sign_and_a_merge_sign_are_text_as_values(tmp_path):
    text = HEAD + "logger: {tags: [=, <<]}\nsubmit:\n  env: {L: =, M: <<, =: a}\n"
    config = parse_config(tmp_path, text)
    assert config.logger.tags == ["=", "<<"] and config.submit.env == {"L": "=", "M": "<<", "=": "a"}
    assert read_yaml("a: &x {t: =}\nb: {<<: *x}\n", lambda *_: False)["b"] == {"t": "="}


def test_keys_of_a_table_are_text(tmp_path):
    text = (
        HEAD
        + "submit: {env: {NO: yes, ON: 08, Y: n}}\ndata:\n  sources:\n    on: {format: builtin, path: caption, weight: 1.0}\n"
    )
    config = parse_config(tmp_path, text)
    assert config.submit.env == {"NO": "yes", "ON": "08", "Y": "n"} and "on" in config.data.sources


def test_enum_values_need_no_quotes(tmp_path):
    text = HEAD + "data:\n  sources:\n    a: {format: llava, path: a.json, weight: 1.0, markup: on}\n"
    assert parse_config(tmp_path, text).data.sources["a"].markup.value == "on"


def test_numbers_booleans_and_null_of_other_settings_keep_their_type(tmp_path):
    text = HEAD + (
        "run_name: null\nlogger: {wandb: no, group: ~}\ntrainer: {max_steps: 1_0, extra: {detect_anomaly: on, inference_mode: no}}\n"
        "stage: {learning_rate: 1e-3}\n"
    )
    config = parse_config(tmp_path, text)
    assert (config.run_name, config.logger.wandb, config.logger.group, config.trainer.max_steps) == (
        None,
        False,
        None,
        10,
    )
    assert (
        config.trainer.extra == {"detect_anomaly": True, "inference_mode": False} and config.stage.learning_rate == 1e-3
    )


def test_anchors_and_merged_tables_are_text_where_the_schema_expects_text(tmp_path):
    text = (
        HEAD
        + "submit:\n  env: &all {A: &a 1e3, B: on}\n  account: *a\nlogger: {tags: [*a]}\nstage: {min_learning_rate: 0.5}\n"
    )
    config = parse_config(tmp_path, text)
    assert (config.submit.env, config.submit.account, config.logger.tags) == ({"A": "1e3", "B": "on"}, "1e3", ["1e3"])
    merged = read_yaml("a: &x {t: on}\nb: {<<: *x, u: 1e3}\n", lambda keys, _: keys[-1] == "t")
    assert merged == {"a": {"t": "on"}, "b": {"t": "on", "u": "1e3"}}
    with pytest.raises(yaml.YAMLError, match="leads back into itself"):
        read_yaml("a: &x [*x]\n", lambda *_: True)


def test_text_on_the_command_line_stays_unchanged():
    overrides = [f"submit.env.V{place}={word}" for place, word in enumerate(WORDS)]
    config = parse(
        ["experiment=tiny/1_align", "logger.project=1e3", f"logger.tags=[{','.join(WORDS)}]", *overrides]
    ).config
    assert (config.logger.project, config.logger.tags, list(config.submit.env.values())) == ("1e3", WORDS, WORDS)


@pytest.mark.parametrize(
    ("typed", "quoted"),
    [
        ("run_name=1e3,2e3", "run_name='1e3','2e3'"),
        ("++submit.env={A:1e3,B:1:30,C: true}", "++submit.env={A:'1e3',B:1:30,C: 'true'}"),
        ("data.sources.a={path:1e3,weight:1e3}", "data.sources.a={path:'1e3',weight:1e3}"),
        ("run_name=null", "run_name=null"),
        ("run_name='1e3'", "run_name='1e3'"),
        ("stage.learning_rate=1e-3", "stage.learning_rate=1e-3"),
        ("stage.learning_rate=choice(1e-3,1e-2)", "stage.learning_rate=choice(1e-3,1e-2)"),
        ("trainer.extra.max_time=1e3", "trainer.extra.max_time=1e3"),
        ("~data.sources.a", "~data.sources.a"),
        ("run_name=", "run_name="),
    ],
)
def test_only_text_that_hydra_would_change_is_quoted(typed, quoted):
    assert quote_text(typed) == quoted


def test_text_in_a_sweep_file_stays_unchanged(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "method: grid\nname: 1:30\nparameters:\n  logger.project: {values: [on, 1e3, 1_000]}\n  model.revision: {value: 012}\n"
        "  logger:\n    parameters:\n      group: {value: 2026-11-28}\n  stage.warmup: {values: [1, 0.5]}\n  logger.wandb: {value: no}\n",
        encoding="utf-8",
    )
    sweep = read_sweep(path)
    assert sweep.name == "1:30" and sweep.search_space["logger.project"].values == ("on", "1e3", "1_000")
    assert sweep.fixed == {"model.revision": "012", "logger.group": "2026-11-28", "logger.wandb": False}
    assert sweep.search_space["stage.warmup"].values == (1, 0.5)
