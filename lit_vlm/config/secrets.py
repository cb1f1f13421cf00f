"""What must not leave a run: keys, tokens and passwords are taken out of whatever is written, shown or sent.

A secret is known by the name of what holds it (`HF_TOKEN`, `password`, `X-Api-Key`), by its own form (`hf_...`, a private
key, the password in an address), or because a variable of the environment with such a name holds the same text. The run
itself works with the real values; `redacted` makes the copy for manifest, report, logs and trackers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from lit_vlm.config.secret_forms import FORMS, HEX_DIGEST, NO_DIGEST_BEFORE

REDACTED = "<redacted>"
SHORTEST = 6  # characters of a variable's value that are looked for in other text; shorter ones are words

_ALONE = frozenset(
    "password passwd passphrase pwd secret secrets credential credentials authorization apikey token".split()
)
_KEYS = frozenset(
    "access account api auth deploy encryption license private secret service signing ssh storage".split()
)
# Ends that make a name a place, a size or a sort of the secret and not the secret itself.
_ABOUT = frozenset("file path dir directory url uri endpoint name type id ids count length size limit ttl".split())
_OF_A_VOCABULARY = frozenset(
    "added audio bos boi cls decoder delim end eoi eos eot first forced image mask new next pad sep special start stop unk"
    " video".split()
)
_FOLDERS = ("PWD", "OLDPWD")  # of a shell
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_REFERENCE = re.compile(r"\$\w+|\$\{[^}]*\}|\$\([^)]*\)|`[^`]*`|null|none|true|false|~|<redacted>", re.IGNORECASE)
_VALUE = r"""(?P<value>(?:"(?:\\.|[^"\\])*"|'[^']*'|\\.|[^\s"'&;|])+)"""  # a word of a shell
# NAME=value, --name value, "name": "value"; and name: value, as headers have it, where the value looks like no word.
_ASSIGNED = (
    re.compile(rf"""(?P<name>[A-Za-z_][\w.-]*)["']?\s?=\s?{_VALUE}"""),
    re.compile(rf"""(?<![\w-])--?(?P<name>[A-Za-z][\w.-]*)\s+(?!-){_VALUE}"""),
    re.compile(r"""["'](?P<name>[A-Za-z_][\w.-]*)["']\s*:\s*(?P<value>"(?:\\.|[^"\\])*"|'[^']*'|[^\s"',}\]]+)"""),
    re.compile(r"""(?<![\w.])(?P<name>[A-Za-z_][\w.-]*):\s*(?P<value>(?=[^\s"']*\d)[^\s"',;]{8,})"""),
)


def is_secret_name(name: str) -> bool:
    """Whether what has this name (a setting, a variable, a header) is a secret.

    Whole words count, of the last part of a dotted name: `submit.env.HF_TOKEN` is one, `special_tokens`, `pad_token`,
    `max_new_tokens` and `SSH_KEY_PATH` are none.
    """
    return _is_secret_name(name.rpartition(".")[2])


@cache
def _is_secret_name(name: str) -> bool:
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or name in _FOLDERS or (words[-1] in _ABOUT and words[-2:] != ["key", "id"]):
        return False
    if words[-1] == "token" and set(words) & _OF_A_VOCABULARY:
        return False
    if set(words) & (_ALONE - {"token"}) or words[-1] == "token":
        return True
    pairs = zip(words, words[1:], strict=False)
    return any(first in _KEYS and second in ("key", "keys") for first, second in pairs)


def redacted(value: Any, name: str = "") -> Any:
    """A copy of plain data (dictionaries, lists, texts, numbers) without secrets. What holds none comes back equal.

    Args:
        name: what the value is called; inside a dictionary the key.
    """
    if isinstance(value, Mapping):
        return {_text(key): redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, name) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if is_secret_name(name):
        return value if isinstance(value, str) and _is_reference(value) else REDACTED
    if isinstance(value, str):
        return value if HEX_DIGEST.fullmatch(value) and NO_DIGEST_BEFORE.search(f"{name}=") else redacted_text(value)
    return value


def redacted_text(text: str) -> str:
    """A text (a message, a command, a line of shell, an address) without secrets."""
    for secret in _of_environment():
        text = text.replace(secret, REDACTED)
    for pattern in _ASSIGNED:
        text = pattern.sub(_without_value, text)
    for pattern, replacement in FORMS:
        text = pattern.sub(replacement, text)
    return text


def redacted_words(words: list[str]) -> list[str]:
    """Of a command line: settings by their names, JSON objects of settings by theirs."""
    return [_redacted_word(word) for word in words]


def places_of_secrets(value: Any, name: str = "") -> Iterator[str]:
    """Dotted names of the values in plain data that `redacted` would change."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from places_of_secrets(item, f"{name}.{key}" if name else str(key))
    elif redacted(value, name) != (list(value) if isinstance(value, tuple) else value):
        yield name


def agrees(one: Any, other: Any) -> bool:
    """Whether two values may be the same one, where secrets were taken out of either. Another secret is no other value."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(agrees(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(agrees, one, other))
    return one == other or _fits(one, other) or _fits(other, one)


def _fits(hidden: Any, value: Any) -> bool:
    if not isinstance(hidden, str) or REDACTED not in hidden:
        return False
    kept = ".*".join(map(re.escape, hidden.split(REDACTED)))
    return re.fullmatch(kept, str(value), re.DOTALL) is not None


def _redacted_word(word: str) -> str:
    if word.lstrip().startswith("{"):
        try:
            return json.dumps(redacted(json.loads(word)), ensure_ascii=False)
        except ValueError:
            return redacted_text(word)
    name, equals, value = word.partition("=")
    if equals and "\n" not in name and " " not in name:
        return f"{name}={redacted(value, name.lstrip('+~-'))}"
    return redacted_text(word)


def _text(key: Any) -> Any:
    return redacted_text(key) if isinstance(key, str) else key


def _without_value(match: re.Match[str]) -> str:
    value = match["value"]
    bare = re.split(r"['\"]", value, maxsplit=1)[0] or value.strip(
        "\"'"
    )  # a quote may close what began before the name
    if not bare or not is_secret_name(match["name"]) or _is_reference(bare):
        return match[0]
    start, end = match.span("value")
    return match[0][: start - match.start()] + REDACTED + match[0][end - match.start() :]


def _is_reference(value: str) -> bool:
    """A variable, a command or no value at all: not the secret itself."""
    return not value.strip() or _REFERENCE.fullmatch(value.strip()) is not None


def _of_environment() -> list[str]:
    """Values of the variables whose names say that they are secret, the longest first."""
    values = {value for name, value in os.environ.items() if len(value) >= SHORTEST and is_secret_name(name)}
    secret = (value for value in values if not _is_reference(value) and not os.path.exists(value))
    return sorted(secret, key=len, reverse=True)
