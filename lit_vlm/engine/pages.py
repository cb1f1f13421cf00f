"""HTML pages from Jinja templates: each page is one self-contained file without scripts, in a common style.

Answers of a model and texts of a dataset are untrusted: a template escapes everything that is not `Markup`, and only
charts made here are `Markup`.
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

HERE = Path(__file__).parent  # of templates and style sheets; each kind of page has a folder of its own below
STYLE = "report.css"  # of every page


class Page:
    """Template of a kind of page, with its style sheets.

    Args:
        template: file name in `folder`. It includes `page_head.html`, which shows `title`.
        styles: style sheets of that folder, after `BASE_STYLE`.
        filters: functions that the template calls by name to format numbers, in addition to `counted`.
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
        """Render the template with these values and the style sheets. Returns HTML without secrets and control characters."""
        style = Markup("\n".join(path.read_text(encoding="utf-8") for path in self._styles))
        return sayable(self._environment.get_template(self._template).render(style=style, **values))


def without_secrets(value: Any) -> Any:
    """Redact secrets in a value before it is escaped as HTML, because escaping could change the spelling of a secret."""
    return redacted_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def write_page(path: Path, page: str) -> None:
    """Write a page atomically; its folder is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)


def sayable(text: str) -> str:
    """Escape control characters that a terminal or browser would obey, and characters that a file cannot hold."""
    return escape_controls(text)
