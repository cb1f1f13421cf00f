"""What a chat template makes of the day and of chance: a run reads the same tokens on whatever day it goes on.

Templates may write the day (`strftime_now`, as Llama 3's does). The day is fixed once for a run; what would differ from one
rendering to the next is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, date, datetime

import jinja2

from lit_vlm.types import UserError

CLOCK = "strftime_now"  # transformers' function for the day
DIRECTIVES = "aAbBcCdDefFgGhHIjklmMnpPrRSTuUVwWxXyYzZ"  # of strftime, Python's %f among them
FLAGS = ("", "-", "_", "0", "^", "#", "E", "O")  # in front of a directive, as the C library has them
PERCENT = "\ue002"  # stands for a sign of per cent while the others are looked for
CHANCE = ("lipsum", "random")  # a function and a filter of Jinja's


def parse_day(text: str, setting: str) -> date:
    """Read a day, YYYY-MM-DD. UserError naming the setting that it stands in."""
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise UserError(f"{setting}={text}: is no day; write it as YYYY-MM-DD, as 2026-05-01.") from None


def writes_day(template: str) -> bool:
    """Tell whether what the template renders hangs on the day."""
    return any(name == CLOCK for name, _ in _names_in(template))


def refuse_chance(template: str, origin: str) -> None:
    """Raise UserError where two renderings of one conversation may differ."""
    for name, is_filter in _names_in(template):
        if name in CHANCE and is_filter is (name == "random"):
            raise UserError(
                f"The chat template of {origin} draws by chance ({name}), so no two runs, and no two epochs, would read the "
                "same tokens. Take that out of it: model.chat_template=<a Jinja file of your own>, or chatml."
            )


def fix_day(template: str, day: date) -> str:
    """Give the template a `strftime_now` of its own, which stands still at the beginning of a day.

    It is a macro, for transformers hands no functions to a template, in a line in front of it, which Jinja takes away.
    """
    moment = datetime(day.year, day.month, day.day)
    steps = [("%%", PERCENT)]
    steps.append(("%s", str(int(moment.replace(tzinfo=UTC).timestamp()))))  # of no machine's own time zone
    for flag in FLAGS:
        steps += [(f"%{flag}{letter}", moment.strftime(f"%{flag}{letter}")) for letter in DIRECTIVES]
    pairs = json.dumps([*steps, (PERCENT, "%")], ensure_ascii=False)
    return (
        f"{{%- macro {CLOCK}(format) -%}}{{%- set written = namespace(text=format) -%}}"
        f"{{%- for sign, value in {pairs} -%}}{{%- set written.text = written.text | replace(sign, value) -%}}{{%- endfor -%}}"
        f"{{{{ written.text }}}}{{%- endmacro %}}\n{template}"
    )


def _names_in(template: str) -> Iterator[tuple[str, bool]]:
    """Yield the names that the template looks up, each with whether it is a filter; none of what does not parse, which the
    first rendering tells."""
    try:
        tokens = [token for token in jinja2.Environment().lex(template) if token[1] != "whitespace"]
    except jinja2.TemplateSyntaxError:
        return
    words = [value for _, _, value in tokens]
    arguments = [tokens[place + 2] for place in range(len(tokens) - 2) if words[place : place + 2] == ["map", "("]]
    # by `map(f)`, not by `map('upper')` or `map(attribute='text')`: then any text may be the name
    maps_by_variable = any(kind == "name" and value not in ("attribute", "default") for _, kind, value in arguments)
    for place, (_, kind, value) in enumerate(tokens):
        before = words[place - 1] if place else ""
        if kind == "name" and before != ".":
            yield value, before in ("|", "filter")
        elif kind == "string" and ((before == "(" and words[max(0, place - 2)] == "map") or maps_by_variable):
            yield value[1:-1], True  # map takes the name of a filter
