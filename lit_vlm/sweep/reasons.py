"""Comments of a sweep file: the reason for each range."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

_COMMENT = re.compile(r"(?:^|\s)#\s?(.*)$")


def read_comments(path: Path) -> dict[str, str]:
    """Read the comments of each parameter (above it, after its name, and inside it) as one text, by dotted key.

    Returns {} if there is no such file.
    """
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    lines = text.splitlines()
    parameters = next((value for key, value in getattr(root, "value", []) if key.value == "parameters"), None)
    return _collect_comments(parameters, lines, "")


def _collect_comments(node: yaml.Node | None, lines: list[str], prefix: str) -> dict[str, str]:
    comments: dict[str, str] = {}
    for key, value in getattr(node, "value", []):
        name = f"{prefix}{key.value}"
        nested = next(
            (inner for inner_key, inner in getattr(value, "value", []) if _get_scalar(inner_key) == "parameters"), None
        )
        if nested is not None:
            comments |= _collect_comments(nested, lines, f"{name}.")
            continue
        first, last = key.start_mark.line, value.end_mark.line
        if isinstance(value, yaml.CollectionNode) and not value.flow_style:
            last -= 1  # the end mark of a block is the first line of the next one
        above = first
        while above and lines[above - 1].strip().startswith("#"):
            above -= 1
        own_lines = lines[above : last + 1]
        while len(own_lines) > first - above + 1 and (
            not own_lines[-1].strip() or own_lines[-1].strip().startswith("#")
        ):
            own_lines.pop()  # these comments belong to the next parameter
        texts = [match[1].strip() for line in own_lines if (match := _COMMENT.search(line))]
        comments[name] = " ".join(texts)
    return comments


def _get_scalar(node: object) -> str:
    return str(getattr(node, "value", ""))
