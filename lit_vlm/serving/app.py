"""OpenAI-compatible HTTP interface of one model: /v1/chat/completions, /v1/models and /health.

It is an application of our own, not transformers' server, whose generation step, processor, error answers and image loading
would all have to be replaced through private names (docs/serving.md lists them).
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.evaluation.generation import get_end_of_answer_id, make_prompt_sample
from lit_vlm.model.continuous_batching import DecodingParams
from lit_vlm.model.generate import find_prompt_positions
from lit_vlm.serving.chat_request import ChatRequest, RequestError, RequestReader
from lit_vlm.serving.worker import AnswerEnd, GenerationWorker, Job, TextDelta, TextStream
from lit_vlm.types import Batch, RecordError

MAX_READ = 8  # requests whose bodies are read at the same time, which bounds the memory; the others wait
MAX_PREPARED = 2  # requests whose images are decoded at the same time
MAX_READ_SECONDS = 120.0  # for the body of a request, so that slow clients do not keep the places of others


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Limits of the server.

    Attributes:
        max_context_tokens: maximum tokens of a prompt with its answer.
        max_new_tokens: maximum tokens of an answer, for a request that sets none.
        max_waiting: requests in the server, active ones included; one more is refused with status 429.
        max_request_bytes: maximum length of the body of a request.
    """

    max_context_tokens: int
    max_new_tokens: int
    max_waiting: int
    max_request_bytes: int


