"""Take keys, tokens and passwords out of whatever is written, shown or sent, and refuse them where they are typed.

A secret is known by the name of what holds it (`HF_TOKEN`, `password`, `X-Api-Key`), by its own form (`hf_...`, a private
key, the password in an address), or because a variable of the environment with such a name holds the same text. No setting
needs one, so a setting that holds one is refused. What libraries say and what a program is told by its environment passes
one of three places on its way out, and each of them calls `redacted` or `redacted_text`: the terminal (`redact_terminal`),
`write_atomically` of `files.py`, and the beginning of a run of W&B.
"""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from typing import Any, TextIO
from urllib.parse import quote

from lit_vlm.secret_forms import (
    FORMS,
    HEX_DIGEST,
    NO_DIGEST_BEFORE,
    REDACTED,
    is_path,
    is_reference,
    looks_secret,
)

SHORTEST = 6  # characters of a variable's value that are looked for in other text; shorter ones are words
_WORD_OR_NUMBER = re.compile(r"[a-z]{1,8}|\d{1,5}")  # as a variable's value: found in any text

_ALONE = frozenset(
    "password passwd passphrase passcode secret secrets credential credentials authorization apikey jwt".split()
)
_GLUED = tuple("password passwd passphrase apikey secretkey accesskey privatekey clientsecret".split())  # PGPASSWORD
_GLUED += tuple("accesstoken authtoken apitoken bearertoken hftoken".split())
_OF_A_KEY = frozenset(
    "access account anthropic api app application auth aws azure bot client cohere consumer credential database db deepseek"
    " deploy encryption gcp gemini github gitlab google groq hf host hub huggingface license master mistral openai"
    " openrouter private replicate secret server service session shared signing slack ssh ssl storage stripe tls together"
    " user wandb webhook".split()
)
_OF_NO_KEY = frozenset("cache foreign group image index join map partition primary public sort text".split())
_OF_A_TOKEN = frozenset(
    "access api auth bearer bot csrf deploy git github gitlab hf hub id job personal refresh registry session slack user"
    " wandb".split()
)
_OF_A_PASS = frozenset(
    "admin db email ftp http login mail mongo mysql pg postgres proxy redis root smtp ssh sudo user".split()
)
# Ends that make a name a place, a size or a sort of the secret and not the secret itself.
_ABOUT = frozenset("file path dir directory url uri endpoint name type id ids count length size limit ttl".split())
_OF_A_VOCABULARY = frozenset(
    "added audio bbox boi bos box class cls decoder delim end eoi eos eot first forced image mask max new next num pad per"
    " prefix prompt sep special start stop suffix text unk video vision".split()
)
_ANY = object()
_FOLDERS = ("PWD", "OLDPWD")  # of a shell
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_NAME = r"(?<!\w)(?P<name>[A-Za-z_][\w.-]{0,80}+)"
# A name, and the value behind it: NAME=value, --name value, "name": "value", ${oc.env:NAME,value}; and name: value, as
# headers have it, where the value looks like no word.
_OPENS = r"(?![\s,\]}:;)]|\Z)"  # behind a quote that begins a text; else it ends the one around the name
_OF_A_SHELL = re.compile(
    r"""\$\([^)\n]*\)|`[^`\n]*`|<[^<>\n]*>|('"'"'|'\\''|\\["'])[^\n]*?\1|"[^"\n]*"|'[^'\n]*'"""
    rf"""|(?:"{_OPENS}(?:\\.|[^"\\])*"|'{_OPENS}[^']*'|\\[^"']|[^\s"'\\&;|])+"""
)
_JSON = re.compile(r"""\\?["'](?P<name>[A-Za-z_][\w.-]{0,80}+)\\?["']\s{0,4}:\s{0,4}""")
_HEADER = re.compile(rf"(?<!\.){_NAME}:[ \t]{{0,4}}")
_ASSIGNED = (
    (re.compile(rf"""{_NAME}["']?[ \t]{{0,4}}(?:=>|:=|={{1,2}})[ \t]{{0,4}}"""), _OF_A_SHELL),
    (re.compile(r"\b(?:setenv|set -g?x|ENV|ARG)[ \t]{1,4}(?P<name>[A-Za-z]\w{0,80})[ \t]{1,4}"), _OF_A_SHELL),
    (re.compile(r"(?<![\w-])--?(?P<name>[A-Za-z][\w.-]{0,80}+)\s{1,8}(?!-)"), _OF_A_SHELL),
    (_JSON, re.compile(r"""\\?"(?:\\[^"]|[^"\\])*\\?"|'[^']*'|[^\s"',}\]\\{\[]+""")),
    (re.compile(r"\$\{oc\.env:(?P<name>\w{1,80}),"), re.compile(r"[^}]+")),
    (_HEADER, re.compile(r"""[^\s"',;]{6,}""")),
)


