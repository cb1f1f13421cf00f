"""Redact keys, tokens and passwords in everything that is written, shown or sent, and reject them in settings.

A secret is detected in three ways: by the name of its setting or variable (`HF_TOKEN`, `password`, `X-Api-Key`), by its own
form (`hf_...`, a private key, the password in a URL), or because an environment variable with such a name has the same value.
No setting needs a secret, so a setting that contains one is an error. Messages of libraries, and values from the environment,
pass one of these places on their way out, and each calls `redact` or `redact_text`: the terminal (`redact_terminal`),
`write_text_atomically` and `write_json` of `files.py`, the values of a page before they become HTML (`reports/templates.py`), and
the start of a W&B run.
"""

from __future__ import annotations

import atexit
import html
import json
import os
import re
import shlex
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, lru_cache, partial
from typing import Any, TextIO
from urllib.parse import quote

from lit_vlm.secret_patterns import (
    ASSIGNMENT_PATTERNS,
    HEADER,
    JSON_KEY,
    PROSE_SECRET_PATTERNS,
    REDACTED,
    SECRET_PATTERNS,
    is_likely_secret,
    is_path,
    is_reference,
    redact_digest,
)

MAX_PENDING_CHARACTERS = 4096  # maximum characters of an unfinished line in the buffer; a private key has fewer
_UNFINISHED_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?:(?!-----END )[A-Za-z0-9+/=\s:,-])*\Z"
)
MIN_SECRET_LENGTH = 6  # minimum characters of a variable's value to be searched in other text; shorter values are words
_WORD_OR_NUMBER = re.compile(r"[a-z]{1,8}|\d{1,5}")  # such a value of a variable would match in any text

_SECRET_WORDS = frozenset(
    "password passwd passphrase passcode secret secrets credential credentials cred creds authorization apikey jwt".split()
)
_AMBIGUOUS_SECRET_WORDS = frozenset(
    "secret secrets credential credentials cred".split()
)  # SECRET_SAUCE, CREDENTIAL_HELPER
_KOREAN_SECRET_NAME = re.compile(r"(비밀번호|패스워드|비밀키|인증키|접근키)|(암호|비번|토큰)")
_SECRET_WORD_ENDINGS = tuple(
    "password passwd passphrase apikey secretkey accesskey privatekey clientsecret".split()
)  # PGPASSWORD
_SECRET_WORD_ENDINGS += tuple("accesstoken authtoken apitoken bearertoken hftoken".split())
_SECRET_KEY_WORDS = frozenset(
    "access account anthropic api app application auth aws azure bot client cohere consumer credential database db deepseek"
    " deploy encryption gcp gemini github gitlab google groq hf host hub huggingface license master mistral openai"
    " openrouter private replicate secret server service session shared signing slack ssh ssl storage stripe tls together"
    " user wandb webhook".split()
)
_PLAIN_KEY_WORDS = frozenset("cache foreign group hash image index join map partition primary public sort text".split())
_SECRET_TOKEN_WORDS = frozenset(
    "access api auth bearer bot csrf deploy git github gitlab hf hub id job personal refresh registry session slack user"
    " wandb".split()
)
_PASSWORD_WORDS = frozenset(
    "admin db email ftp http login mail mongo mysql pg postgres proxy redis root smtp ssh sudo user".split()
)
_ACCESS_TOKEN_WORDS = frozenset("access ado azure bitbucket devops docker gh git github gitlab hf".split())
_PASSWORD_ABBREVIATIONS = tuple(  # DBPASS, -aihubpw
    word + end
    for word in sorted(
        _PASSWORD_WORDS | set("aihub api app docker git hub my nas netrc registry svn vpn web wifi".split())
    )
    for end in ("pass", "pwd", "pw")
)
# Last words of names that hold a path, a size or a type of the secret and not the secret itself.
_METADATA_WORDS = frozenset(
    "file path dir directory url uri endpoint name type id ids count length size limit ttl".split()
)
_VOCABULARY_TOKEN_WORDS = frozenset(
    "added audio bbox boi bos box class cls decoder delim end eoi eos eot first forced image mask max new next num pad per"
    " prefix prompt sep special start stop suffix text unk video vision".split()
)
_UNKNOWN_VALUE = object()
_LETTERS_AND_DIGITS = re.compile(r"(?=\D*\d)(?=[^A-Za-z]*[A-Za-z])\S{6}")
_SHELL_FOLDER_VARIABLES = ("PWD", "OLDPWD")  # set by a shell
_NAME_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# Settings that contain sentences: these may mention passwords without containing one.
_PROSE_SETTING = re.compile(r"(?:^|\.)(?:prompts?|licence|mapping\.(?:\w+\.)*(?:questions|answer|text))$")


