"""The commonest mistakes of a first hour: each is answered by one message that says what to write instead."""

import json
import shlex

import pytest

from benchmarks.mistakes import MISTAKES, write_first_folder
from lit_vlm.config import ConfigError, parse
from lit_vlm.config.argument_errors import find_argument_errors, suggest_override
from lit_vlm.config.model_folders import find_folder_errors, find_nearest_folder
from lit_vlm.config.other_programs import KEY_ALIASES, KEY_REMEDIES, format_key_remedy
from lit_vlm.config.overrides import split_flags
from lit_vlm.config.schema import RunConfig
from lit_vlm.config.settings import get_field_types, get_setting_type, list_settings
from lit_vlm.types import UserError
from run import dispatch

CONFIG_MISTAKES = [mistake for mistake in MISTAKES if "mine.path" not in mistake.command]


@pytest.fixture(scope="module")
def first_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    write_first_folder(folder)
    return folder


def read_error(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        dispatch(list(arguments))
    return str(error.value)


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES, ids=lambda mistake: mistake.name)
def test_a_common_mistake_is_answered_with_what_to_write(mistake, first_folder, monkeypatch):
    monkeypatch.chdir(first_folder)
    text = read_error(*shlex.split(mistake.command))
    assert mistake.remedy in text
    assert not text.startswith(("2 mistakes", "3 mistakes"))


def test_every_alias_is_a_setting_of_this_program():
    names = {setting.key.replace("<name>", "mine") for setting in list_settings()}
    assert set(KEY_ALIASES.values()) <= names
    assert not set(KEY_ALIASES) & set(KEY_REMEDIES)
    assert not set(KEY_REMEDIES) & set(get_field_types(RunConfig))


@pytest.mark.parametrize("remedy", sorted(set(KEY_REMEDIES.values())))
def test_every_remedy_names_settings_that_exist(remedy):
    words = [word.strip(".,;:()").partition("=")[0] for word in remedy.replace("e.g. ", "").split()]
    keys = [word for word in words if "." in word and not word.endswith((".py", ".md", ".yaml", "..."))]
    assert all(get_setting_type(key) is not None for key in keys), keys


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "1e-4", "--bf16"], "stage.learning_rate=1e-4. bf16: Write trainer.precision=bf16-mixed"),
        (["-lr", "1e-4"], "without dashes: stage.learning_rate=1e-4."),
        (["--learning-rate=1e-4"], "without dashes: stage.learning_rate=1e-4 (in a W&B sweep"),
        (["--nproc_per_node", "8"], "torchrun --nproc-per-node=8"),
        (["--frobnicate", "3"], "There is no setting frobnicate; python run.py --help settings"),
        (["seed", "=1"], "write seed=1, without it"),
        (["seed=", "1"], "write seed=1, without it"),
        (["prompt=What", "is", "this?"], "a value with spaces needs quotes: 'prompt=What is this?'"),
        (["stage.trainable=[projector,", "language_model]"], "needs quotes: 'stage.trainable=[projector, language_model]'"),
        (["stage.learning_rate:1e-4"], "write key=value, e.g. stage.learning_rate=1e-4"),
        (["my.yaml"], "save it as mine/experiment/<name>.yaml"),
        (["run.py"], "the program is named once"),
        (["dpo"], "e.g. experiment=tiny/4_dpo"),
    ],
)  # fmt: skip
def test_arguments_that_are_no_settings_are_one_mistake(arguments, message):
    overrides, errors = find_argument_errors(arguments)
    assert overrides == [] and len(errors) == 1
    assert message in errors[0]


def test_arguments_beside_a_mistake_stay_overrides():
    overrides, errors = find_argument_errors(["seed=1", "--lr", "1e-4", "data=ready", "~data.sources.a", '{"seed": 2}'])
    assert overrides == ["seed=1", "data=ready", "~data.sources.a", '{"seed": 2}']
    assert len(errors) == 1


def test_flags_of_hydra_keep_their_meaning():
    assert split_flags(["--cfg", "job", "seed=1"]) == (["--cfg", "job"], ["seed=1"])
    assert split_flags(["-m", "seed=1,2"]) == (["-m"], ["seed=1,2"])
    assert split_flags(["--help", "settings"]) == (["--help", "settings"], [])
    assert split_flags(["--config-dir", "mine", "seed=1"]) == ([], ["--config-dir", "mine", "seed=1"])
    assert "takes one of job, hydra, all" in read_error("-c", "my.yaml")


def test_a_variable_of_the_environment_belongs_before_the_command():
    with pytest.raises(ConfigError, match="write it before the command, CUDA_VISIBLE_DEVICES=0 python run.py"):
        parse(["experiment=tiny/2_sft", "CUDA_VISIBLE_DEVICES=0"])


def test_a_setting_of_another_task_is_refused_instead_of_ignored():
    with pytest.raises(ConfigError, match="sweep: is read with task=sweep only, and task is train"):
        parse(["experiment=tiny/2_sft", "sweep=sweeps/align.yaml"])


def test_suggestions_carry_the_value():
    assert suggest_override("lr", "1e-4") == "stage.learning_rate=1e-4"
    assert suggest_override("lora_rank", "8") == "stage.parts.language_model.lora.rank=8"
    assert format_key_remedy("model_name_or_path", "a/b").startswith("Write init_from=a/b")


# Model folders


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/tiny", "Models are in runs/tiny/1_align/hf."),
        ("runs/tiny/1_aling", "Did you mean init_from=runs/tiny/1_align/hf?"),
        ("nothing/of/it/hf", "the run that should have left it does not exist"),
        ("runs/begun", "python run.py task=export init_from=runs/begun"),
        ("mine.json", "is a file."),
    ],
)
def test_a_folder_without_a_model_is_named_with_where_models_are(name, message, first_folder, monkeypatch):
    monkeypatch.chdir(first_folder)
    (first_folder / "runs" / "begun").mkdir(exist_ok=True)
    (first_folder / "runs" / "begun" / "manifest.json").write_text(json.dumps({"status": "running"}))
    (error,) = find_folder_errors("init_from", str(first_folder / name), first_folder / "runs")
    assert message in error


def test_a_hub_id_is_not_taken_for_a_folder(first_folder, monkeypatch):
    monkeypatch.chdir(first_folder)
    assert not list(find_folder_errors("init_from", "google/siglip", first_folder / "runs"))
    assert list(find_folder_errors("init_from", "runs/siglip", first_folder / "runs"))


def test_an_adapter_names_its_base(first_folder):
    (error,) = find_folder_errors("model.language_model", str(first_folder / "adapter"), first_folder / "runs")
    assert "is an adapter" in error and "Merge it" in error and "model.language_model=models/base" in error


def test_no_folder_is_suggested_that_holds_no_model(tmp_path):
    (tmp_path / "alike").mkdir()
    assert find_nearest_folder(tmp_path / "alikee") is None