def is_secret_name(name: str, value: Any = _ANY) -> bool:
    """Whether what has this name (a setting, a variable, a header) is a secret.

    Whole words count, of the last part of a dotted name: `submit.env.HF_TOKEN` is one, `special_tokens`, `pad_token`,
    `max_new_tokens` and `SSH_KEY_PATH` are none.

    Args:
        value: what it holds, if that is known: `token=ko` is no secret, `HF_HUB_DISABLE_IMPLICIT_TOKEN=1` neither.
    """
    strength = _strength(name.rpartition(".")[2])
    if not strength or value is _ANY:
        return strength > 0
    text = str(value)
    if is_reference(text) or (is_path(text) and "pass" not in name.lower()):
        return False
    return strength == 2 or looks_secret(text)


@cache
def _strength(name: str) -> int:
    """2: whatever it holds is a secret; 1: where its value looks like one; 0: no name of a secret."""
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or name in _FOLDERS or (words[-1] in _ABOUT and words[-2:] != ["key", "id"]):
        return 0
    last, before, capitals = words[-1], set(words[:-1]), name.isupper()
    if last == "token" and before & _OF_A_VOCABULARY:
        return 0
    if set(words) & _ALONE or any(word.endswith(_GLUED) for word in words):
        return 2
    if last in ("key", "keys") or words[-2:] == ["key", "id"]:
        kinds = set(words) - {"key", "keys", "id"}
        return 2 if kinds & _OF_A_KEY or (capitals and kinds and not kinds & _OF_NO_KEY) else 0
    telling = _OF_A_TOKEN if last == "token" else _OF_A_PASS
    if last in ("token", "pass", "pwd") and before and (capitals or before & telling):
        return 2
    # alone they are words as well
    return 1 if last in ("token", "pwd") or words in (["pass"], ["auth"]) else 0


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
    if is_secret_name(name, value):
        return REDACTED
    if isinstance(value, str):
        return value if HEX_DIGEST.fullmatch(value) and NO_DIGEST_BEFORE.search(f"{name}=") else redacted_text(value)
    return value


def redacted_text(text: str) -> str:
    """A text (a message, a command, a line of shell, an address, a file of JSON or YAML) without secrets."""
    for secret in _spellings(_values_of_environment()):
        text = text.replace(secret, REDACTED)
    for named, valued in _ASSIGNED:
        text = _without_values(text, named, valued)
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
        return
    plain = list(value) if isinstance(value, tuple) else value
    is_nan = isinstance(value, float) and value != value  # equal to nothing, itself included
    if (redacted(value, name) != plain and not is_nan) or redacted_text(name) != name:
        yield redacted_text(name)


def mistakes_of_secrets(settings: Mapping[str, Any]) -> list[str]:
    """A sentence for each setting that holds a secret; the secret is not in it."""
    return [
        f"{name}: holds a secret, and settings are written down (config.yaml, manifest.json, submit.sh, the report). Take it"
        " out and export it in your shell as a variable (HF_TOKEN, WANDB_API_KEY, or one that your own code reads); the run"
        " and its jobs inherit the shell's environment."
        for name in dict.fromkeys(places_of_secrets(settings))
    ]


