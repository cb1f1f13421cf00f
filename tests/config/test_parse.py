"""Tests of `parse`: overrides become a typed Run, and all errors are reported together, by name."""

import ast
import inspect
import json
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from lit_vlm.config import ConfigError, build_stage_overrides, list_stages, parse
from lit_vlm.config.choices import StageName, Task
from lit_vlm.config.overrides import parse_override, quote_value
from lit_vlm.config.schema import DPOStageConfig
from lit_vlm.config.validation import list_trainer_arguments
from lit_vlm.losses.loss_types import PREFERENCE_LOSSES
from lit_vlm.types import UserError


def collect_errors(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        parse(list(overrides))
    return error.value.errors


def write_user_folder(tmp_path: Path, **files: str) -> str:
    """Write a user's config folder and return the override that adds it to conf/."""
    for name, text in files.items():
        path = tmp_path / "mine" / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return f"--config-dir={tmp_path / 'mine'}"


# The parsed run


def test_no_overrides_run_the_tiny_pipeline():
    run = parse([])
    assert (run.config.task, run.config.recipe, run.name, run.overrides) == (Task.pipeline, "tiny", "tiny", [])


def test_an_experiment_implies_train_unless_a_task_is_named():
    assert parse(["experiment=tiny/1_align"]).config.task is Task.train
    assert parse(["experiment=tiny/1_align", "task=chat"]).config.task is Task.chat


def test_the_config_is_plain_typed_python():
    config = parse(["experiment=tiny/4_dpo", "trainer.extra.max_time='00:01:00:00'"]).config
    assert type(config.stage) is DPOStageConfig and config.stage.name is StageName.dpo
    assert type(config.stage.trainable) is list and type(config.stage.adam_betas) is tuple
    assert type(config.data.sources) is dict and all(is_dataclass(source) for source in config.data.sources.values())
    assert config.trainer.extra == {"max_time": "00:01:00:00"}


def test_paths_are_absolute_from_the_current_folder(tmp_path):
    run = parse(["experiment=tiny/2_sft", "data=llava_json", "data.sources.mine.path=my.json", "init_from=./model"])
    assert run.config.data.sources["mine"].path == str(tmp_path / "my.json")
    assert run.init_from == str(tmp_path / "model")
    assert run.dir == tmp_path / "runs" / run.name
    assert (
        parse(["experiment=tiny/2_sft", "init_from=NCSOFT/VARCO-VISION-14B-HF"]).init_from
        == "NCSOFT/VARCO-VISION-14B-HF"
    )
    assert parse(["experiment=tiny/1_align"]).config.data.sources["caption_ko"].path == "caption"


def test_named_sources_replace_the_default_data_unless_data_is_named():
    run = parse(["experiment=tiny/2_sft", "data/source@data.sources=[kollava_instruct,mix665k]"])
    assert list(run.config.data.sources) == ["kollava_instruct", "mix665k"]


def test_hangul_lists_and_null_survive_a_json_argument():
    settings = {"experiment": "tiny/2_sft", "prompt": "이 그림은, '무엇'인가요?", "data.validation.every_steps": None}
    settings |= {"callbacks": ["guard", "report"], "stage": {"learning_rate": 1e-5}, "run_name": "null"}
    config = parse([json.dumps(settings, ensure_ascii=False)]).config
    assert (
        config.prompt == settings["prompt"] and config.run_name == "null" and config.data.validation.every_steps is None
    )
    assert config.callbacks == ["guard", "report"] and config.stage.learning_rate == 1e-5


@pytest.mark.parametrize(
    "value",
    ["a,b", "한국어 지시문", "it's", "a\\", "{x}", "", "1", "true", 1.5e-7, -3, [None, "가", [1]], {"a": "b c"}],
)
def test_quoted_values_are_read_back_unchanged(value):
    assert parse_override(f"key={quote_value(value)}").value() == value


def test_hangul_needs_no_extra_quotes():
    run = parse(
        ["experiment=tiny/2_sft", "data=llava_json", "data.sources.mine.path=자료/학습.json", "prompt=이게 뭐야?"]
    )
    assert run.config.data.sources["mine"].path.endswith("/자료/학습.json") and run.config.prompt == "이게 뭐야?"


# Keys


@pytest.mark.parametrize(
    ("typo", "suggestion"),
    [
        ("stage.lerning_rate=1", "stage.learning_rate"),
        ("+stage.lerning_rate=1", "stage.learning_rate"),
        ("++trainer.max_epoch=1", "trainer.max_epochs"),
        ("learning_rate=1", "stage.learning_rate"),
        ("lr=1", "stage.learning_rate"),
        ("stage.parts.projektor.warmup=1", "stage.parts.projector.warmup"),
        ("data.sources.word_ko.wieght=1", "data.sources.word_ko.weight"),
        ("data.sources.wrd_ko.weight=1", "word_ko"),
        ("modle=tiny", "model"),
    ],
)
def test_a_typo_on_the_command_line_is_refused_with_the_nearest_key(typo, suggestion):
    assert collect_errors("experiment=tiny/2_sft", typo)[0].split("Did you mean ")[1].startswith(suggestion)


def test_a_typo_in_a_file_is_refused_with_its_file_and_line(tmp_path):
    text = "# @package _global_\ntrainer:\n  max_steps: 5\n  max_epoch: 99\nstage:\n  learning_rate: high\n"
    overrides = [write_user_folder(tmp_path, experiment__mine__1_align=text), "experiment=mine/1_align"]
    epoch, rate = collect_errors(*overrides)
    assert (
        epoch
        == "mine/experiment/mine/1_align.yaml:4: unknown setting trainer.max_epoch. Did you mean trainer.max_epochs?"
    )
    assert rate == "mine/experiment/mine/1_align.yaml:6: stage.learning_rate: expected a number, found 'high'."


def test_an_experiment_file_without_its_package_line_is_refused(tmp_path):
    overrides = [write_user_folder(tmp_path, experiment__mine__1_align="seed: 1\n"), "experiment=mine/1_align"]
    assert "# @package _global_" in collect_errors(*overrides)[0]


def test_a_mixture_can_be_a_user_file(tmp_path):
    text = "sources:\n  a: {path: a.json, weight: 1}\n  b: {path: b.json, weight: 3, language: ko}\n"
    run = parse(
        [write_user_folder(tmp_path, data__mix=text), "experiment=tiny/2_sft", "data=mix", "data.sources.b.weight=2"]
    )
    assert {name: source.weight for name, source in run.config.data.sources.items()} == {"a": 1.0, "b": 2.0}
    assert "added by a file" in collect_errors("experiment=tiny/2_sft", "+data.sources.new.path=x")[0]


def test_a_setting_of_another_stage_is_reported_as_such():
    assert "is a setting of stage=dpo" in collect_errors("experiment=tiny/2_sft", "stage.beta=0.3")[0]


def test_a_source_can_be_removed():
    run = parse(["experiment=tiny/1_align", "~data.sources.caption_en"])
    assert (
        list(run.config.data.sources) == ["caption_ko", "image_only_ko", "image_only_en"] and run.name != "tiny/1_align"
    )


# Types and choices


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=x", "expected a whole number, found 'x'"),
        ("seed=1.5", "expected a whole number, found 1.5"),
        ("stage.learning_rate=high", "expected a number, found 'high'"),
        ("trainer.deterministic=2", "expected true or false, found 2"),
        ("overwrite=yes", "expected true or false, found 'yes'"),
        ("callbacks=report", "expected a list, found 'report'"),
        ("stage.trainable=[projektor]", "Did you mean projector?"),
        ("data.on_bad_record=skip", "expected one of quarantine, stop, found 'skip'"),
        ("debug=quick", "expected one of fast, overfit, profile or null, found 'quick'"),
        ("run_name=${foo}", "Interpolation key 'foo' not found"),
        ("model.vision_tower=???", "is not set: SigLIP"),
        ("data=3", "there are align_en, align_ko"),
    ],
)
def test_a_wrong_type_names_what_was_expected_and_what_was_found(override, expected):
    (message,) = collect_errors("experiment=tiny/2_sft", override)
    assert expected in message


