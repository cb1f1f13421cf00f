"""Written JSON and YAML can be read back whatever the values look like, and contain no secret."""

import json

import pytest
import yaml

from callbacks.samples import _replace_rows
from lit_vlm.checkpoint.index import CheckpointIndex
from lit_vlm.files import write_json
from lit_vlm.loggers.wandb_client import read_samples
from lit_vlm.redaction import REDACTED, redact
from lit_vlm.runs.run_folder import RunFolder, read_manifest

# Beginnings and ends of texts as in login forms, shell output and prompts. They contain no secret themselves.
TEXTS = [
    "PASSWORD=",
    "HF_TOKEN=",
    "api_key =",
    'ID=kim PASSWORD="',
    "mysql -p",
    "JWT=",
    "Authorization: ",
    "'password': ",
    "{",
    "a\u2028b",
]
SECRET = "hf_" + "Ab3" * 11


@pytest.mark.parametrize("text", TEXTS)
def test_a_manifest_with_any_text_is_read_back_unchanged(tmp_path, text):
    manifest = {"status": "running", "config": {"licence": text, "homepage": None, "next": ["x", text]}, "data": {}}
    RunFolder(tmp_path, dict(manifest), is_resumed=False).update(name=text)
    assert read_manifest(tmp_path) == {**manifest, "name": text}


def test_a_json_file_contains_no_secrets(tmp_path):
    write_json(tmp_path / "a.json", {"url": f"https://x/?t={SECRET}", "list": [SECRET, "b"]}, indent=1)
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert SECRET not in json.dumps(found) and found["list"] == [REDACTED, "b"]


@pytest.mark.parametrize("value", ["learning_rate", "language_model", "vision_tower"])
def test_a_checkpoint_index_is_read_back_when_a_secret_variable_equals_one_of_its_words(tmp_path, monkeypatch, value):
    from lit_vlm.files import write_text_atomically

    monkeypatch.setenv("DB_PASSWORD", value)
    index = CheckpointIndex(
        3, 3, [], [], {"settings": {"stage": {"learning_rate": 1.0}, "note": "PASSWORD="}}, versions={}
    )
    write_text_atomically(tmp_path / "index.json", index.to_text(), remove_secrets=False)
    assert CheckpointIndex.from_text((tmp_path / "index.json").read_text(encoding="utf-8"), tmp_path) == index


def test_samples_that_look_like_logins_are_read_back_as_rows(tmp_path):
    rows = [{"phase": "before", "reference": text, "answer": "x", "images": []} for text in TEXTS]
    _replace_rows(tmp_path / "samples.jsonl", "before", rows)
    _replace_rows(tmp_path / "samples.jsonl", "after", [{**rows[0], "phase": "after"}])
    assert read_samples(tmp_path, "before") == rows and len(read_samples(tmp_path, "after")) == 1


@pytest.mark.parametrize("text", TEXTS)
def test_settings_with_any_text_are_read_back_from_yaml(text):
    settings = {"licence": text, "homepage": None, "prompts": [text, "b"]}
    assert yaml.safe_load(yaml.safe_dump(redact(settings), allow_unicode=True, sort_keys=False)) == settings