def mistakes_of_typed_secrets(words: list[str]) -> list[str]:
    """The same for words of a command line, before anything reads them."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if word.lstrip().startswith("{"):
            try:
                found |= json.loads(word)
                continue
            except ValueError:
                pass
        if equals and not set(" \n{") & set(key):
            found |= {key.lstrip("+~-"): value} if redacted(value, key) != value or redacted_text(key) != key else {}
        elif redacted_text(word) != word:
            found["an argument of the command line"] = word
    return mistakes_of_secrets(found)


def agrees(one: Any, other: Any) -> bool:
    """Whether two values may be the same one, where secrets were taken out of either. Another secret is no other value."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(agrees(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(agrees, one, other))
    return one == other or _fits(one, other) or _fits(other, one)


def redact_terminal() -> None:
    """From now on what this process says, tracebacks of others among it, passes `redacted_text`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, RedactedStream):
            setattr(sys, name, RedactedStream(stream))


class RedactedStream:
    """A text stream in front of another one, which gets everything without secrets."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted_text(text) if len(text) >= SHORTEST else text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


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
        return f"{redacted_text(name)}={redacted(value, name.lstrip('+~-'))}"
    return redacted_text(word)


def _text(key: Any) -> Any:
    return redacted_text(key) if isinstance(key, str) else key


def _without_values(text: str, named: re.Pattern[str], valued: re.Pattern[str]) -> str:
    """The text without the values of secret names. Other values are looked into: `--env=HF_TOKEN=...`."""
    pieces, kept, start = [], 0, 0
    while found := named.search(text, start):
        start = found.end()
        value = valued.match(text, start) if is_secret_name(found["name"]) else None
        if value is None:
            continue
        begin, end = _inside_quotes(value[0], start)
        bare = re.split(r"['\"]", text[begin:end], maxsplit=1)[0] or text[begin:end]
        if not is_secret_name(found["name"], bare) or (named is _HEADER and not looks_secret(bare)):
            continue
        is_number = named is _JSON and begin == start  # which only quotes make a text
        pieces += [text[kept:begin], f'"{REDACTED}"' if is_number else REDACTED]
        kept = start = end
    return "".join([*pieces, text[kept:]])


def _inside_quotes(value: str, start: int) -> tuple[int, int]:
    """Where a value begins and ends without the quotes around it; those of JSON within a text are escaped."""
    quotes = re.match(r"""('"'"'|'\\''|\\?["'])(.*?)(\1)?\Z""", value, re.DOTALL)
    if quotes is None or quotes[1] in quotes[2]:
        return start, start + len(value)
    return start + quotes.start(2), start + quotes.end(2)


def _values_of_environment() -> tuple[str, ...]:
    """Values of the variables whose names say that they are secret, the longest first."""
    named = {name: os.environ.get(name, "") for name in os.environ if is_secret_name(name)}
    values = {value for name, value in named.items() if len(value) >= SHORTEST and is_secret_name(name, value)}
    words = (value for value in values if not _WORD_OR_NUMBER.fullmatch(value))
    return tuple(
        sorted((value for value in words if not os.path.exists(value)), key=lambda value: (-len(value), value))
    )


@lru_cache(maxsize=8)
def _spellings(values: tuple[str, ...]) -> tuple[str, ...]:
    """Values as a shell, JSON, HTML and an address write them, and the lines of those that have several."""
    found = dict.fromkeys(values)
    for value in values:
        found |= dict.fromkeys(line.strip() for line in value.splitlines() if len(line.strip()) >= 2 * SHORTEST)
        for text in (json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1]):
            found |= {text: None, html.escape(text): None}
        found |= dict.fromkeys(
            (
                html.escape(value),
                quote(value),
                quote(value, safe=""),
                value.replace("'", "''"),
                value.replace("'", "\\'"),
            )
        )
        found |= dict.fromkeys((shlex.quote(value).removeprefix("'").removesuffix("'"),))
    return tuple(sorted(found, key=len, reverse=True))
