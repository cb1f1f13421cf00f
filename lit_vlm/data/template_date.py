"""Deterministic chat templates: freeze the date and refuse randomness, so that a resumed run reads the same tokens.

Templates may write the date (`strftime_now`, as Llama 3's does). The date is fixed once for a run. A template whose
renderings may differ is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, date, datetime

import jinja2

from lit_vlm.types import UserError

CLOCK_FUNCTION = "strftime_now"  # transformers' function for the date
DIRECTIVES = "aAbBcCdDefFgGhHIjklmMnpPrRSTuUVwWxXyYzZ"  # of strftime, Python's %f among them
FLAGS = ("", "-", "_", "0", "^", "#", "E", "O")  # of the C library, before the directive
PERCENT_MARK = "\ue002"  # replaces %% while the directives are replaced
RANDOM_NAMES = ("lipsum", "random")  # a function and a filter of Jinja


def parse_day(text: str, setting: str) -> date:
    """Parse a date, YYYY-MM-DD. Raises UserError with the name of the setting."""
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise UserError(f"{setting}={text}: is no day; write it as YYYY-MM-DD, as 2026-05-01.") from None


def is_date_dependent(template: str) -> bool:
    """Return True if the rendered text depends on the date."""
    return any(name == CLOCK_FUNCTION for name, _ in _iter_names(template))


def validate_determinism(template: str, origin: str) -> None:
    """Validate that the template is deterministic: raise UserError if two renderings of one conversation may differ."""
    for name, is_filter in _iter_names(template):
        if name in RANDOM_NAMES and is_filter is (name == "random"):
            raise UserError(
                f"The chat template of {origin} draws by chance ({name}), so no two runs, and no two epochs, would read the "
                "same tokens. Take that out of it: model.chat_template=<a Jinja file of your own>, or chatml."
            )


def freeze_date(template: str, day: date) -> str:
    """Freeze the date: return the template with its own `strftime_now`, fixed at the beginning of the day.

    It is a macro, because transformers passes no functions to a template. Jinja removes the line that contains it.
    """
    moment = datetime(day.year, day.month, day.day)
    replacements = [("%%", PERCENT_MARK)]
    replacements.append(("%s", str(int(moment.replace(tzinfo=UTC).timestamp()))))  # in UTC on every machine
    for flag in FLAGS:
        replacements += [(f"%{flag}{letter}", moment.strftime(f"%{flag}{letter}")) for letter in DIRECTIVES]
    pairs = json.dumps([*replacements, (PERCENT_MARK, "%")], ensure_ascii=False)
    return (
        f"{{%- macro {CLOCK_FUNCTION}(format) -%}}{{%- set written = namespace(text=format) -%}}"
        f"{{%- for sign, value in {pairs} -%}}{{%- set written.text = written.text | replace(sign, value) -%}}{{%- endfor -%}}"
        f"{{{{ written.text }}}}{{%- endmacro %}}\n{template}"
    )


def _iter_names(template: str) -> Iterator[tuple[str, bool]]:
    """Yield the names that the template uses, as (name, is filter).

    A template with a syntax error yields none; its first rendering reports the error.
    """
    try:
        tokens = [token for token in jinja2.Environment().lex(template) if token[1] != "whitespace"]
    except jinja2.TemplateSyntaxError:
        return
    values = [value for _, _, value in tokens]
    arguments = [
        tokens[position + 2] for position in range(len(tokens) - 2) if values[position : position + 2] == ["map", "("]
    ]
    # `map(f)`, not `map('upper')` or `map(attribute='text')`: then any string may be the name of the filter
    maps_by_variable = any(kind == "name" and value not in ("attribute", "default") for _, kind, value in arguments)
    for position, (_, kind, value) in enumerate(tokens):
        before = values[position - 1] if position else ""
        if kind == "name" and before != ".":
            yield value, before in ("|", "filter")
        elif kind == "string" and ((before == "(" and values[max(0, position - 2)] == "map") or maps_by_variable):
            yield value[1:-1], True  # the argument of map is the name of a filter
