"""Tests of redaction: secrets are recognised by key name, by format and by the environment; other values are kept."""

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from rich.progress import Progress
from secret_cases import (
    COMMANDS,
    FORMS,
    HEX,
    INNOCENT,
    INSIDE,
    KEYS,
    LETTERS,
    NAMED,
    ORDINARY,
    PROSE,
    PROSE_KEYS,
    SETTINGS,
)

from benchmarks import secret_sinks
from lit_vlm.config.overrides import ConfigError, quote_value
from lit_vlm.config.parse import parse
from lit_vlm.config.sweep_overrides import ensure_no_secrets, validate_multirun
from lit_vlm.redaction import (
    MAX_PENDING_CHARACTERS,
    REDACTED,
    RedactedStream,
    find_secret_keys,
    find_typed_secret_errors,
    is_same_when_redacted,
    is_secret_name,
    redact,
    redact_arguments,
    redact_text,
)

ROOT = Path(__file__).resolve().parents[2]
SFT = ["experiment=tiny/2_sft", "init_from=null"]


@pytest.fixture(autouse=True)
def _environment_without_secrets(monkeypatch):
    """Remove the secrets of this machine from the environment."""
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("secret", FORMS.values(), ids=FORMS)
def test_a_secret_is_recognised_by_its_format_anywhere(secret):
    for text in (secret, f"said {secret}, then", f"submit.extra=[a,{secret}]", f'{{"note": "{secret}"}}'):
        assert secret not in redact_text(text) and REDACTED in redact_text(text)
    nested = {"words": ["a", secret], "more": {"deep": (secret,)}, secret: "as a key"}
    assert secret not in str(redact(nested)) and secret[:30] not in json.dumps(redact(nested))


@pytest.mark.parametrize(("text", "secret"), INSIDE.values(), ids=INSIDE)
def test_a_secret_inside_a_text_is_redacted_and_the_rest_is_kept(text, secret):
    clean = redact_text(text)
    assert secret not in clean and REDACTED in clean
    assert all(word in clean for word in text.partition(secret)[0].split()[:1] if "=" not in word and ":" not in word)


@pytest.mark.parametrize(("name", "value"), NAMED.items())
def test_a_secret_is_recognised_by_the_name_of_its_key(name, value):
    values = value if isinstance(value, list) else [value]
    assert is_secret_name(name)
    clean = redact({"a": {name: value}})
    assert clean["a"][name] == ([REDACTED] * 2 if isinstance(value, list) else REDACTED)
    arguments = redact_arguments([f"{name}={value}", json.dumps({name: value})])
    assert not any(str(one) in argument for one in values for argument in arguments)


def test_a_secret_of_the_environment_is_recognised_under_another_name(monkeypatch):
    monkeypatch.setenv("TEAM_STORE_TOKEN", "plain words of it")
    monkeypatch.setenv("SHORT_TOKEN", "ab")
    monkeypatch.setenv("FOLDER_SECRET", "/")
    assert redact({"note": "see plain words of it, ab /x"}) == {"note": f"see {REDACTED}, ab /x"}


def test_values_that_only_look_like_secrets_are_kept():
    assert redact(INNOCENT) == INNOCENT
    arguments = [f"{name}={value}" for name, value in INNOCENT.items()]
    assert redact_arguments(arguments) == arguments


def test_redacting_twice_changes_nothing_more():
    everything = {**FORMS, **{name: text for name, (text, _) in INSIDE.items()}, **NAMED}
    once = redact(everything)
    assert redact(once) == once
    assert redact_text(redact_text(json.dumps(everything))) == redact_text(json.dumps(everything))


def test_a_redacted_config_equals_its_original_and_differs_from_another_config():
    full = {"path": "https://a:b12345@host/train", "tags": ["x"]}
    assert (
        is_same_when_redacted(redact(full), full)
        and is_same_when_redacted(full, redact(full))
        and is_same_when_redacted(full, full)
    )
    assert is_same_when_redacted(redact(full), {"path": "https://a:another@host/train", "tags": ["x"]})
    assert not is_same_when_redacted(redact(full), {"path": "https://a:b12345@host/other", "tags": ["x"]})
    assert not is_same_when_redacted(redact(full), {"path": full["path"], "tags": ["y"]})


# All shapes and places


def test_a_secret_of_any_shape_is_refused_on_the_command_line_and_never_written(tmp_path):
    shapes = secret_sinks.make_shapes(64, seed=2)
    assert {leak for shape in shapes for leak in secret_sinks.find_leaks(shape, tmp_path)} == set()
    assert len({shape.family for shape in shapes}) == 8 and len(secret_sinks.SINKS) == 12


