"""Pages of the demo: static files, the settings that they need, and a check of each picture, beside the endpoints of the models.

The page is HTML, CSS and JavaScript of this package alone. Its Content-Security-Policy allows nothing from elsewhere, no
script inside the page, and with Trusted Types no text that becomes HTML, so an answer's markup stays text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.datastructures import Headers, MutableHeaders

from lit_vlm.data.lazy_images import BytesImage
from lit_vlm.reports.templates import BASE_STYLE, TEMPLATE_FOLDER
from lit_vlm.serving.app import ChatService, create_app
from lit_vlm.serving.chat_request import RequestError
from lit_vlm.types import SPECIAL_TOKENS, RecordError

FOLDER = Path(__file__).parent
PAGE = FOLDER / "demo.html"
APP_STYLE = FOLDER / "app.css"  # of the demo and the viewer, after `BASE_STYLE`
ASSETS = (
    TEMPLATE_FOLDER / BASE_STYLE,
    APP_STYLE,
    *(FOLDER / name for name in ("demo.css", "demo.js", "markup.js", "messages.js")),
)
MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript"}
SECOND = "/second"  # where the endpoint of the second model is
MAX_CHECKED = 2  # pictures that are decoded at the same time
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:; connect-src 'self'; form-action 'none';"
        " base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]


class PageSecurity:
    """ASGI middleware: security headers on every answer, and no endpoint for the pages of other sites."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(
        self, scope: Scope, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        site = Headers(scope=scope).get("sec-fetch-site", "none")  # browsers alone send it, and no script can set it
        is_page = scope["method"] == "GET" and (scope["path"] == "/" or scope["path"].startswith("/assets/"))
        if site not in ("none", "same-origin") and not is_page:
            message = "A page of another site cannot use this server."
            error = RequestError(403, message)
            return await JSONResponse(error.to_dict(), error.status)(scope, receive, send_with_headers)
        await self.app(scope, receive, send_with_headers)


def create_demo_app(
    services: Sequence[ChatService],
    folders: Sequence[str],
    allowed_hosts: list[str] | None = None,
    language: str = "auto",
) -> FastAPI:
    """Create the application: the page, and below it the OpenAI-compatible endpoints of one or two models.

    Args:
        services: of each model; the endpoint of the first is /v1, of the second /second/v1.
        folders: the folder or hub id of each model, which the page shows.
        allowed_hosts: see `create_app`.
        language: language in which the page opens, "ko" or "en"; "auto": that of the browser.
    """
    first = services[0]
    app = create_app(first, allowed_hosts)
    checking = asyncio.Semaphore(MAX_CHECKED)
    add_files(app, PAGE, ASSETS, language)

    @app.get("/demo/settings")
    async def show_settings(request: Request) -> dict[str, Any]:
        first.check_token(request)
        bases = ("/v1", f"{SECOND}/v1")
        models = [_describe_model(*each) for each in zip(services, folders, bases, strict=False)]
        return {"models": models, "max_request_bytes": first.limits.max_request_bytes}

    @app.post("/demo/picture")
    async def check_picture(request: Request) -> dict[str, int]:
        first.check_token(request)
        async with checking:
            body = await first.read_body(request)
            height, width = await asyncio.to_thread(_measure_picture, body, first.reader.max_pixels)
        return {"height": height, "width": width}

    if len(services) > 1:
        app.mount(SECOND, create_app(services[1]))
    app.add_middleware(PageSecurity)
    return app


def add_files(app: FastAPI, page: Path, assets: Sequence[Path], language: str) -> None:
    """Add a page at `/` and its files below `/assets`; no other file can be asked for. `page` extends `app.html`."""
    files = {path.name: path.read_bytes() for path in assets}
    templates = Environment(loader=FileSystemLoader([page.parent, FOLDER]), autoescape=True, undefined=StrictUndefined)
    page_bytes = templates.get_template(page.name).render(language=language).encode()

    @app.get("/")
    async def show_page() -> Response:
        return Response(page_bytes, media_type="text/html")

    @app.get("/assets/{name}")
    async def show_asset(name: str) -> Response:
        if name not in files:
            raise RequestError(404, "There is no such file.")
        return Response(files[name], media_type=MEDIA_TYPES[Path(name).suffix])


def _describe_model(service: ChatService, folder: str, base: str) -> dict[str, Any]:
    control_ids = service.processor.template.control_ids
    return {
        "name": service.reader.model_name,
        "folder": folder,
        "base": base,
        "missing_tokens": [token for token in SPECIAL_TOKENS if token not in control_ids],
        "max_new_tokens": service.limits.max_new_tokens,
    }


def _measure_picture(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Decode a picture in memory. Returns (height, width) in pixels after EXIF rotation; RequestError if it is none."""
    try:
        width, height = BytesImage(data, "the picture", max_pixels).load().size
    except RecordError as error:
        raise RequestError(400, f"{error.reason}.", "picture", "invalid_image") from None
    return height, width
