"""What all pages share: one file each, self-contained, without scripts, in one style.

What a model said, and what a dataset says, is foreign text: a template escapes everything that is not `Markup`, and
only drawings made here are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lit_vlm.files import write_atomically
from lit_vlm.secrets import redacted_text
from lit_vlm.types import counted, escape_controls

HERE = Path(__file__).parent  # of templates and style sheets, those of a kind of page in its folder
STYLE = "report.css"  # of every page


class Page:
    """A kind of page.

    Args:
        template: in `folder`. It includes `page_head.html`, which shows `title`.
        styles: sheets of that folder, behind `STYLE`.
        filters: what the template calls by name to write a number, beside `counted`.
    """

    def __init__(self, template: str, *styles: str, folder: Path = HERE, **filters: Callable[..., str]) -> None:
        self._template, self._styles = template, (HERE / STYLE, *(folder / name for name in styles))
        self._environment = Environment(
            loader=FileSystemLoader([folder, HERE]),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=without_secrets,
        )
        self._environment.filters.update(counted=counted, **filters)

    def render(self, **values: Any) -> str:
        style = Markup("\n".join(path.read_text(encoding="utf-8") for path in self._styles))
        return sayable(self._environment.get_template(self._template).render(style=style, **values))


def without_secrets(value: Any) -> Any:
    """What a page shows of a value, before it is written as HTML, in which a secret would be spelled otherwise."""
    return redacted_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def write_page(path: Path, page: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)


def sayable(text: str) -> str:
    """The text with what a terminal or a browser obeys, and what no file can hold, written as escapes."""
    return escape_controls(text)
