"""The comments of a sweep file: why each range is what it is."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

_COMMENT = re.compile(r"(?:^|\s)#\s?(.*)$")


def reasons_in(path: Path) -> dict[str, str]:
    """By dotted key: the comments above a parameter, behind its name and inside it, as one text. {} of what is no file."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    lines = text.splitlines()
    parameters = next((value for key, value in getattr(root, "value", []) if key.value == "parameters"), None)
    return _reasons(parameters, lines, "")


def _reasons(node: yaml.Node | None, lines: list[str], prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in getattr(node, "value", []):
        name = f"{prefix}{key.value}"
        nested = next((inner for word, inner in getattr(value, "value", []) if _word(word) == "parameters"), None)
        if nested is not None:
            found |= _reasons(nested, lines, f"{name}.")
            continue
        first, last = key.start_mark.line, value.end_mark.line
        if isinstance(value, yaml.CollectionNode) and not value.flow_style:
            last -= 1  # a block ends where the next one begins
        above = first
        while above and lines[above - 1].strip().startswith("#"):
            above -= 1
        inside = lines[above : last + 1]
        while len(inside) > first - above + 1 and (not inside[-1].strip() or inside[-1].strip().startswith("#")):
            inside.pop()  # those are the next one's
        texts = [match[1].strip() for line in inside if (match := _COMMENT.search(line))]
        found[name] = " ".join(texts)
    return found


def _word(node: object) -> str:
    return str(getattr(node, "value", ""))