def test_an_unknown_choice_lists_the_choices():
    (message,) = collect_errors("task=train", "stage=algin")
    assert (
        message
        == "stage=algin: there is no such choice; there are align, blip_caption, blip_pretrain, blip_retrieval, dpo, generate, highres, mpo, "
        "represent, rpo, sft. Did you mean align?"
    )
    assert (
        "a recipe" in collect_errors("experiment=tiny")[0]
        and "tiny, tiny_blip, tiny_blip2, varco_vision_14b" in collect_errors("recipe=tny")[0]
    )


def test_all_errors_are_reported_together():
    overrides = [
        "model=tny",
        "stage.lerning_rate=1",
        "seed=x",
        "data.global_batch_size=0",
        "+foo=1",
        "trainer.precision=bf16",
    ]
    found = collect_errors("experiment=tiny/2_sft", *overrides)
    assert len(found) == len(overrides)
    with pytest.raises(UserError, match="^6 mistakes in the configuration:\n- model=tny"):
        parse(["experiment=tiny/2_sft", *overrides])


def test_overrides_that_are_no_settings_are_reported_together():
    train, dashes = collect_errors("train", "--stage.learning_rate=1")
    assert "task=train" in train and "without dashes: stage.learning_rate=1" in dashes


def test_a_comma_without_multirun_is_refused():
    assert "needs -m" in collect_errors("experiment=tiny/2_sft", "seed=1,2")[0]


