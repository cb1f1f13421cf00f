"""What must not leave a run is known by its name, by its form and by the environment; what only looks like it stays."""

import json
import shlex
from pathlib import Path

import pytest
import yaml
from secret_cases import FORMS, INNOCENT, INSIDE, KEYS, LETTERS, NAMED, ORDINARY

from benchmarks import secret_sinks
from lit_vlm.config.multirun import check_multirun, refuse_secrets
from lit_vlm.config.overrides import ConfigError, quote
from lit_vlm.config.parse import parse
from lit_vlm.secrets import (
    REDACTED,
    agrees,
    is_secret_name,
    mistakes_of_typed_secrets,
    places_of_secrets,
    redacted,
    redacted_text,
    redacted_words,
)

ROOT = Path(__file__).resolve().parents[2]
SFT = ["experiment=tiny/2_sft", "init_from=null"]


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch):
    """The machine's own secrets have no part in it."""
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("secret", FORMS.values(), ids=FORMS)
def test_a_secret_is_known_by_its_form_wherever_it_stands(secret):
    for text in (secret, f"said {secret}, then", f"logger.tags=[a,{secret}]", f'{{"note": "{secret}"}}'):
        assert secret not in redacted_text(text) and REDACTED in redacted_text(text)
    nested = {"tags": ["a", secret], "more": {"deep": (secret,)}, secret: "as a key"}
    assert secret not in str(redacted(nested)) and secret[:30] not in json.dumps(redacted(nested))


@pytest.mark.parametrize(("text", "secret"), INSIDE.values(), ids=INSIDE)
def test_a_secret_inside_a_text_goes_and_the_rest_of_the_text_stays(text, secret):
    clean = redacted_text(text)
    assert secret not in clean and REDACTED in clean
    assert all(word in clean for word in text.partition(secret)[0].split()[:1] if "=" not in word and ":" not in word)


@pytest.mark.parametrize(("name", "value"), NAMED.items())
def test_a_secret_is_known_by_the_name_of_what_holds_it(name, value):
    values = value if isinstance(value, list) else [value]
    assert is_secret_name(name)
    clean = redacted({"a": {name: value}})
    assert clean["a"][name] == ([REDACTED] * 2 if isinstance(value, list) else REDACTED)
    words = redacted_words([f"{name}={value}", json.dumps({name: value})])
    assert not any(str(one) in word for one in values for word in words)


def test_a_secret_is_known_by_the_environment_also_under_another_name(monkeypatch):
    monkeypatch.setenv("TEAM_STORE_TOKEN", "plain words of it")
    monkeypatch.setenv("SHORT_TOKEN", "ab")
    monkeypatch.setenv("FOLDER_SECRET", "/")
    assert redacted({"note": "see plain words of it, ab /x"}) == {"note": f"see {REDACTED}, ab /x"}


def test_what_only_looks_like_a_secret_stays_as_it_is():
    assert redacted(INNOCENT) == INNOCENT
    words = [f"{name}={value}" for name, value in INNOCENT.items()]
    assert redacted_words(words) == words


def test_what_has_no_secrets_any_more_is_left_alone():
    everything = {**FORMS, **{name: text for name, (text, _) in INSIDE.items()}, **NAMED}
    once = redacted(everything)
    assert redacted(once) == once
    assert redacted_text(redacted_text(json.dumps(everything))) == redacted_text(json.dumps(everything))


def test_two_settings_agree_where_one_lacks_its_secret_and_differ_where_more_differs():
    full = {"path": "https://a:b12345@host/train", "tags": ["x"]}
    assert agrees(redacted(full), full) and agrees(full, redacted(full)) and agrees(full, full)
    assert agrees(redacted(full), {"path": "https://a:another@host/train", "tags": ["x"]})
    assert not agrees(redacted(full), {"path": "https://a:b12345@host/other", "tags": ["x"]})
    assert not agrees(redacted(full), {"path": full["path"], "tags": ["y"]})


# Every shape, every place


def test_a_secret_of_any_shape_is_refused_where_it_is_typed_and_is_in_nothing_that_is_written(tmp_path):
    shapes = secret_sinks.make_shapes(64, seed=2)
    assert {leak for shape in shapes for leak in secret_sinks.look_at(shape, tmp_path)} == set()
    assert len({shape.family for shape in shapes}) == 8 and len(secret_sinks.SINKS) == 11


