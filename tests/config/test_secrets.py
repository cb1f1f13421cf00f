"""What must not leave a run is known by its name, by its form and by the environment; what only looks like it stays."""

import json

import pytest
from secret_cases import FORMS, INNOCENT, INSIDE, NAMED

from lit_vlm.config.secrets import REDACTED, agrees, is_secret_name, redacted, redacted_text, redacted_words


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
