"""Client of any OpenAI-compatible chat endpoint: retries, several requests at once, a budget, and a ledger to resume from."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lit_vlm.config.task_settings import EndpointConfig
from lit_vlm.evaluation.completion_client import (
    CompletionClient,
    EndpointError,
    RejectedError,
    RetryableError,
    get_base_url,
)
from lit_vlm.evaluation.reply_ledger import Budget, EndpointReply, ReplyLedger, estimate_usage
from lit_vlm.formatting import format_count
from lit_vlm.types import UserError

FIRST_WAIT_SECONDS, MAX_WAIT_SECONDS = 1.0, 60.0  # of the back-off, which doubles with each retry
MAX_RETRY_AFTER_SECONDS = 600.0  # an endpoint that asks for more ends the run
MAX_CONSECUTIVE_FAILURES = 10  # requests that fail one after the other, with no reply between them
GRACE_SECONDS = 10.0  # for replies on their way when the run ends with an error: they are paid


@dataclass(frozen=True, slots=True)
class EndpointRequest:
    """Request to an endpoint.

    Attributes:
        messages: in OpenAI's form.
        number: separates equal requests that need replies of their own.
        tag: anything of the caller; it is not sent.
    """

    messages: list[dict[str, Any]]
    number: int = 0
    tag: Any = None


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """Failure of one request, after its retries."""

    reason: str


Result = tuple[EndpointRequest, EndpointReply | RequestFailure]


class ChatEndpoint:
    """Client of one model of an endpoint.

    Args:
        settings: address, model and limits.
        section: section of the settings, e.g. "judge", for error messages.
        key: sent as a bearer token; None: no token is sent.
        on_wait: called from a thread with the reason and the seconds before a retry.

    Attributes:
        num_sent: requests that were sent, retries included.
        num_retried: retries.
    """

    def __init__(
        self,
        settings: EndpointConfig,
        section: str,
        key: str | None,
        ledger: ReplyLedger,
        on_wait: Callable[[str, float], None] = lambda reason, seconds: None,
    ) -> None:
        self.settings, self.section, self.ledger, self.on_wait = settings, section, ledger, on_wait
        self.budget = Budget(settings, ledger.list_usages(), section)
        self.num_sent = self.num_retried = 0
        self._has_answered, self._num_consecutive_failures, self._paused_until = False, 0, 0.0
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._client = CompletionClient(settings, section, key)

    def send_all(self, requests: Iterable[EndpointRequest]) -> Iterator[Result]:
        """Send the requests that the ledger does not answer, several at once. Yields results as they arrive.

        `requests` is read in threads, one request at a time, and only as far as there is room for more.

        Raises:
            EndpointError: the endpoint cannot be reached, or refuses all requests.
            BudgetError: the budget is used up.
        """
        feed, results = _Feed(requests, self), queue.Queue[Result | BaseException | None]()
        threads = [
            threading.Thread(target=self._work, args=(feed, results), daemon=True)
            for _ in range(self.settings.concurrency)
        ]
        for thread in threads:
            thread.start()
        num_running = len(threads)
        try:
            while num_running:
                result = results.get()
                if isinstance(result, EndpointError):
                    raise EndpointError(f"{result}{self._format_kept()}")
                if isinstance(result, BaseException):
                    raise result
                if result is None:
                    num_running -= 1
                else:
                    yield result
        finally:
            self._stop.set()
            deadline = time.monotonic() + GRACE_SECONDS
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            self._stop.clear()

    def _work(self, feed: _Feed, results: queue.Queue[Result | BaseException | None]) -> None:
        """Take requests from the feed until it ends or the run stops."""
        try:
            while not self._stop.is_set() and (item := feed.take()) is not None:
                key, body, request = item
                reply = self.ledger.get(key) or self._send(key, body, request)
                if reply is None:  # the run stops
                    return
                for each in feed.release(key, request):
                    results.put((each, reply))
        except BaseException as error:
            self._stop.set()
            results.put(error)
        finally:
            results.put(None)

    def _send(self, key: str, body: dict[str, Any], request: EndpointRequest) -> EndpointReply | RequestFailure | None:
        """Send a request with its retries. Returns None if the run stops first."""
        content = json.dumps(body).encode()
        estimate = estimate_usage(request.messages, self.settings.max_new_tokens)
        for attempt in range(self.settings.max_retries + 1):
            if not self._wait_for_turn():
                return None
            reserved, usage = self.budget.reserve(estimate), None
            try:
                with self._lock:
                    self.num_sent += 1
                    self.num_retried += attempt > 0
                reply = self._client.post(content, estimate)
                usage = reply.usage
                self.ledger.add(key, reply)
                self._has_answered, self._num_consecutive_failures = True, 0
                return reply
            except RejectedError as error:
                return self._record_failure(error.reason)
            except RetryableError as error:
                if error.is_unreachable and (attempt == self.settings.max_retries or not self._has_answered):
                    raise EndpointError(self._format_unreachable(error.reason)) from None
                if attempt == self.settings.max_retries:
                    return self._record_failure(error.reason)
                self._schedule_retry(error, attempt)
            finally:
                self.budget.settle(reserved, usage)
        raise AssertionError("the loop returns or raises")

    def _schedule_retry(self, error: RetryableError, attempt: int) -> None:
        """Set the time before which no thread sends: as the endpoint asks, else with exponential back-off and jitter."""
        seconds = error.wait_seconds
        if seconds is None:
            seconds = min(MAX_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**attempt) * random.uniform(0.75, 1.25)
        elif seconds > MAX_RETRY_AFTER_SECONDS:
            remedy = "The same command continues after that time."
            raise EndpointError(self._format_error(f"{error.reason}. It asks for {seconds:.0f} s of rest", remedy))
        self.on_wait(error.reason, seconds)
        with self._lock:
            self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    def _wait_for_turn(self) -> bool:
        """Wait until requests may be sent. Returns False if the run stops first."""
        while (seconds := self._paused_until - time.monotonic()) > 0:
            if self._stop.wait(seconds):
                return False
        return not self._stop.is_set()

    def _record_failure(self, reason: str) -> RequestFailure:
        """Count a failure. Raises EndpointError if there were too many, one after the other."""
        with self._lock:
            self._num_consecutive_failures += 1
            num_failures = self._num_consecutive_failures
        if num_failures >= MAX_CONSECUTIVE_FAILURES:
            raise EndpointError(
                self._format_error(
                    f"{num_failures} requests failed one after the other, the last one with {reason}",
                    f"Check the endpoint and {self.section}.model.",
                )
            )
        return RequestFailure(reason)

    def _format_unreachable(self, reason: str) -> str:
        return self._format_error(f"it cannot be reached ({reason})", f"Start it, or correct {self.section}.endpoint.")

    def _format_error(self, reason: str, remedy: str) -> str:
        return f"{self.section}.endpoint={self.settings.endpoint}: {reason}. {remedy}"

    def _format_kept(self) -> str:
        if not self.ledger:
            return ""
        return f" {format_count(len(self.ledger), 'reply is', 'replies are')} kept; the same command asks only for the others."


class _Feed:
    """Requests for several threads: read one at a time, and equal requests are sent once."""

    def __init__(self, requests: Iterable[EndpointRequest], endpoint: ChatEndpoint) -> None:
        self._requests, self._settings = iter(requests), endpoint.settings
        self._duplicates: dict[str, list[EndpointRequest]] = {}
        self._lock = threading.Lock()

    def take(self) -> tuple[str, dict[str, Any], EndpointRequest] | None:
        """Take the next request that no other thread is sending: its key, its body and itself; None at the end."""
        with self._lock:
            for request in self._requests:
                body = make_body(request, self._settings)
                key = compute_request_key(body, request.number)
                if key not in self._duplicates:
                    self._duplicates[key] = []
                    return key, body, request
                self._duplicates[key].append(request)
        return None

    def release(self, key: str, request: EndpointRequest) -> list[EndpointRequest]:
        """Return a request whose result has arrived, and the equal ones that waited for it."""
        with self._lock:
            return [request, *self._duplicates.pop(key)]


def make_body(request: EndpointRequest, settings: EndpointConfig) -> dict[str, Any]:
    """Make the body of a request. `settings.extra` adds and replaces fields; null removes one."""
    body = {
        "model": settings.model,
        "messages": request.messages,
        "temperature": settings.temperature,
        "max_tokens": settings.max_new_tokens,
        **settings.extra,
    }
    return {name: value for name, value in body.items() if value is not None}


def compute_request_key(body: dict[str, Any], number: int) -> str:
    """Compute the SHA-256 of a request: of its body and its number, not of the address of the endpoint."""
    text = json.dumps([body, number], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_api_key(settings: EndpointConfig, section: str) -> str | None:
    """Read the key from the environment variable that the settings name; None if they name none.

    Raises:
        UserError: the variable is not set, or its value cannot be a key.
    """
    name = settings.key_variable
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(
            f"{section}.key_variable={name}: this environment variable is not set. Export the key in your shell: export {name}=..."
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{section}.key_variable={name}: its value has characters that no key has, such as a space.")
    return key


def make_lmms_eval_variables(settings: EndpointConfig, key: str | None, *, has_full_url: bool) -> dict[str, str]:
    """Make the environment variables by which the judge tasks of lmms-eval 0.7.3 find the endpoint and its model.

    Args:
        has_full_url: the task posts to OPENAI_API_URL itself, as its MMBench tasks do. False: the URL is a base address,
            as for its `llm_judge`, which LLaVA-W uses.
    """
    base = get_base_url(settings)
    return {
        "API_TYPE": "openai",
        "OPENAI_API_URL": f"{base}/chat/completions" if has_full_url else base,
        "OPENAI_API_KEY": key or "none",  # its client demands one
        "MODEL_VERSION": str(settings.model),
    }