def is_secret_name(name: str, value: Any = _UNKNOWN_VALUE) -> bool:
    """Return True if a name (of a setting, a variable or a header) marks its value as a secret.

    Whole words of the last part of a dotted name are compared: `submit.env.HF_TOKEN` is secret; `special_tokens`, `pad_token`,
    `max_new_tokens` and `SSH_KEY_PATH` are not.

    Args:
        value: the value, if known: `token=ko` and `HF_HUB_DISABLE_IMPLICIT_TOKEN=1` are not secret.
    """
    name = name.rpartition(".")[2]
    strength = _get_name_strength(name)
    if not strength or value is _UNKNOWN_VALUE:
        return strength > 0
    text = str(value)
    if is_reference(text) or (is_path(text) and "pass" not in name.lower()):
        return False
    return strength == 2 or is_likely_secret(text) or (name == "PASS" and _LETTERS_AND_DIGITS.match(text) is not None)


@cache
def _get_name_strength(name: str) -> int:
    """Return how strongly a name indicates a secret.

    2: any value is a secret; 1: a value that is likely a secret; 0: not the name of a secret.
    """
    if korean := _KOREAN_SECRET_NAME.search(name):
        return 2 if korean[1] else int(name.endswith(korean[2]))
    words = [word.lower() for word in _NAME_WORD.findall(name)]
    if not words or name in _SHELL_FOLDER_VARIABLES or (words[-1] in _METADATA_WORDS and words[-2:] != ["key", "id"]):
        return 0
    last_word, previous_words, is_uppercase = words[-1], set(words[:-1]), name.isupper()
    if last_word == "token" and previous_words & _VOCABULARY_TOKEN_WORDS:
        return 0
    if (
        (set(words) & _SECRET_WORDS) - _AMBIGUOUS_SECRET_WORDS
        or last_word in _SECRET_WORDS
        or any(word.endswith(_SECRET_WORD_ENDINGS) for word in words)
    ):
        return 2
    is_key = last_word in ("key", "keys") or words[-2:] == ["key", "id"]
    strength = (
        _get_key_name_strength(words, is_uppercase)
        if is_key
        else _get_short_name_strength(last_word, previous_words, is_uppercase)
    )
    return strength or int(bool(set(words) & _SECRET_WORDS))


def _get_key_name_strength(words: list[str], is_uppercase: bool) -> int:
    """Return the strength of a name that ends with key, keys or key id."""
    kinds = set(words) - {"key", "keys", "id"}
    if kinds & _SECRET_KEY_WORDS:
        return 1 if kinds & _PLAIN_KEY_WORDS else 2
    return int(is_uppercase and bool(kinds) and not kinds & _PLAIN_KEY_WORDS)


def _get_short_name_strength(last: str, before: set[str], is_uppercase: bool) -> int:
    """Return the strength of a name that ends with token, pass, pwd, pw or pat."""
    if last == "token":  # alone it is also an ordinary word
        return 2 if before & _SECRET_TOKEN_WORDS else 1
    if last == "pat":
        return 2 if before & _ACCESS_TOKEN_WORDS else int(is_uppercase)
    if last in ("pass", "pwd", "pw"):
        return 2 if before and (is_uppercase or before & _PASSWORD_WORDS) else int(last != "pass" or not before)
    return 2 if last in _PASSWORD_ABBREVIATIONS else int(last == "auth" and not before)


def redact(value: Any, name: str = "") -> Any:
    """Copy plain data (dictionaries, lists, texts, numbers) without secrets. Data without secrets is returned equal.

    Args:
        name: name of the value; inside a dictionary the dotted name.
    """
    return _redact(value, name, _list_environment_secrets())


def redact_text(text: str, name: str = "") -> str:
    """Redact the secrets in a text (a message, a command, a shell line, a URL, a JSON or YAML file).

    Args:
        name: name of the setting that contains the text, if any: in a prompt only tokens of a known form are redacted.
    """
    return _redact_text(text, name, _list_environment_secrets())