@pytest.mark.slow
def test_500_shapes_are_refused_where_they_are_typed_and_are_in_nothing_that_is_written(tmp_path):
    shapes = secret_sinks.make_shapes(500, seed=0)
    assert {leak for shape in shapes for leak in secret_sinks.look_at(shape, tmp_path)} == set()


def test_the_places_and_sinks_would_show_a_secret_that_is_not_known(tmp_path):
    """That the two tests above can fail."""
    plain = secret_sinks.Shape("none", "plain words", "plain words")
    places = [key for key, _ in secret_sinks.typed(plain)]
    leaks = secret_sinks.look_at(plain, tmp_path)
    assert len([leak for leak in leaks if leak.startswith("typed in")]) == len(places)
    assert {name for name in secret_sinks.SINKS if any(leak.startswith(f"{name}: ") for leak in leaks)} == {
        *secret_sinks.SINKS
    }


def test_300_ordinary_values_are_neither_refused_nor_redacted():
    words = [f"{key}={value}" for key in KEYS for value in ORDINARY]
    words += [f"logger.tags={quote([value])}" for value in ORDINARY]
    assert len(set(ORDINARY)) > 130 and len(words) > 300
    assert [word for word in words if mistakes_of_typed_secrets([word])] == []
    assert [value for value in ORDINARY if redacted_text(value) != value] == []
    assert redacted_words(words) == words and redacted(ORDINARY) == ORDINARY


def test_nothing_in_conf_sweeps_and_the_commands_of_the_documents_is_taken_for_a_secret():
    files = [path for folder in ("conf", "sweeps") for path in (ROOT / folder).rglob("*.yaml")]
    assert len(files) > 50
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert list(places_of_secrets(yaml.safe_load(text) or {})) == [] and redacted_text(text) == text, path
    pages = [*(ROOT / "docs").glob("*.md"), *ROOT.glob("README*.md")]
    lines = [line for page in pages for line in page.read_text(encoding="utf-8").splitlines() if "run.py " in line]
    commands = [line for line in lines if line.startswith(("python run.py", "torchrun"))]
    assert len(commands) > 60
    for line in commands:
        assert mistakes_of_typed_secrets(shlex.split(line, comments=True)) == [] and redacted_text(line) == line


# Where it is typed


def test_a_setting_that_holds_a_secret_is_named_with_what_to_do_and_the_secret_is_not_shown(tmp_path, monkeypatch):
    secret = f"Plain7{LETTERS[:8]}"
    monkeypatch.setenv("MY_PASSWORD", secret)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text(f"# @package _global_\nlogger:\n  group: password={secret}x\n")
    typed = {
        "run_name": [*SFT, "run_name=x_${oc.env:MY_PASSWORD}"],
        "logger.group": [*SFT, f"logger.group='password={secret}'"],
        "submit.env.HF_TOKEN": [*SFT, "task=submit", "submit.env.HF_TOKEN=${oc.env:MY_PASSWORD}"],
        "submit.extra": [*SFT, "task=submit", f"submit.extra=['--export=ALL,WANDB_API_KEY={LETTERS}']"],
        "trainer.extra.note": [f"trainer.extra.note={FORMS['github']}"],
        "data.sources.mine.path": ["data=llava_json", f"data.sources.mine.path=https://u:{secret}@host/a.json"],
        "prefer.judge": ["task=prefer", f"prefer.judge={FORMS['hugging_face']}"],
        "init_from": ["task=chat", f"init_from={FORMS['openai']}"],
    }
    for key, words in typed.items():
        with pytest.raises(ConfigError, match="export it in your shell") as refused:
            parse(words)
        assert f"{key}: holds a secret" in str(refused.value) and secret not in str(refused.value)
        assert not any(form in str(refused.value) for form in FORMS.values())
    with pytest.raises(ConfigError, match="logger.group: holds a secret"):
        parse([f"hydra.searchpath=[file://{tmp_path}]", "experiment=own"])
    for check in (check_multirun, refuse_secrets):
        with pytest.raises(ConfigError, match="logger.project: holds a secret"):
            check([*SFT, "logger.project=${oc.env:MY_PASSWORD}", "seed=1"])
    assert parse([*SFT, "task=submit", "submit.extra=['--export=ALL,WANDB_API_KEY']", "submit.env.HF_TOKEN=$HF_TOKEN"])
