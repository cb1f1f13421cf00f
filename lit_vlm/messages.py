"""Language of pages and messages, Korean or English, and the catalogue of their texts. Imports nothing of the package.

The code writes English. A key of the catalogue is the English text with {placeholders} for its values. `tell` fills in a text of
a page (`TEXTS`). `translate` takes a finished text, such as an error or a finding, and finds its entry (`SENTENCES`) by the words
around its values. A text without an entry stays English.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from string import Formatter

from lit_vlm.messages_ko import COUNTS, SENTENCES, TEXTS

LANGUAGES = ("en", "ko")
AUTO = "auto"
LOCALE_VARIABLES = ("LC_ALL", "LC_MESSAGES", "LANG")  # the first that is set counts, as POSIX says
# Placeholders whose values are texts themselves, or lists of them
TEXT_VALUES = ("reason", "remedy", "problem", "faults", "comparison", "count", "place")
COUNTED_NOUN = re.compile(r"([\d,.]+) ([^\d\W]+(?: early| way| is)?)")
_chosen: dict[str, str] = {}


def set_language(choice: str) -> None:
    """Set the language of this process: "ko", "en", or "auto" for that of the environment."""
    if choice == AUTO:
        _chosen.clear()
    else:
        _chosen["language"] = choice


def get_language() -> str:
    """Return the language of this process, "ko" or "en"."""
    return _chosen.get("language") or find_language(os.environ)


def find_language(environment: Mapping[str, str]) -> str:
    """Find the language of a locale: Korean if it is one, else English."""
    locale = next((environment[name] for name in LOCALE_VARIABLES if environment.get(name)), "")
    return "ko" if re.match(r"ko([_.@-]|$)", locale) else "en"


def tell(text: str, **values: object) -> str:
    """Fill the values into a text of the catalogue, in the language of this process."""
    return get_template(text).format(**values)


def get_template(text: str) -> str:
    """Return the text of the catalogue in the language of this process, with its placeholders."""
    return TEXTS.get(text, text) if get_language() == "ko" else text


def tell_count(count: int, noun: str, plural: str | None = None) -> str:
    """Format a count with its noun, as `format_count`, in the language of this process."""
    if get_language() == "ko" and noun in COUNTS:
        return COUNTS[noun].format(f"{count:,}")
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def translate(text: str) -> str:
    """Translate a finished English text into the language of this process; a text that the catalogue lacks stays as it is."""
    return text if get_language() == "en" else _translate_to_korean(text)


def _translate_to_korean(text: str) -> str:
    """Translate a text, a list of texts on lines of their own, or a count with its noun."""
    for catalogue in (TEXTS, SENTENCES):
        if text in catalogue:
            return catalogue[text]
    if (match := COUNTED_NOUN.fullmatch(text)) and (korean := _translate_count(match[1], match[2])):
        return korean
    for pattern in _list_patterns():
        if (values := pattern.match(text)) is not None:
            return SENTENCES[pattern.key].format(
                **{name: _translate_value(name, value) for name, value in values.items()}
            )
    if "\n" in text:
        return "\n".join(_translate_line(line) for line in text.split("\n"))
    return text


def _translate_line(line: str) -> str:
    mark = "- " if line.startswith("- ") else ""
    return mark + _translate_to_korean(line.removeprefix(mark))


def _translate_value(name: str, value: str) -> str:
    if name not in TEXT_VALUES:
        return value
    return ", ".join(map(_translate_to_korean, value.split(", "))) if name == "faults" else _translate_to_korean(value)


def _translate_count(number: str, noun: str) -> str:
    """Translate a count with its noun, which may be in the plural; "" without an entry."""
    for name in (noun, noun.removesuffix("s"), noun.removesuffix("es")):
        if name in COUNTS:
            return COUNTS[name].format(number)
    return f"{TEXTS[noun]} {number}" if noun in TEXTS else ""


@dataclass(frozen=True, slots=True)
class TextPattern:
    """Text with placeholders: `literals` stand around the values of `names`, one more than these."""

    key: str
    names: tuple[str, ...]
    literals: tuple[str, ...]

    def match(self, text: str) -> dict[str, str] | None:
        """Return the values in a text of this form, none of them empty; None if it has another form."""
        first, last = self.literals[0], self.literals[-1]
        if not (text.startswith(first) and text.endswith(last)):
            return None
        start, end, values = len(first), len(text) - len(last), dict[str, str]()
        for name, literal in zip(self.names[:-1], self.literals[1:-1], strict=True):
            stop = text.find(literal, start + 1, end)
            if stop < 0:
                return None
            values[name], start = text[start:stop], stop + len(literal)
        values[self.names[-1]] = text[start:end]
        return values if end > start else None


@lru_cache(maxsize=1)
def _list_patterns() -> list[TextPattern]:
    """List the keys with placeholders, those with the most words first."""
    patterns = [make_pattern(key) for key in SENTENCES if "{" in key]
    return sorted(patterns, key=lambda pattern: -sum(map(len, pattern.literals)))


def make_pattern(key: str) -> TextPattern:
    """Make the pattern of a key with at least one placeholder."""
    parts = [(literal, name) for literal, name, _, _ in Formatter().parse(key)]
    literals = [literal for literal, _ in parts]
    if parts[-1][1] is not None:
        literals.append("")
    return TextPattern(key, tuple(name for _, name in parts if name is not None), tuple(literals))


def find_choice(arguments: list[str]) -> str:
    """Find `language=` among the arguments of a command line, before they are checked; "auto" without a valid one."""
    named = [text.partition("=")[2] for text in arguments if text.startswith("language=")]
    return named[-1] if named and named[-1] in LANGUAGES else AUTO