@pytest.mark.slow
def test_500_secret_shapes_are_refused_on_the_command_line_and_never_written(tmp_path):
    shapes = secret_sinks.make_shapes(500, seed=0)
    assert {leak for shape in shapes for leak in secret_sinks.find_leaks(shape, tmp_path)} == set()


def test_the_leak_check_finds_a_secret_that_is_not_recognised(tmp_path):
    """Show that the two tests above can fail."""
    plain = secret_sinks.SecretShape("none", "plain words", "plain words")
    places = [key for key, _ in secret_sinks.iter_command_lines(plain)]
    leaks = secret_sinks.find_leaks(plain, tmp_path)
    assert len([leak for leak in leaks if leak.startswith("typed in")]) == len(places)
    assert {name for name in secret_sinks.SINKS if any(leak.startswith(f"{name}: ") for leak in leaks)} == {
        *secret_sinks.SINKS
    }


def test_300_ordinary_values_are_neither_refused_nor_redacted():
    overrides = [f"{key}={value}" for key in KEYS for value in ORDINARY]
    overrides += [f"logger.tags={quote_value([value])}" for value in ORDINARY]
    assert len(set(ORDINARY)) > 130 and len(overrides) > 300
    assert [override for override in overrides if find_typed_secret_errors([override])] == []
    assert [value for value in ORDINARY if redact_text(value) != value] == []
    assert redact_arguments(overrides) == overrides and redact(ORDINARY) == ORDINARY


def test_conf_sweeps_and_documented_commands_contain_no_false_positive():
    files = [path for folder in ("conf", "sweeps") for path in (ROOT / folder).rglob("*.yaml")]
    assert len(files) > 50
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert list(find_secret_keys(yaml.safe_load(text) or {})) == [] and redact_text(text) == text, path
    pages = [*(ROOT / "docs").glob("*.md"), *ROOT.glob("README*.md")]
    lines = [line for page in pages for line in page.read_text(encoding="utf-8").splitlines() if "run.py " in line]
    commands = [line for line in lines if line.startswith(("python run.py", "torchrun"))]
    assert len(commands) > 60
    for line in commands:
        assert find_typed_secret_errors(shlex.split(line, comments=True)) == [] and redact_text(line) == line


@pytest.mark.parametrize("override", SETTINGS)
def test_commits_column_names_and_dated_names_are_no_secrets(override):
    assert find_typed_secret_errors([override]) == [] and redact_arguments([override]) == [override]
    name, _, value = override.partition("=")
    assert list(find_secret_keys({name: value})) == []


@pytest.mark.parametrize("before", ["wandb login ", "key ", "api-key-", "API_KEY=", "login: ", "see ", ""])
def test_a_key_of_40_digits_is_refused_after_key_names_and_in_free_text(before):
    assert HEX not in redact_text(f"{before}{HEX}") and HEX not in redact_text(f"{before}{HEX}, then")
    assert find_typed_secret_errors([f"submit.account={before}{HEX}"])


def test_a_list_of_tags_may_hold_a_commit_and_no_key():
    assert redact({"tags": ["a", HEX]}) == {"tags": ["a", HEX]}
    text = json.dumps({"tags": ["a", HEX]}, indent=2)
    assert redact_text(text) == text
    assert find_typed_secret_errors([f"logger.tags=[a,'wandb login {HEX}']"])


@pytest.mark.parametrize("key", PROSE_KEYS)
def test_a_text_setting_may_mention_passwords(key):
    for text in PROSE:
        for override in (
            f"{key}={text}",
            f"{key}={quote_value(text)}",
            f"{key}={quote_value([text])}",
            json.dumps({key: [text]}),
        ):
            assert find_typed_secret_errors([override]) == [], override
        tree = text
        for part in reversed(key.split(".")):
            tree = {part: tree}
        assert list(find_secret_keys(tree)) == [] and redact(tree) == tree


@pytest.mark.parametrize("key", PROSE_KEYS)
def test_a_text_setting_refuses_tokens_and_secrets_of_the_environment(key, monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", "h3ron-lake")
    tokens = [FORMS[name] for name in ("hugging_face", "openai", "github", "pem")]
    for secret in (*tokens, "h3ron-lake"):
        override = f"{key}={quote_value(f'What is {secret}?')}"
        assert find_typed_secret_errors([override]) and secret not in redact_arguments([override])[0]


@pytest.mark.parametrize(("command", "secret"), COMMANDS)
def test_a_secret_in_the_arguments_of_a_command_is_recognised(command, secret):
    assert secret not in redact_text(command) and REDACTED in redact_text(command)
    assert find_typed_secret_errors([f"submit.setup={quote_value([command])}"])


@pytest.mark.parametrize(
    "value", ["PASSWORD=", "export HF_TOKEN='", 'export HF_TOKEN="', "HF_TOKEN=x9y8z7w6, PASSWORD="]
)
@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"separators": (",", ":")}], ids=["line", "lines", "compact"])
def test_json_stays_valid_when_a_text_ends_with_a_secret_name(value, layout):
    nested = {"a": json.dumps({"b": value.strip("\"'"), "c": 1})}
    for plain in ({"licence": value, "b": "next"}, {"a": [value, "next"]}, nested):
        clean = json.loads(redact_text(json.dumps(plain, **layout)))
        assert clean.keys() == plain.keys() and "x9y8z7w6" not in str(clean)
        assert "x9y8z7w6" in value or clean == plain
    assert "in blank" not in redact_text('PASSWORD=" in blank"')


