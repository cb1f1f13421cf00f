"""Test of redaction: synthetic secrets of many shapes, in each setting and in each output file or stream.

    python -m benchmarks.secret_sinks --shapes 500 --seed 0

Each setting must refuse each shape with a message that does not contain the secret, and no output may contain it. No secret
here is real; each one is generated when the program runs.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import io
import json
import logging
import os
import random
import shlex
import string
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lit_vlm.config.overrides import ConfigError, quote_value
from lit_vlm.config.parse import ensure_no_typed_secrets
from lit_vlm.files import write_text_atomically
from lit_vlm.loggers import run_metadata
from lit_vlm.redaction import RedactedStream, find_secret_errors
from lit_vlm.reports.templates import PageTemplate, write_page
from lit_vlm.runs.run_folder import RunFolder

LETTERS, HEX = string.ascii_letters + string.digits, "0123456789abcdef"
NAMES = """HF_TOKEN WANDB_API_KEY OPENAI_KEY OPENAI_API_KEY ANTHROPIC_API_KEY DB_PASS DB_PASSWORD PGPASSWORD JWT MY_JWT
    AWS_SECRET_ACCESS_KEY GITHUB_TOKEN CI_JOB_TOKEN SMTP_PASS REDIS_PASSWORD api_key apiKey password passwd passphrase
    client_secret access_token auth_token refresh_token private_key encryption_key AccountKey secret MYSQL_ROOT_PASSWORD
    HUGGING_FACE_HUB_TOKEN SLACK_TOKEN azure_key x-api-key hf_token ssh_passphrase""".split()
TEXT_SETTINGS = """logger.group logger.project logger.entity run_name run_dir data.index_dir data.sources.mine.path init_from
    data.sources.mine.obtain submit.env.ANYTHING submit.account submit.container prefer.judge hydra.job.name +mine.own
    model.vision_tower trainer.extra.note""".split()
LIST_SETTINGS = "logger.tags submit.setup submit.extra callbacks".split()


@dataclass(frozen=True)
class SecretShape:
    """Text as people write it, with the secret in it. `variable`: environment variable that alone marks it as a secret."""

    family: str
    text: str
    secret: str
    variable: str = ""


def make_shapes(num_shapes: int, seed: int) -> list[SecretShape]:
    """Make shapes of all families in turn."""
    rng = random.Random(seed)
    families = [
        _make_prefixed,
        _make_assigned,
        _make_address,
        _make_header,
        _make_signed,
        _make_key_file,
        _make_digest,
        _make_variable,
    ]
    return [families[number % len(families)](rng) for number in range(num_shapes)]


def _sample_text(draw: random.Random, length: int, letters: str = LETTERS) -> str:
    """Sample random text with at least one capital letter and one digit, as in keys."""
    text = [draw.choice(letters) for _ in range(length)]
    if letters is LETTERS:
        text[1], text[4] = draw.choice(string.ascii_uppercase), draw.choice(string.digits)
    return "".join(text)


def _wrap(draw: random.Random, text: str) -> str:
    return draw.choice(["{}", "see {} there", "a,{}", "[{}]", '"{}"', "x={}", "한국어 {} 입니다"]).format(text)


def _make_prefixed(draw: random.Random) -> SecretShape:
    starts = "hf_ sk- sk-proj- sk-ant-api03- ghp_ gho_ github_pat_ glpat- xoxb- xapp- AIza npm_ nvapi- r8_ gsk_ hvs. dckr_pat_"
    aws = "AK" + "IA" + _sample_text(draw, 16, string.ascii_uppercase + string.digits)
    token = ".".join(["ey" + "J" + _sample_text(draw, 20), "ey" + "J" + _sample_text(draw, 30), _sample_text(draw, 40)])
    secret = draw.choice([*(start + _sample_text(draw, draw.randint(36, 44)) for start in starts.split()), aws, token])
    return SecretShape("prefix", _wrap(draw, secret), secret)


def _make_assigned(draw: random.Random) -> SecretShape:
    name, secret = draw.choice(NAMES), _sample_text(draw, draw.randint(8, 40)) + draw.choice(["", "!", ",x", "/a+b="])
    forms = [
        "{n}={s}",
        "export {n}='{s}'",
        'export {n}="{s}"',
        "-e {n}={s}",
        "docker run --env={n}={s} image",
        "a;{n}={s}",
    ]
    forms += [
        "--export=ALL,{n}={s}",
        "-o username=bob,{n}={s}",
        '{{"{n}": "{s}"}}',
        "--{n} {s}",
        "--{n}={s}",
        "{n}: {s}",
    ]
    return SecretShape("name", draw.choice(forms).format(n=name, s=secret), secret)


def _make_address(draw: random.Random) -> SecretShape:
    secret = _sample_text(draw, draw.randint(8, 24))
    forms = [
        "https://bob:{}@example.com/a",
        "postgresql+psycopg2://bob:{}@db:5432/x",
        "git clone https://oauth2:{}@host/r.git",
    ]
    forms += ["redis://:{}@cache:6379/0", "rsync bob:{}@data.example.com:/x .", "curl -u bob:{} https://example.com"]
    forms += ["docker login -u bob -p {} host", "sshpass -p '{}' ssh host", "machine host login bob password {}"]
    return SecretShape("address", draw.choice(forms).format(secret), secret)


def _make_header(draw: random.Random) -> SecretShape:
    secret = _sample_text(draw, draw.randint(10, 40))
    forms = [
        "Authorization: token {}",
        "Authorization: Bearer {}",
        "authorization: Basic {}",
        "X-Api-Key: {}",
        "Bearer {}",
    ]
    forms += [
        "curl -H 'Authorization: token {}' x",
        '{{"Authorization": "ApiKey {}"}}',
        "X-Auth-Token: {}",
        "Authorization: {}",
    ]
    return SecretShape("header", draw.choice(forms).format(secret), secret)


def _make_signed(draw: random.Random) -> SecretShape:
    name = draw.choice(
        "X-Amz-Signature sig access_token api_key token Signature X-Goog-Signature client_secret".split()
    )
    secret = _sample_text(draw, draw.randint(16, 64))
    return SecretShape("signed", f"https://s3.example.com/a?part=1&{name}={secret}&b=2", secret)


def _make_key_file(draw: random.Random) -> SecretShape:
    kind, lines = (
        draw.choice(["", "RSA ", "EC ", "OPENSSH "]),
        [_sample_text(draw, 64) for _ in range(draw.randint(2, 5))],
    )
    text = "\n".join([f"-----BEGIN {kind}PRIVATE " + "KEY-----", *lines, f"-----END {kind}PRIVATE " + "KEY-----"])
    return SecretShape("key file", text, lines[draw.randrange(len(lines))])


def _make_digest(draw: random.Random) -> SecretShape:
    """Make a W&B key. Forty hex digits alone in a name or a tag may be a commit; in a text, or with "local-", they are a key."""
    start = draw.choice(["", "local-"])
    secret = start + _sample_text(draw, 40, HEX)
    forms = ["wandb login {}", "key {}", "see {} there", "api-{}", *(["{}", "[{}]"] if start else [])]
    return SecretShape("W&B", draw.choice(forms).format(secret), secret)


def _make_variable(draw: random.Random) -> SecretShape:
    words = [_sample_text(draw, draw.randint(5, 9)) for _ in range(draw.randint(2, 4))]
    secret = draw.choice([" ", "-", "'", '"', "&", "#", "/", "\\", "한"]).join(words)
    return SecretShape(
        "environment", draw.choice(["{}", "x_{}", "of {} and"]).format(secret), secret, draw.choice(NAMES[:12])
    )


def list_spellings(secret: str) -> set[str]:
    """List the spellings of a secret: plain, and escaped for JSON, HTML, YAML and a shell."""
    return {
        secret,
        json.dumps(secret)[1:-1],
        html.escape(secret),
        shlex.quote(secret).strip("'"),
        secret.replace("'", "''"),
    }


def is_shown(secret: str, text: str) -> bool:
    """Return whether a text shows the secret in any spelling."""
    return any(spelling in text for spelling in list_spellings(secret))


@contextlib.contextmanager
def set_variable(shape: SecretShape) -> Iterator[None]:
    """Set the environment variable of a shape inside the context."""
    previous = os.environ.get(shape.variable)
    if shape.variable:
        os.environ[shape.variable] = shape.secret
    try:
        yield
    finally:
        if shape.variable:
            os.environ.pop(shape.variable)
            if previous is not None:
                os.environ[shape.variable] = previous


# ---- inputs


def iter_command_lines(shape: SecretShape) -> Iterator[tuple[str, list[str]]]:
    """Iterate over command lines that contain the secret, each with the setting that the error must name."""
    for key in TEXT_SETTINGS:
        yield key.lstrip("+"), [f"{key}={shape.text}"]
        yield key.lstrip("+"), [f"{key}={quote_value(shape.text)}"]
    for key in LIST_SETTINGS:
        yield key, [f"{key}={quote_value(['one', shape.text])}"]
        yield key, [json.dumps({key: ["one", shape.text]}, ensure_ascii=False)]
    yield "logger.group", ["-m", f"logger.group=one,{quote_value(shape.text)}"]
    yield "logger.group", [json.dumps({"logger": {"group": shape.text}})]


def find_not_refused(shape: SecretShape) -> Iterator[str]:
    """Find the settings that accept the secret, or whose error shows it or does not name the setting."""
    for key, arguments in iter_command_lines(shape):
        try:
            ensure_no_typed_secrets(arguments)
            yield f"typed in {key}: taken: {arguments}"
        except ConfigError as error:
            if is_shown(shape.secret, str(error)) or key not in str(error):
                yield f"typed in {key}: {error}"
    settings = {"a": {"b": [shape.text]}, "c": shape.text, "file": {shape.text: 1}}
    errors = find_secret_errors(settings)  # as from a YAML file or a sweep file
    if len(errors) != 3 or any(is_shown(shape.secret, message) for message in errors):
        yield f"a file of settings: {errors}"


# ---- outputs


def _write_file(folder: Path, text: str) -> str:
    write_text_atomically(folder / "file", text)
    return (folder / "file").read_text(encoding="utf-8")


def _write_manifest(folder: Path, text: str) -> str:
    manifest = {"config": {"tags": [text], "note": text}, "command": f"python run.py logger.group={text}", text: 1}
    RunFolder(folder, manifest).update(status="running")
    written = (folder / "manifest.json").read_text(encoding="utf-8")
    try:
        json.loads(written)
    except ValueError as error:
        return f"no JSON any more ({error}): {written} {text}"
    return written


def _write_page(folder: Path, text: str) -> str:
    (folder / "page.html").write_text("<td title='{{ text }}'>{{ text }}</td>")
    write_page(folder / "written.html", PageTemplate("page.html", folder=folder).render(text=text))
    return (folder / "written.html").read_text(encoding="utf-8")


def _collect_wandb_facts(folder: Path, text: str) -> str:
    manifest = {
        "name": text,
        "command": text,
        "git": {},
        "versions": {},
        "data": {"digest": "d"},
        "parent": {"path": "x", "note": text},
    }
    manifest |= {"config": {"logger": {"group": text, "tags": [text]}}, "plan": None, "tracking": {}}
    summary = run_metadata.build_summary({"figures": {"note": text}, "plan": {}}, "failed")
    return str([run_metadata.build_config(RunFolder(folder, manifest)), summary])


def _make_terminal_sink(write: Callable[[Any], None]) -> Callable[[Path, str], str]:
    def write_and_read(_: Path, text: str) -> str:
        caught = io.StringIO()
        stream: Any = RedactedStream(caught)
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            write(text)
        stream.flush()
        return caught.getvalue()

    return write_and_read


def _print_traceback(text: str) -> None:
    try:
        raise RuntimeError(text)
    except RuntimeError:
        traceback.print_exc()


def _log(text: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.emit(logging.LogRecord("hydra", logging.WARNING, "", 0, "job %s", (text,), None))


def _warn(text: str) -> None:
    sys.stderr.write(warnings.formatwarning(text, UserWarning, "module.py", 1, line=text))


SINKS: dict[str, Callable[[Path, str], str]] = {
    "submit.sh": lambda folder, text: _write_file(
        folder, f"#!/bin/bash\nexec srun python run.py {shlex.quote(text)}\n"
    ),
    "config.yaml": lambda folder, text: _write_file(
        folder, yaml.safe_dump({"a": [text], "b": text}, allow_unicode=True)
    ),
    "sweep.json": lambda folder, text: _write_file(
        folder, json.dumps({"overrides": [f"logger.group={text}"]}, indent=2)
    ),
    "a page": _write_page,
    "manifest.json": _write_manifest,
    "W&B": _collect_wandb_facts,
    "print": _make_terminal_sink(print),
    "print in pieces": _make_terminal_sink(
        lambda text: print(*(text[at : at + 3] for at in range(0, len(text), 3)), sep="")
    ),
    "rich": _make_terminal_sink(lambda text: Console(width=400).print(text, soft_wrap=True, markup=False)),
    "a traceback": _make_terminal_sink(_print_traceback),
    "Hydra's log": _make_terminal_sink(_log),
    "a warning": _make_terminal_sink(_warn),
}


def find_shown(shape: SecretShape, folder: Path) -> Iterator[str]:
    """Find the outputs that show the secret."""
    for name, sink in SINKS.items():
        if is_shown(shape.secret, written := sink(folder, shape.text)):
            yield f"{name}: {written[:300]!r}"


def find_leaks(shape: SecretShape, folder: Path) -> list[str]:
    """Find all settings that accept a shape and all outputs that show it."""
    with set_variable(shape):
        return [*find_not_refused(shape), *find_shown(shape, folder)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    num_leaks = 0
    with tempfile.TemporaryDirectory() as folder:
        for shape in make_shapes(arguments.shapes, arguments.seed):
            for leak in find_leaks(shape, Path(folder)):
                num_leaks += 1
                print(f"{shape.family}: {shape.text!r}: {leak}")
    num_inputs = len(list(iter_command_lines(SecretShape("", "", "")))) + 3
    print(
        f"{arguments.shapes} shapes (seed {arguments.seed}) x {num_inputs} places to type them and {len(SINKS)} to write them:"
        f" {num_leaks} taken or shown"
    )
    sys.exit(bool(num_leaks))


if __name__ == "__main__":
    main()
