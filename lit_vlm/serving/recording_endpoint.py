"""OpenAI-compatible endpoint in front of another one, with a log: a request that was answered once is answered from the log.

So every harness resumes at the item where it was interrupted, and its requests can be counted, replayed and collected.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

import httpx2
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from lit_vlm.serving.answer_log import (
    ChatAnswerLog,
    LoggedAnswer,
    RequestFolder,
    canonicalize_request,
    compute_request_key,
    describe_request,
)
from lit_vlm.serving.chat_request import RequestError
from lit_vlm.types import UserError

START_SECONDS = 60.0  # within which the endpoint listens, on a slow machine
LOOPBACK_HOSTS = ["localhost", "127.0.0.1", "::1"]


class RecordingMode(StrEnum):
    """Action for a request that is not in the log."""

    record = "record"  # ask the upstream endpoint, and keep its answer
    replay = "replay"  # refuse it
    collect = "collect"  # store the whole request, and return a placeholder as its answer


@dataclass(frozen=True, slots=True)
class Upstream:
    """Endpoint that is asked.

    Attributes:
        base_url: URL before /chat/completions, such as http://127.0.0.1:8000/v1.
        model: name of the model there; None: as the client writes it.
        api_key: sent as `Authorization: Bearer`; None: none is sent.
        timeout_seconds: maximum time without a byte of the answer.
    """

    base_url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout_seconds: float = 600.0

    @property
    def is_local(self) -> bool:
        """True if the endpoint is on this machine, so that no proxy is used."""
        return urlsplit(self.base_url).hostname in LOOPBACK_HOSTS

    def make_client(self) -> httpx2.AsyncClient:
        """Make a client. No redirect is followed."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx2.Limits(max_connections=None)
        return httpx2.AsyncClient(
            headers=headers, timeout=self.timeout_seconds, trust_env=not self.is_local, limits=limits
        )


@dataclass(slots=True)
class RequestCounts:
    """Numbers of requests since the start.

    Attributes:
        received: all chat requests.
        answered: requests that got an answer, also one that another equal request waited for.
        from_log: answered from the log.
        asked: answered by the upstream endpoint.
        collected: answered with the placeholder.
        refused: not in the log, in replay mode.
    """

    received: int = 0
    answered: int = 0
    from_log: int = 0
    asked: int = 0
    collected: int = 0
    refused: int = 0


class AnswerRecorder:
    """Recorder: it answers requests from the log, and does with others what its mode says.

    Attributes:
        counts: numbers of requests.
        failures: requests without an answer by key: the beginning of the question and the error. A request that is answered
            later is taken out.
        asking_seconds: time during which the upstream endpoint had at least one request.
    """

    def __init__(
        self,
        log: ChatAnswerLog,
        mode: RecordingMode = RecordingMode.record,
        upstream: Upstream | None = None,
        requests: RequestFolder | None = None,
        placeholder: str = "",
    ) -> None:
        assert (mode is RecordingMode.record) == (upstream is not None)
        assert (mode is RecordingMode.collect) == (requests is not None)
        self.log, self.mode, self.upstream = log, mode, upstream
        self.requests, self.placeholder = requests, placeholder
        self.counts = RequestCounts()
        self.failures: dict[str, tuple[str, str]] = {}
        self.asking_seconds = 0.0
        self._num_asking, self._asking_since = 0, 0.0
        self._running: dict[str, asyncio.Task[LoggedAnswer]] = {}
        self._client: httpx2.AsyncClient | None = None

    @asynccontextmanager
    async def open_client(self, _: FastAPI) -> AsyncIterator[None]:
        """Keep connections to the upstream endpoint for the lifetime of the application."""
        if self.upstream is None:
            yield
            return
        async with self.upstream.make_client() as self._client:
            yield

    async def answer(self, raw: bytes) -> dict[str, Any]:
        """Answer the body of a chat-completion request. Returns the body of the response.

        Raises:
            RequestError: the request is unusable or unknown, or the upstream endpoint gave no answer.
        """
        self.counts.received += 1
        body, canonical, key, images = await asyncio.to_thread(_read_request, raw)
        try:
            found = await self._find_answer(body, canonical, key, images)
        except RequestError as error:
            self.failures[key] = (describe_request(canonical), f"{error.status}: {error.message}")
            raise
        self.failures.pop(key, None)
        self.counts.answered += 1
        return _make_response(found, str(body.get("model", "")))

    async def _find_answer(
        self, body: dict[str, Any], canonical: dict[str, Any], key: str, images: dict[str, bytes]
    ) -> LoggedAnswer:
        if (found := self.log.get(key)) is not None:
            self.counts.from_log += 1
            return found
        if self.mode is RecordingMode.collect:
            assert self.requests is not None
            await asyncio.to_thread(self.requests.add, key, canonical, images)
            self.counts.collected += 1
            return LoggedAnswer(key, self.placeholder)
        if self.mode is RecordingMode.replay:
            self.counts.refused += 1
            message = f"The log has no answer to this request: {key} ({describe_request(canonical)!r})."
            raise RequestError(404, message, "messages", "answer_not_found")
        if key not in self._running:  # else two equal requests at once would be asked twice
            task = asyncio.create_task(self._ask(body, canonical, key))
            self._running[key] = task
            task.add_done_callback(lambda _: self._running.pop(key, None))
        # A client that leaves does not end the request of another one, and the answer is kept for the next run
        return await asyncio.shield(self._running[key])

    async def _ask(self, body: dict[str, Any], canonical: dict[str, Any], key: str) -> LoggedAnswer:
        """Ask the upstream endpoint, and append its answer to the log."""
        assert self.upstream is not None and self._client is not None
        if self.upstream.model is not None:
            body = {**body, "model": self.upstream.model}
        started = time.monotonic()
        try:
            with self._measure_asking():
                response = await self._client.post(f"{self.upstream.base_url}/chat/completions", json=body)
        except httpx2.TimeoutException:
            seconds = self.upstream.timeout_seconds
            raise RequestError(504, f"{self.upstream.base_url} gave no answer within {seconds:g} s.") from None
        except httpx2.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise RequestError(502, f"{self.upstream.base_url} cannot be reached: {reason}.") from None
        answer = _read_answer(response, key, time.monotonic() - started, canonical)
        await asyncio.to_thread(self.log.add, answer)
        self.counts.asked += 1
        return answer

    @contextmanager
    def _measure_asking(self) -> Iterator[None]:
        if self._num_asking == 0:
            self._asking_since = time.monotonic()
        self._num_asking += 1
        try:
            yield
        finally:
            self._num_asking -= 1
            if self._num_asking == 0:
                self.asking_seconds += time.monotonic() - self._asking_since


