"""HTML pages from Jinja templates: each page is one self-contained file without scripts, in a common style.

Answers of a model and texts of a dataset are untrusted: a template escapes everything that is not `Markup`, and only
charts made here are `Markup`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, pass_context
from jinja2.runtime import Context
from markupsafe import Markup

from lit_vlm.files import write_text_atomically
from lit_vlm.messages import get_language, get_template, tell_count, translate
from lit_vlm.redaction import redact_text
from lit_vlm.types import escape_control_characters

TEMPLATE_FOLDER = Path(
    __file__
).parent  # of templates and style sheets; each kind of page has a folder of its own below
BASE_STYLE = "report.css"  # of every page


class PageTemplate:
    """Template of a kind of page, with its style sheets.

    Args:
        template: file name in `folder`. It includes `page_head.html`, which shows `title`.
        styles: style sheets of that folder, after `BASE_STYLE`.
        filters: functions that the template calls by name to format numbers, in addition to `counted`.

    A template writes English. Its filter `t` fills values into a text of the catalogue of messages, `translated` translates a
    finished text, and `counted` formats a count with its noun.
    """

    def __init__(
        self, template: str, *styles: str, folder: Path = TEMPLATE_FOLDER, **filters: Callable[..., str]
    ) -> None:
        self._template, self._styles = template, (TEMPLATE_FOLDER / BASE_STYLE, *(folder / name for name in styles))
        self._environment = Environment(
            loader=FileSystemLoader([folder, TEMPLATE_FOLDER]),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=redact_value,
        )
        self._environment.filters.update(counted=tell_count, t=tell_as_html, translated=translate, **filters)

    def render(self, **values: Any) -> str:
        """Render the template with these values and the style sheets. Returns HTML without secrets and control characters."""
        style = Markup("\n".join(path.read_text(encoding="utf-8") for path in self._styles))
        return escape_text(
            self._environment.get_template(self._template).render(style=style, page_language=get_language(), **values)
        )


def redact_value(value: Any) -> Any:
    """Redact secrets in a value before it is escaped as HTML, because escaping could change the spelling of a secret."""
    return redact_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@pass_context  # so that a text without values is not filled in once and for all, in the language of the first page
def tell_as_html(_: Context, text: str, **values: Any) -> Markup:
    """Fill the values into a text of the catalogue, as HTML: values are redacted and escaped, and `code` is set as code."""
    template = re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(get_template(text), quote=False))
    return Markup(template).format(**{name: redact_value(value) for name, value in values.items()})


def write_page(path: Path, page: str) -> None:
    """Write a page atomically; its folder is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, page)


def escape_text(text: str) -> str:
    """Escape control characters that a terminal or browser would obey, and characters that a file cannot hold."""
    return escape_control_characters(text)