class ChatService:
    """Service of one model: it prepares requests, gives them to the worker and reads the answers.

    Args:
        token: clients must send it as `Authorization: Bearer`; None: it is not needed.
    """

    def __init__(
        self,
        reader: RequestReader,
        processor: Processor,
        worker: GenerationWorker,
        limits: ServerLimits,
        token: str | None = None,
    ) -> None:
        self.reader, self.processor, self.worker, self.limits = reader, processor, worker, limits
        self._token = token
        self._stop_id = get_end_of_answer_id(processor)
        self._num_preparing = 0
        self._reading, self._preparing = asyncio.Semaphore(MAX_READ), asyncio.Semaphore(MAX_PREPARED)
        self.started = int(time.time())

    def check_token(self, request: Request) -> None:
        """Raise a RequestError if the request lacks the server's token."""
        check_token(request, self._token)

    async def answer(self, request: Request) -> JSONResponse | StreamingResponse:
        """Answer a request, at once or as a stream of events."""
        num_requests = self._num_preparing + self.worker.num_jobs
        if num_requests >= self.limits.max_waiting:
            message = f"The server has {num_requests} requests (serve.max_waiting). Try again later."
            raise RequestError(429, message, code="rate_limit_exceeded")
        self._num_preparing += 1
        try:
            async with self._reading:
                body = await self.read_body(request)
                async with self._preparing:
                    chat, job = await asyncio.to_thread(self._prepare, body, asyncio.get_running_loop())
            self.worker.submit(job)
        finally:
            self._num_preparing -= 1
        if chat.stream:
            return StreamingResponse(self._stream(job, chat), media_type="text/event-stream")
        return await self._answer_at_once(request, job)

    async def read_body(self, request: Request) -> bytes:
        """Read the body of a request. RequestError if it is too long or does not arrive in time."""
        body = bytearray()
        try:
            async with asyncio.timeout(MAX_READ_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self.limits.max_request_bytes:
                        message = f"The request is longer than {self.limits.max_request_bytes:,} bytes (serve.max_request_mb)."
                        raise RequestError(413, message, code="request_too_large")
        except TimeoutError:
            message = f"The body of the request did not arrive within {MAX_READ_SECONDS:.0f} s."
            raise RequestError(408, message, code="request_timeout") from None
        return bytes(body)

    def _prepare(self, body: bytes, loop: asyncio.AbstractEventLoop) -> tuple[ChatRequest, Job]:
        """Read the request, and encode its conversation and images. Runs in a thread."""
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            raise RequestError(400, "The body is not JSON.") from None
        chat = self.reader.read(values)
        try:
            batch = collate(self.processor, [make_prompt_sample(chat.messages, chat.images)])
        except RecordError as error:
            raise RequestError(400, f"{error.reason}.", "messages", "invalid_image") from None
        max_new_tokens = self._limit_new_tokens(batch, chat.max_new_tokens)
        params = DecodingParams(max_new_tokens, chat.temperature, chat.top_p, chat.seed)
        return chat, Job(batch, params, TextStream(self._decode, chat.stop), loop)

    def _limit_new_tokens(self, batch: Batch, wanted: int | None) -> int:
        num_prompt_tokens = len(find_prompt_positions(batch)[0])
        limit = self.limits.max_context_tokens
        if num_prompt_tokens + (wanted or 1) > limit:
            found = f"{num_prompt_tokens} tokens of the prompt" + (f" and max_tokens={wanted}" if wanted else "")
            message = f"{found}, and this model has {limit} for both. Send a shorter prompt, fewer images or a smaller max_tokens."
            raise RequestError(400, message, "messages", "context_length_exceeded")
        return wanted or min(self.limits.max_new_tokens, limit - num_prompt_tokens)

    def _decode(self, ids: list[int]) -> str:
        """Decode tokens of an answer, control tokens spelled out; the tokens that end it are left out."""
        tokenizer = self.processor.tokenizer
        skipped = (self._stop_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        return tokenizer.decode([token for token in ids if token not in skipped], skip_special_tokens=False)

    async def _answer_at_once(self, request: Request, job: Job) -> JSONResponse:
        """Wait for the whole answer. When the client leaves, the answer is given up."""
        gone = asyncio.create_task(_wait_for_disconnect(request))
        text = ""
        try:
            while True:
                event = asyncio.create_task(job.events.get())
                await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    return JSONResponse({}, 499)
                found = event.result()
                if isinstance(found, AnswerEnd):
                    break
                text += found.text
        finally:
            job.is_cancelled = True
            gone.cancel()
        if found.error:
            raise RequestError(500, f"The answer could not be generated: {found.error}")
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": found.finish_reason,
        }
        return JSONResponse(self._make_body("chat.completion") | {"choices": [choice], "usage": _count_tokens(found)})

    async def _stream(self, job: Job, chat: ChatRequest) -> AsyncIterator[str]:
        """Yield server-sent events. When the client leaves, this generator is closed, and the answer is given up."""
        body = self._make_body("chat.completion.chunk")

        def make_event(delta: dict[str, Any], finish_reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
            return _format_event(body | {"choices": [choice]})

        try:
            yield make_event({"role": "assistant", "content": ""})
            while isinstance(event := await job.events.get(), TextDelta):
                yield make_event({"content": event.text})
            if event.error:
                error = RequestError(500, f"The answer could not be generated: {event.error}")
                yield _format_event(error.to_dict())
                return
            yield make_event({}, event.finish_reason)
            if chat.include_usage:
                yield _format_event(body | {"choices": [], "usage": _count_tokens(event)})
            yield "data: [DONE]\n\n"
        finally:
            job.is_cancelled = True

    def _make_body(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.reader.model_name,
        }


def create_app(service: ChatService, allowed_hosts: list[str] | None = None) -> FastAPI:
    """Create the application.

    Args:
        allowed_hosts: names by which clients may address the server, so that a web page elsewhere cannot; None: any.
    """
    app = FastAPI(openapi_url=None)
    if allowed_hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts)
    model = {"id": service.reader.model_name, "object": "model", "created": service.started, "owned_by": "lit_vlm"}

    @app.exception_handler(RequestError)
    async def show_error(_: Request, error: RequestError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.to_dict(), error.status, headers)

    @app.exception_handler(404)
    async def show_missing_page(request: Request, _: Exception) -> JSONResponse:
        message = f"There is no {request.url.path}; this server has /v1/chat/completions, /v1/models and /health."
        return JSONResponse(RequestError(404, message).to_dict(), 404)

    @app.post("/v1/chat/completions")
    async def complete_chat(request: Request) -> Any:
        service.check_token(request)
        return await service.answer(request)

    @app.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        service.check_token(request)
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def show_model(request: Request, name: str) -> dict[str, Any]:
        service.check_token(request)
        if name != model["id"]:
            message = f"There is no model {name!r}; this server has {model['id']!r}."
            raise RequestError(404, message, "model", "model_not_found")
        return model

    @app.get("/health")
    async def show_health() -> dict[str, str]:
        return {"status": "ok"}

    return app


def check_token(request: Request, token: str | None) -> None:
    """Raise a RequestError if the server has a token and the request lacks it."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
        message = "This server needs its token: 'Authorization: Bearer <LIT_VLM_TOKEN>' (api_key of the client)."
        raise RequestError(401, message, code="invalid_api_key")


async def _wait_for_disconnect(request: Request) -> None:
    with suppress(Exception):
        while (await request.receive())["type"] != "http.disconnect":
            pass


def _count_tokens(end: AnswerEnd) -> dict[str, int]:
    total = end.num_prompt_tokens + end.num_tokens
    return {"prompt_tokens": end.num_prompt_tokens, "completion_tokens": end.num_tokens, "total_tokens": total}


def _format_event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