def create_recording_app(recorder: AnswerRecorder) -> FastAPI:
    """Create the application: /v1/chat/completions, /v1/models and /health."""
    app = FastAPI(openapi_url=None, lifespan=recorder.open_client)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_HOSTS)  # no web page of another site asks it

    @app.exception_handler(RequestError)
    async def show_error(_: Request, error: RequestError) -> JSONResponse:
        # The second header tells OpenAI's client that the same request would fail again
        headers = {"Retry-After": "1"} if error.status == 429 else {"x-should-retry": "false"}
        return JSONResponse(error.to_dict(), error.status, headers)

    @app.post("/v1/chat/completions")
    async def complete_chat(request: Request) -> JSONResponse:
        return JSONResponse(await recorder.answer(await request.body()))

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        name = (recorder.upstream.model if recorder.upstream else None) or "recorded"
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "lit_vlm"}]}

    @app.get("/health")
    async def show_health() -> dict[str, str]:
        return {"status": "ok"}

    return app


@contextmanager
def run_in_thread(app: FastAPI, port: int = 0) -> Iterator[str]:
    """Serve an application on this machine in a thread for the duration of a block. Yields its URL, which ends in /v1.

    Args:
        port: port to listen on; 0: a free one.

    Raises:
        UserError: the port is in use.
    """
    try:
        listening = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise UserError(f"Port {port} of 127.0.0.1 cannot be used: {error.strerror or error}.") from None
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, args=([listening],), name="endpoint", daemon=True)
    thread.start()
    try:
        end = time.monotonic() + START_SECONDS
        while not server.started:
            if not thread.is_alive() or time.monotonic() > end:
                raise UserError(f"The endpoint on port {listening.getsockname()[1]} did not start.")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@contextmanager
def run_recorder(recorder: AnswerRecorder, port: int = 0) -> Iterator[str]:
    """Serve a recorder, as `run_in_thread` does: `with run_recorder(AnswerRecorder(ChatAnswerLog(path), mode)) as base_url:`."""
    with run_in_thread(create_recording_app(recorder), port) as url:
        yield url


def _read_request(raw: bytes) -> tuple[dict[str, Any], dict[str, Any], str, dict[str, bytes]]:
    """Read the body of a request. Returns it, its canonical form, its key and its images by digest."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise RequestError(400, "The body is not JSON.") from None
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise RequestError(400, "The body must be a JSON object with 'messages'.", "messages")
    if body.get("stream"):
        raise RequestError(400, "This endpoint streams no answers; leave out stream.", "stream")
    if body.get("n", 1) not in (1, None):
        raise RequestError(400, "This endpoint keeps one answer for each request; leave out n.", "n")
    body.pop("stream", None)
    canonical, images = canonicalize_request(body)
    return body, canonical, compute_request_key(canonical), images


def _read_answer(response: httpx2.Response, key: str, seconds: float, canonical: dict[str, Any]) -> LoggedAnswer:
    """Read the answer in a response of the upstream endpoint. RequestError if it has none: errors are never answers."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.status_code != 200:
        error = body.get("error") if isinstance(body, dict) else None
        error = error if isinstance(error, dict) else {"message": error if isinstance(error, str) else None}
        message = str(error.get("message") or f"The model's endpoint answered {response.status_code}.")
        status = response.status_code if response.status_code >= 400 else 502
        raise RequestError(status, message, error.get("param"), error.get("code"))
    try:
        choice = body["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise RequestError(502, "The model's endpoint answered without a text.")
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair has no bytes
    usage = body["usage"] if isinstance(body.get("usage"), dict) else {}
    return LoggedAnswer(key, text, str(choice.get("finish_reason") or "stop"), usage, round(seconds, 3), canonical)


def _make_response(answer: LoggedAnswer, model: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
    body = {"id": f"chatcmpl-{answer.key[:32]}", "object": "chat.completion", "created": int(time.time())}
    return body | {"model": model, "choices": [choice], "usage": answer.usage or None}
