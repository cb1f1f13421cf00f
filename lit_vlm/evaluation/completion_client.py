"""One request to an OpenAI-compatible endpoint: sent over HTTP, its reply parsed, its error classified."""

from __future__ import annotations

import ipaddress
import json
import time
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn
from urllib.parse import urlsplit

import httpx2

from lit_vlm.config.task_settings import EndpointConfig
from lit_vlm.evaluation.reply_ledger import EndpointReply, TokenUsage, estimate_tokens
from lit_vlm.redaction import redact_text
from lit_vlm.types import UserError

MAX_CONNECT_SECONDS = 10.0
MAX_REPLY_BYTES = 16_000_000
MAX_ERROR_CHARACTERS = 300
RETRIED_STATUSES = frozenset({408, 409, 425, 429, *range(500, 600)}) - {501, 505}
FATAL_STATUSES = {
    401: "Name the environment variable that holds its key with {section}.key_variable.",
    402: "The account has no credit.",
    403: "The key in {section}.key_variable may not use it.",
    404: "Check {section}.endpoint, which usually ends in /v1, and {section}.model.",
    405: "Check {section}.endpoint, which usually ends in /v1.",
}


class EndpointError(UserError):
    """Error of an endpoint that concerns all requests."""


class RetryableError(Exception):
    """Error that may be gone at the next attempt.

    Args:
        wait_seconds: rest that the endpoint asks for.
        is_unreachable: there was no connection.
    """

    def __init__(self, reason: str, wait_seconds: float | None = None, *, is_unreachable: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.wait_seconds, self.is_unreachable = reason, wait_seconds, is_unreachable


class RejectedError(Exception):
    """Error of one request that every attempt would repeat."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class CompletionClient:
    """HTTP client of one endpoint, for several threads.

    Args:
        settings: address, timeout and number of connections.
        section: section of the settings, e.g. "judge", for error messages.
        key: sent as a bearer token; None: no token is sent.
    """

    def __init__(self, settings: EndpointConfig, section: str, key: str | None) -> None:
        self.settings, self.section = settings, section
        base_url = get_base_url(settings)
        self.url = f"{base_url}/chat/completions"
        seconds = settings.timeout_seconds
        self._client = httpx2.Client(
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=httpx2.Timeout(seconds, connect=min(seconds, MAX_CONNECT_SECONDS), pool=None),
            limits=httpx2.Limits(max_connections=settings.concurrency),
            follow_redirects=False,  # the key belongs to this address
            trust_env=not is_loopback_url(base_url),  # no proxy between two programs of one machine
        )

    def post(self, content: bytes, estimate: TokenUsage) -> EndpointReply:
        """Send one request once. The reply has to be complete within twice the timeout.

        Args:
            content: body of the request.
            estimate: tokens of the request, used if the endpoint does not report them.

        Raises:
            RetryableError, RejectedError, EndpointError: see the classes.
        """
        deadline = time.monotonic() + 2 * self.settings.timeout_seconds
        data = bytearray()
        try:
            with self._client.stream("POST", self.url, content=content) as response:
                for chunk in response.iter_bytes():
                    data += chunk
                    if time.monotonic() > deadline or len(data) > MAX_REPLY_BYTES:
                        raise RetryableError("the reply is too slow or too long")
        except httpx2.ConnectError as error:
            raise RetryableError(f"{error}", is_unreachable=True) from None
        except httpx2.ConnectTimeout:
            raise RetryableError("no connection in time", is_unreachable=True) from None
        except httpx2.TimeoutException:
            raise RetryableError(f"no reply within {self.settings.timeout_seconds:g} s") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise RetryableError(f"the connection broke ({type(error).__name__})") from None
        if response.status_code == 200:
            return parse_completion(bytes(data), estimate)
        self._raise_status_error(response, bytes(data))

    def _raise_status_error(self, response: httpx2.Response, data: bytes) -> NoReturn:
        """Raise the error of a status other than 200."""
        status, text = response.status_code, extract_error_text(data)
        reason = f"HTTP {status}{f': {text}' if text else ''}"
        if status == 429 and "insufficient_quota" in text:
            raise EndpointError(self._format_error(reason, FATAL_STATUSES[402]))
        if status in RETRIED_STATUSES:
            raise RetryableError(reason, parse_retry_after(response.headers.get("retry-after")))
        if status in FATAL_STATUSES:
            raise EndpointError(self._format_error(reason, FATAL_STATUSES[status].format(section=self.section)))
        if 300 <= status < 400:
            target = response.headers.get("location", "no address")
            remedy = (
                f"Redirects are not followed. If the address is right, set {self.section}.endpoint to its base address."
            )
            raise EndpointError(self._format_error(f"{reason}, to {target}", remedy))
        raise RejectedError(reason)

    def _format_error(self, reason: str, remedy: str) -> str:
        return f"{self.section}.endpoint={self.settings.endpoint}: {reason}. {remedy}"


def parse_completion(data: bytes, estimate: TokenUsage) -> EndpointReply:
    """Parse the body of a chat completion.

    Args:
        estimate: tokens of the request, used if the endpoint does not report them.
    """
    try:
        value = json.loads(data)
        choice = value["choices"][0]
        message = choice["message"]
        content = message.get("content")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        text = extract_error_text(data)
        raise RetryableError(f"the reply is no chat completion{f': {text}' if text else ''}") from None
    if isinstance(content, list):  # parts
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    if not isinstance(content, str | None):
        raise RetryableError("the reply is no chat completion: its content is no text")
    finish_reason = str(choice.get("finish_reason") or "")
    refusal = message.get("refusal")
    text = content or (refusal if isinstance(refusal, str) else "")
    estimate = replace(estimate, output_tokens=estimate_tokens(text))
    return EndpointReply(
        text=redact_text(text, "prompt"),  # the name of a text in prose
        is_refused=bool(refusal) or finish_reason == "content_filter",
        finish_reason=finish_reason,
        model=str(value.get("model") or ""),
        usage=_parse_usage(value.get("usage"), estimate),
    )


def _parse_usage(usage: Any, estimate: TokenUsage) -> TokenUsage:
    names = ("prompt_tokens", "completion_tokens")
    counts = [usage.get(name) for name in names] if isinstance(usage, dict) else []
    numbers = [count for count in counts if type(count) is int and count >= 0]
    return TokenUsage(numbers[0], numbers[1]) if len(numbers) == len(names) else estimate


def extract_error_text(data: bytes) -> str:
    """Extract the message of an error body in OpenAI's form, or the start of any other body, without secrets."""
    text = data.decode("utf-8", "replace").strip()
    try:
        error = json.loads(text)["error"]
        text = f"{error['message']} ({error['code']})" if error.get("code") else str(error["message"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    text = " ".join(redact_text(text[: 4 * MAX_ERROR_CHARACTERS]).split())
    return text if len(text) <= MAX_ERROR_CHARACTERS else f"{text[:MAX_ERROR_CHARACTERS]}..."


def parse_retry_after(value: str | None) -> float | None:
    """Parse the header Retry-After, a number of seconds or a date: seconds from now; None if it is missing or neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
        return seconds if 0 <= seconds < float("inf") else None
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def get_base_url(settings: EndpointConfig) -> str:
    """Return the address of an endpoint without a slash at its end. The settings were checked before."""
    assert settings.endpoint is not None
    return settings.endpoint.rstrip("/")


def is_loopback_url(url: str) -> bool:
    """Return True if the host of a URL is this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