# Contradictions


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["data=llava_json"], "data.sources.mine.path is not set"),
        (["data=ready"], "data.sources: is empty"),
        (["stage.learning_rate=0"], "stage.learning_rate: must be above 0"),
        (["stage.warmup=-1"], "stage.warmup: must be 0 or above"),
        (["data.max_quarantined=2"], "data.max_quarantined: must be within 0 and 1, found 2"),
        (["data.sources.word_ko.weight=null"], "word_ko has no weight and the others do"),
        (["data.sources.word_ko.weight=-1"], "data.sources.word_ko.weight: must be 0 or above"),
        (["data=messages", "data.sources.mine.path=x", "data.sources.mine.kind=ocrr"], "Did you mean ocr?"),
        (["stage.trainable=[]"], "stage.trainable: is empty"),
        (["stage.trainable=[projector]", "stage.parts.language_model.lora.rank=8"], "language_model does not train"),
        (
            ["trainer.strategy=hsdp", "trainer.devices=8", "trainer.shard_size=3"],
            "trainer.shard_size: 8 devices cannot be divided into groups of 3; groups may be of 2, 4",
        ),
        (
            ["trainer.strategy=fsdp2", "trainer.precision=16-mixed"],
            "trainer.precision: fsdp2 computes in 32-true, bf16-mixed, bf16-true",
        ),
        (["trainer.extra.max_steps=3"], "is a setting of its own, trainer.max_steps"),
        (["trainer.extra.accumulate_grad_batches=3"], "follows from data.global_batch_size"),
        (["trainer.extra.max_tme=3"], "Did you mean max_time?"),
        (["trainer.precision=bf16"], "Did you mean bf16-mixed?"),
        (["callbacks=[reprt]"], "Did you mean report?"),
        (["data=preference", "data.sources.mine.path=x"], "preference pairs, which stage=sft cannot use"),
    ],
)
def test_a_contradiction_is_reported_before_anything_is_built(overrides, part):
    (message,) = collect_errors("experiment=tiny/2_sft", *overrides)
    assert part in message


