"""Pages of the viewer: static files, the list of samples, and one record with its pictures and tiles."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware

from lit_vlm.demo.pages import APP_STYLE, PageSecurity, add_files
from lit_vlm.demo.pages import FOLDER as DEMO_FOLDER
from lit_vlm.reports.templates import BASE_STYLE, TEMPLATE_FOLDER
from lit_vlm.serving.app import check_token
from lit_vlm.serving.chat_request import RequestError
from lit_vlm.types import RecordError, UserError
from lit_vlm.viewer.samples import SampleFilter, SampleTable

FOLDER = Path(__file__).parent
PAGE = FOLDER / "view.html"
ASSETS = (TEMPLATE_FOLDER / BASE_STYLE, APP_STYLE, DEMO_FOLDER / "markup.js", FOLDER / "view.css", FOLDER / "view.js")
MAX_ROWS = 200  # of one answer

Part = Literal["training", "held_out"]
Number = Annotated[int, Query(ge=0)]
Limit = Annotated[int, Query(ge=1, le=MAX_ROWS)]


class Flag(BaseModel):
    """Body of a request that flags a record, or takes its flag away."""

    part: Part = "training"
    sample: Annotated[int, Field(ge=0)]
    flagged: bool


def create_view_app(
    table: SampleTable,
    title: str,
    token: str | None = None,
    allowed_hosts: list[str] | None = None,
    language: str = "auto",
) -> FastAPI:
    """Create the application of the viewer.

    Args:
        title: shown above the list, such as the name of the run.
        token: clients must send it as `Authorization: Bearer`; None: it is not needed.
        allowed_hosts: names by which browsers may address the server; None: any.
        language: language in which the page opens, "ko" or "en"; "auto": that of the browser.
    """
    app = FastAPI(openapi_url=None)
    if allowed_hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts)
    app.add_middleware(PageSecurity)
    add_files(app, PAGE, ASSETS, language)
    _add_error_answers(app)
    _add_pictures(app, table, token)

    @app.get("/view/settings")
    async def show_settings(request: Request) -> dict[str, Any]:
        check_token(request, token)
        return {"title": title, "parts": await asyncio.to_thread(table.describe)}

    @app.get("/view/samples")
    async def list_samples(
        request: Request,
        part: Part = "training",
        source: str | None = None,
        kind: str | None = None,
        language: str | None = None,
        min_tokens: int | None = None,
        max_tokens: int | None = None,
        duplicates: bool = False,
        flagged: bool = False,
        curated: str | None = None,
        offset: Number = 0,
        limit: Limit = 50,
    ) -> dict[str, Any]:
        check_token(request, token)
        wanted = SampleFilter(part, source, kind, language, min_tokens, max_tokens, duplicates, flagged, curated)
        total, rows = await asyncio.to_thread(table.list_samples, wanted, offset, limit)
        return {"total": total, "rows": rows}

    @app.get("/view/flags")
    async def show_flags(request: Request) -> dict[str, Any]:
        check_token(request, token)
        return table.flags.describe() if table.flags else {"num_flagged": 0, "settings": []}

    @app.post("/view/flags")
    async def set_flag(request: Request, flag: Flag) -> dict[str, Any]:
        check_token(request, token)
        if not table.has_sample(flag.part, flag.sample):
            raise RequestError(404, f"There is no sample {flag.sample} in {flag.part}.", "sample")
        try:
            await asyncio.to_thread(table.set_flag, flag.part, flag.sample, flag.flagged)
        except KeyError:
            raise RequestError(400, "Only records of training sources can be left out.", "sample") from None
        except UserError as error:
            raise RequestError(507, str(error)) from None
        assert table.flags is not None
        return table.flags.describe()

    @app.get("/view/errors")
    async def list_errors(
        request: Request, part: Part = "training", fault: str | None = None, offset: Number = 0, limit: Limit = 50
    ) -> dict[str, Any]:
        check_token(request, token)
        total, rows = table.list_errors(part, fault, offset, limit)
        return {"total": total, "rows": rows}

    return app


def _add_pictures(app: FastAPI, table: SampleTable, token: str | None) -> None:
    """Add the addresses of one record, of its pictures and of their tiles."""

    def require_sample(request: Request, part: str, sample: int) -> None:
        check_token(request, token)
        if not table.has_sample(part, sample):
            raise RequestError(404, f"There is no sample {sample} in {part}.", "sample")

    @app.get("/view/record")
    async def show_record(request: Request, sample: Number, part: Part = "training") -> dict[str, Any]:
        require_sample(request, part, sample)
        return await asyncio.to_thread(table.describe_sample, part, sample)

    @app.get("/view/image")
    async def show_image(request: Request, sample: Number, image: Number, part: Part = "training") -> Response:
        require_sample(request, part, sample)
        return await _make_png(table.load_image, part, sample, image)

    @app.get("/view/tile")
    async def show_tile(
        request: Request, sample: Number, image: Number, tile: Number, part: Part = "training"
    ) -> Response:
        require_sample(request, part, sample)
        return await _make_png(table.load_tile, part, sample, image, tile)


async def _make_png(load: Any, *arguments: Any) -> Response:
    try:
        return Response(await asyncio.to_thread(load, *arguments), media_type="image/png")
    except IndexError:
        raise RequestError(404, "The record has no such picture or tile.") from None


def _add_error_answers(app: FastAPI) -> None:
    """Add the answers to requests that cannot be served."""

    @app.exception_handler(RequestError)
    async def show_error(_: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(error.to_dict(), error.status)

    @app.exception_handler(RecordError)
    async def show_record_error(_: Request, error: RecordError) -> JSONResponse:
        return JSONResponse(RequestError(422, str(error), "sample", error.fault.value).to_dict(), 422)

    @app.exception_handler(RequestValidationError)
    async def show_bad_request(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        message = f"{first['loc'][-1]}: {first['msg']}."
        return JSONResponse(RequestError(400, message, str(first["loc"][-1])).to_dict(), 400)