# The terminal


def test_a_secret_that_is_printed_in_pieces_does_not_reach_the_terminal():
    stream_buffer = io.StringIO()
    stream = RedactedStream(stream_buffer)
    print("first ", "HF_TOKEN=", LETTERS, " last", sep="", file=stream)
    print("two\nPASSWORD=", "hunter2abc", sep="", end="\r", file=stream)
    for letter in FORMS["hugging_face"]:
        stream.write(letter)
    assert stream_buffer.getvalue() == f"first HF_TOKEN={REDACTED} last\ntwo\nPASSWORD={REDACTED}\r"
    stream.flush()
    assert stream_buffer.getvalue().endswith(f"\r{REDACTED}")


def test_a_private_key_that_is_written_line_by_line_does_not_reach_the_terminal():
    stream_buffer = io.StringIO()
    stream = RedactedStream(stream_buffer)
    stream.writelines(f"{line}\n" for line in ["before", *FORMS["pem"].split("\n"), "after"])
    assert stream_buffer.getvalue() == f"before\n{REDACTED}\nafter\n"


def test_the_terminal_loses_no_character_of_a_long_line():
    stream_buffer = io.StringIO()
    stream = RedactedStream(stream_buffer)
    text = "word " * MAX_PENDING_CHARACTERS + "x" * (3 * MAX_PENDING_CHARACTERS)
    for start in range(0, len(text), 1000):
        stream.write(text[start : start + 1000])
        assert start + 1000 - len(stream_buffer.getvalue()) <= MAX_PENDING_CHARACTERS + 1000
    assert len(stream_buffer.getvalue()) >= len(text) - MAX_PENDING_CHARACTERS
    stream.flush()
    assert stream_buffer.getvalue() == text


PROGRAM = """
import sys
from lit_vlm.redaction import redact_terminal
redact_terminal()
print("password=", "hunter2abc", sep="")
print("asked:", input("your name? "))
sys.stderr.write("an unfinished error")
print("an unfinished", "line", end="")
"""


def test_an_input_prompt_and_an_unfinished_last_line_are_shown():
    result = subprocess.run([sys.executable, "-c", PROGRAM], input="mina\n", capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == f"password={REDACTED}\nyour name? asked: mina\nan unfinished line"
    assert result.stderr == "an unfinished error" and result.returncode == 0


def test_a_progress_bar_is_rendered_unchanged_by_the_redacted_terminal():
    plain, stream_buffer = io.StringIO(), io.StringIO()
    for stream in (plain, RedactedStream(stream_buffer)):
        console = Console(file=stream, force_terminal=True, width=80, color_system=None, legacy_windows=False)
        with Progress("{task.description} {task.completed}", console=console, auto_refresh=False) as progress:
            task = progress.add_task("step", total=3)
            for _ in range(3):
                progress.advance(task)
                progress.refresh()
                assert stream is plain or "step" in stream_buffer.getvalue()
    assert stream_buffer.getvalue() == plain.getvalue() and "step 3" in plain.getvalue()


# On the command line


def test_a_setting_that_holds_a_secret_is_named_with_a_remedy_and_without_the_secret(tmp_path, monkeypatch):
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
    for key, overrides in typed.items():
        with pytest.raises(ConfigError, match="export it in your shell") as caught:
            parse(overrides)
        assert f"{key}: holds a secret" in str(caught.value) and secret not in str(caught.value)
        assert not any(form in str(caught.value) for form in FORMS.values())
    with pytest.raises(ConfigError, match="logger.group: holds a secret"):
        parse([f"hydra.searchpath=[file://{tmp_path}]", "experiment=own"])
    for check in (validate_multirun, ensure_no_secrets):
        with pytest.raises(ConfigError, match="logger.project: holds a secret"):
            check([*SFT, "logger.project=${oc.env:MY_PASSWORD}", "seed=1"])
    assert parse([*SFT, "task=submit", "submit.extra=['--export=ALL,WANDB_API_KEY']", "submit.env.HF_TOKEN=$HF_TOKEN"])