def _redact(value: Any, name: str, secrets: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {
            _redact_text(key, "", secrets) if isinstance(key, str) else key: _redact(
                item, f"{name}.{key}" if name else str(key), secrets
            )
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact(item, name, secrets) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if is_secret_name(name, value):
        return REDACTED
    return _redact_text(value, name, secrets) if isinstance(value, str) else value


def _redact_text(text: str, name: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    is_prose = _PROSE_SETTING.search(name) is not None
    for name_pattern, value_pattern in () if is_prose else ASSIGNMENT_PATTERNS:
        text = _remove_secret_values(text, name_pattern, value_pattern)
    for pattern, replacement in PROSE_SECRET_PATTERNS if is_prose else SECRET_PATTERNS:
        text = pattern.sub(partial(redact_digest, name=name) if replacement is redact_digest else replacement, text)
    return text


def redact_arguments(arguments: list[str]) -> list[str]:
    """Redact command-line arguments: settings by their names, JSON objects of settings by their keys."""
    return [_redact_argument(word) for word in arguments]


def find_secret_keys(value: Any) -> Iterator[str]:
    """Yield the dotted names of the values in plain data that `redact` would change."""
    yield from _find_secret_keys(value, "", _list_environment_secrets())


def _find_secret_keys(value: Any, name: str, secrets: tuple[str, ...]) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _find_secret_keys(item, f"{name}.{key}" if name else str(key), secrets)
        return
    plain = list(value) if isinstance(value, tuple) else value
    is_nan = isinstance(value, float) and value != value  # NaN is not equal to itself
    clean_name = _redact_text(name, "", secrets)
    if (_redact(value, name, secrets) != plain and not is_nan) or clean_name != name:
        yield clean_name


def find_secret_errors(settings: Mapping[str, Any]) -> list[str]:
    """Return an error message for each setting that contains a secret. The message does not contain the secret."""
    return [
        f"{name}: holds a secret, and settings are written down (config.yaml, manifest.json, submit.sh, the report). Take it"
        " out and export it in your shell as a variable (HF_TOKEN, WANDB_API_KEY, or one that your own code reads); the run"
        " and its jobs inherit the shell's environment."
        for name in dict.fromkeys(find_secret_keys(settings))
    ]


def find_typed_secret_errors(arguments: list[str]) -> list[str]:
    """Return an error message for each command-line argument that contains a secret, before the arguments are parsed."""
    suspects: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument.lstrip().startswith("{"):
            try:
                suspects |= json.loads(argument)
                continue
            except ValueError:
                pass
        if equals and not set(" \n{") & set(key):
            suspects |= {key.lstrip("+~-"): value} if redact(value, key) != value or redact_text(key) != key else {}
        elif redact_text(argument) != argument:
            suspects["an argument of the command line"] = argument
    return find_secret_errors(suspects)


def is_same_when_redacted(left: Any, right: Any) -> bool:
    """Return True if two values may be equal where secrets were redacted in either.

    A different secret is not a different value.
    """
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(is_same_when_redacted(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(is_same_when_redacted, left, right))
    return left == right or _is_redacted_form(left, right) or _is_redacted_form(right, left)


def is_same_setting(key: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Return True if a setting may be equal in two stored runs.

    A setting that one of them lacks was added or taken away by a release between them. It counts as off: null, false or empty.
    """
    if key in left and key in right:
        return is_same_when_redacted(left[key], right[key])
    value = left[key] if key in left else right[key]
    return value is None or value is False or value in ("", [], {})


def redact_terminal() -> None:
    """Redact everything that this process writes to stdout and stderr from now on, including tracebacks of libraries."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, RedactedStream):
            redacted_stream = RedactedStream(stream)
            atexit.register(redacted_stream.write_pending)
            os.register_at_fork(after_in_child=redacted_stream.drop_pending)
            setattr(sys, name, redacted_stream)


class RedactedStream:
    """Text stream that redacts secrets before it writes to another stream.

    A secret may arrive in several writes, as in `print("HF_TOKEN=", value)`. An unfinished line is therefore buffered until it
    ends, until `flush`, or until it is longer than `MAX_PENDING_CHARACTERS`.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._pending = ""
        self._lock = threading.RLock()  # re-entrant: a signal handler may write during a write

    def write(self, text: str) -> int:
        with self._lock:
            self._pending += text
            if end := _find_flush_end(self._pending):
                lines, self._pending = self._pending[:end], self._pending[end:]
                self._stream.write(redact_text(lines))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self.write_pending()
        self._stream.flush()

    def close(self) -> None:
        self.write_pending()
        self._stream.close()

    def drop_pending(self) -> None:
        """Drop the unfinished line in a forked child; the parent process writes it."""
        self._pending, self._lock = "", threading.RLock()

    def write_pending(self) -> None:
        """Redact and write the unfinished line."""
        with self._lock:
            line, self._pending = self._pending, ""
            if line and not getattr(self._stream, "closed", False):
                self._stream.write(redact_text(line))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _find_flush_end(text: str) -> int:
    """Find the end of the text that can be written now: after the last complete line, but not inside a multi-line secret."""
    if len(text) > MAX_PENDING_CHARACTERS and "\n" not in text and "\r" not in text:
        end = text.rfind(" ", 0, len(text) - MAX_PENDING_CHARACTERS // 4) + 1 or len(text)
    else:
        end = max(text.rfind("\n"), text.rfind("\r")) + 1
    if (open_key := _UNFINISHED_PRIVATE_KEY.search(text)) and len(text) - open_key.start() <= MAX_PENDING_CHARACTERS:
        end = min(end, open_key.start())
    if 0 < end < len(text) and redact_text(text) != redact_text(text[:end]) + redact_text(text[end:]):
        end = len(text) if len(text) > MAX_PENDING_CHARACTERS else 0
    return end


def _is_redacted_form(redacted_value: Any, value: Any) -> bool:
    """Return True if a value matches a text in which secrets were redacted."""
    if not isinstance(redacted_value, str) or REDACTED not in redacted_value:
        return False
    pattern = ".*".join(map(re.escape, redacted_value.split(REDACTED)))
    return re.fullmatch(pattern, str(value), re.DOTALL) is not None


def _redact_argument(argument: str) -> str:
    """Redact a command-line argument."""
    if argument.lstrip().startswith("{"):
        try:
            return json.dumps(redact(json.loads(argument)), ensure_ascii=False)
        except ValueError:
            return redact_text(argument)
    name, equals, value = argument.partition("=")
    if equals and "\n" not in name and " " not in name:
        return f"{redact_text(name)}={redact(value, name.lstrip('+~-'))}"
    return redact_text(argument)


def _remove_secret_values(text: str, name_pattern: re.Pattern[str], value_pattern: re.Pattern[str]) -> str:
    """Remove the values of secret names from a text. Other values are searched as well: `--env=HF_TOKEN=...`."""
    pieces, copied, start = [], 0, 0
    while match := name_pattern.search(text, start):
        start = match.end()
        value = value_pattern.match(text, start) if is_secret_name(match["name"]) else None
        if value is None:
            continue
        begin, end = _find_unquoted_span(value[0], start)
        bare = re.split(r"['\"]", text[begin:end], maxsplit=1)[0] or text[begin:end]
        # in a list the value ends before the closing bracket and before the next NAME=
        item = re.split(r",(?=[\w.+-]+=)", bare, maxsplit=1)[0].rstrip(")]}")
        if not all(is_secret_name(match["name"], candidate) for candidate in (bare, item)) or (
            name_pattern is HEADER and not is_likely_secret(bare)
        ):
            continue
        is_number = name_pattern is JSON_KEY and begin == start  # its replacement needs quotes
        pieces += [text[copied:begin], f'"{REDACTED}"' if is_number else REDACTED]
        copied = start = end
    return "".join([*pieces, text[copied:]])


def _find_unquoted_span(value: str, start: int) -> tuple[int, int]:
    """Find the start and the end of a value without its quotes. Quotes of JSON inside a text are escaped."""
    quotes = re.match(r"""('"'"'|'\\''|\\?["'])(.*?)(\1)?\Z""", value, re.DOTALL)
    if quotes is None or quotes[1] in quotes[2]:
        return start, start + len(value)
    return start + quotes.start(2), start + quotes.end(2)


def _list_environment_secrets() -> tuple[str, ...]:
    """List the values of environment variables with secret names in all spellings, the longest first."""
    variables = {name: os.environ.get(name, "") for name in os.environ if is_secret_name(name)}
    values = {
        value
        for name, value in variables.items()
        if len(value) >= MIN_SECRET_LENGTH and _is_exported_secret(name, value)
    }
    secrets = (value for value in values if not _WORD_OR_NUMBER.fullmatch(value))
    return _list_spellings(
        tuple(sorted((value for value in secrets if not os.path.exists(value)), key=lambda value: (-len(value), value)))
    )


def _is_exported_secret(name: str, value: str) -> bool:
    """Return True if an environment variable holds a secret. A variable named *_TOKEN or *_KEY may hold ordinary words."""
    is_text = not is_reference(value) and not is_path(value)
    return is_secret_name(name, value) or (name.isupper() and "_" in name and is_text)


@lru_cache(maxsize=8)
def _list_spellings(values: tuple[str, ...]) -> tuple[str, ...]:
    """Return values as shells, JSON, HTML and URLs write them, and the single lines of values of several lines."""
    spellings = dict.fromkeys(values)
    for value in values:
        spellings |= dict.fromkeys(
            line.strip() for line in value.splitlines() if len(line.strip()) >= 2 * MIN_SECRET_LENGTH
        )
        for text in (json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1]):
            spellings |= {text: None, html.escape(text): None}
        spellings |= dict.fromkeys(
            (
                html.escape(value),
                quote(value),
                quote(value, safe=""),
                value.replace("'", "''"),
                value.replace("'", "\\'"),
            )
        )
        spellings |= dict.fromkeys((shlex.quote(value).removeprefix("'").removesuffix("'"),))
    return tuple(sorted(spellings, key=len, reverse=True))