def test_dpo_needs_pairs_and_one_weight_per_loss():
    found = collect_errors(
        "experiment=tiny/4_dpo",
        "data=builtin_sft",
        "stage.loss_type=[sigmod,sft]",
        "stage.loss_weights=[1]",
        "stage.beta=0",
    )
    assert [message.partition(":")[0] for message in found] == [
        "stage.beta",
        "stage.loss_type",
        "stage.loss_weights",
        "data.sources",
    ]


def test_a_user_callback_is_an_import_path():
    assert parse(["experiment=tiny/1_align", "callbacks=[my_package.Mine]"]).config.callbacks == ["my_package.Mine"]


def test_the_trainer_arguments_are_those_of_lightnings_signature():
    from lightning import Trainer

    assert list_trainer_arguments() == tuple(inspect.signature(Trainer.__init__).parameters)[1:]


def test_the_losses_are_those_of_trl():
    import importlib.util

    source = (Path(importlib.util.find_spec("trl").origin).parent / "trainer" / "dpo_config.py").read_text(
        encoding="utf-8"
    )
    document = next(ast.get_docstring(node) for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    assert [name for name, loss in PREFERENCE_LOSSES.items() if not loss.compute and f"'{name}'" not in document] == []


# Names


def test_the_run_name_is_the_experiment_when_nothing_is_overridden():
    assert parse(["experiment=tiny/2_sft"]).name == "tiny/2_sft"
    assert parse(["task=train", "stage=align", "data=builtin_align"]).name.startswith("train/align-")
    assert parse(["task=train", "stage=sft"]).name == "train/sft"


def test_the_run_name_does_not_depend_on_the_machine():
    overrides = [
        "trainer=gpu",
        "trainer.devices=8",
        "trainer.strategy=ddp",
        "trainer.precision=32-true",
        "logger=wandb",
    ]
    overrides += [
        "data.tokens_per_micro_batch=4096",
        "data.num_workers=0",
        "run_dir=/elsewhere",
        "overwrite=true",
        "callbacks=[guard]",
        "stage.activation_checkpointing=selective",
    ]
    assert parse(["experiment=tiny/2_sft", *overrides]).name == "tiny/2_sft"


@pytest.mark.parametrize(
    ("typed", "level"), [("true", "full"), ("False", "none"), ("selective", "selective"), ("auto", "auto")]
)
def test_activation_checkpointing_accepts_the_former_true_and_false(typed, level):
    run = parse(["experiment=tiny/2_sft", f"stage.activation_checkpointing={typed}"])
    assert run.config.stage.activation_checkpointing.value == level
    as_json = parse(['{"experiment": "tiny/2_sft", "stage.activation_checkpointing": true}'])
    assert as_json.config.stage.activation_checkpointing.value == "full"


def test_true_in_a_file_is_refused_with_the_level_to_use(tmp_path):
    text = "# @package _global_\ndefaults: [override /stage: sft]\nstage:\n  activation_checkpointing: true\n"
    folder = write_user_folder(tmp_path, experiment__mine=text)
    (message,) = collect_errors(folder, "experiment=mine", "data=builtin_sft")
    assert "expected one of auto, none, selective, full, found true. What was true is full now." in message


def test_the_run_name_changes_with_settings_that_change_the_result():
    names = [
        parse(["experiment=tiny/2_sft", *overrides]).name
        for overrides in ([], ["stage.learning_rate=1e-4"], ["seed=1"], ["model.grid=3"])
    ]
    assert len(set(names)) == 4 and all(name.startswith("tiny/2_sft") for name in names)
    assert names[1] == parse(["experiment=tiny/2_sft", "trainer.devices=4", "stage.learning_rate=0.0001"]).name
    assert len(names[1]) == len("tiny/2_sft-") + 8


def test_a_given_run_name_is_kept(tmp_path):
    run = parse(["experiment=tiny/2_sft", "run_name=mine", "seed=3"])
    assert run.name == "mine" and run.dir == tmp_path / "runs/mine"


def test_the_names_of_sweep_trials_end_in_their_run_id(monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    assert parse(["experiment=tiny/2_sft"]).name == "tiny/2_sft-r1"
    assert parse(["experiment=tiny/2_sft", "run_name=mine"]).name == "mine-r1"
    assert parse(["experiment=tiny/2_sft"]).init_from.endswith("/tiny/1_align/hf")


# The preceding stage, and pipelines


def test_previous_is_the_preceding_stage_with_the_same_overrides(tmp_path):
    assert parse(["experiment=tiny/2_sft"]).init_from == str(tmp_path / "runs/tiny/1_align/hf")
    overrides = ["seed=1", "run_dir=out"]
    before = parse(["experiment=tiny/1_align", *overrides])
    run = parse(["experiment=tiny/2_sft", *overrides, "stage.learning_rate=1e-4"])
    assert run.init_from == str(before.dir / "hf") and "-" in before.name


def test_an_explicit_path_to_the_previous_stage_does_not_change_the_run_name():
    assert parse(["experiment=tiny/2_sft", "init_from=runs/tiny/1_align/hf"]).name == "tiny/2_sft"
    assert parse(["experiment=tiny/2_sft", "init_from=other/model"]).name != "tiny/2_sft"


def test_the_first_stage_has_no_previous_stage():
    assert "first stage" in collect_errors("experiment=tiny/1_align", "init_from=previous")[0]
    assert "no experiment= is named" in collect_errors("task=train", "init_from=previous")[0]


def test_a_recipe_is_its_files_in_order():
    assert list_stages("tiny") == ["tiny/1_align", "tiny/2_sft", "tiny/3_highres", "tiny/4_dpo"]


def test_a_pipeline_refuses_what_belongs_to_one_stage():
    stage, name = collect_errors("stage.learning_rate=1", "run_name=x")
    assert "experiment=<recipe>/<stage> stage.learning_rate=1" in stage and "run_dir=" in name


def test_data_of_a_pipeline_is_passed_to_the_stages_that_can_use_it():
    overrides = ["data=llava_json", "data.sources.mine.path=my.json", "seed=1", "recipe=tiny"]
    assert build_stage_overrides(overrides, "tiny/1_align") == overrides[:3]
    dpo = build_stage_overrides(overrides, "tiny/4_dpo")
    assert dpo[0] == "seed=1" and dpo[1].startswith("init_from=")  # it would not find highres by its own overrides
    pairs = ["data=preference", "data.sources.mine.path=pairs.jsonl"]
    assert build_stage_overrides(pairs, "tiny/4_dpo") == pairs and build_stage_overrides(pairs, "tiny/2_sft") == []


def test_each_stage_of_a_pipeline_starts_from_the_preceding_one(monkeypatch):
    overrides = ["data=digits", "seed=1"]
    for sweep in (False, True):
        runs = [
            parse([f"experiment={stage}", *build_stage_overrides(overrides, stage)]) for stage in list_stages("tiny")
        ]
        assert [run.init_from for run in runs[1:]] == [str(run.dir / "hf") for run in runs[:-1]]
        assert all(run.name.endswith("-r1") is sweep for run in runs)
        monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
        monkeypatch.setenv("WANDB_RUN_ID", "r1")


def test_a_pipeline_is_checked_to_its_last_stage_before_it_starts():
    assert collect_errors("recipe=varco_vision_14b") == [
        "varco_vision_14b/4_dpo: data.sources.mine.path is not set: give the file or folder, data.sources.mine.path=..."
    ]
    assert parse(["recipe=varco_vision_14b", "data.sources.mine.path=pairs.jsonl"]).name == "varco_vision_14b"
    assert "no stage of this recipe" in collect_errors("data.sources.mne.weight=1")[0]


def test_a_mistake_in_a_setting_of_a_pipeline_is_named_once_and_a_table_is_suggested():
    assert collect_errors("stage.learnin_rate=1e-4") == [
        "unknown setting stage.learnin_rate. Did you mean stage.learning_rate?"
    ]
    assert collect_errors("data.sourcs=3") == ["unknown setting data.sourcs. Did you mean data.sources?"]
