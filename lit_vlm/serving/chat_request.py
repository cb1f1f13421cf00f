"""Request of /v1/chat/completions in OpenAI's schema: checked field by field, and turned into a conversation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_vlm.data.lazy_images import format_untrusted
from lit_vlm.data.readers.context import ReaderSettings, RecordContext
from lit_vlm.data.readers.messages import read_turns
from lit_vlm.types import Language, LazyImage, Message, RecordError, Role

# fields without effect on the answer
_IGNORED_FIELDS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_USED_FIELDS = {
    *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream"),
    "stream_options",
}
# fields with the only value that is served; it is also what an absent field means
_FIXED_FIELDS: dict[str, Any] = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logprobs": False,
    "logit_bias": {},
    "tools": [],
    "functions": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "skip_special_tokens": False,
    "parallel_tool_calls": True,
}
_IMAGE_URL = "data:image/"
MAX_STOP_STRINGS = 4


class RequestError(Exception):
    """Error that a client can correct, in OpenAI's form: status, message, the field and a code."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def to_dict(self) -> dict[str, Any]:
        """Return the body of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A checked request.

    Attributes:
        max_new_tokens: None: the server's default.
        temperature: 0, the default: greedy decoding.
        stop: texts that end the answer; they are not a part of it.
        include_usage: a stream ends with the numbers of tokens.
    """

    messages: tuple[Message, ...]
    images: tuple[LazyImage, ...]
    max_new_tokens: int | None
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


@dataclass(frozen=True, slots=True)
class RequestReader:
    """Reader of requests to one model.

    Attributes:
        model_name: the name that clients use.
        image_root: folder whose files may be named as images; None: only `data:` URLs.
        max_pixels: larger images are refused.
        has_markup: the model has the control tokens of boxes, so markup in texts becomes control tokens.
    """

    model_name: str
    image_root: Path | None
    max_pixels: int
    has_markup: bool

    def read(self, body: Any) -> ChatRequest:
        """Read the body of a request.

        Raises:
            RequestError: with the field that is wrong.
        """
        if not isinstance(body, Mapping):
            raise RequestError(400, "The body must be a JSON object with 'model' and 'messages'.")
        body = {key: value for key, value in body.items() if value is not None}
        _check_fields(body)
        name = body.get("model", self.model_name)
        if name != self.model_name:
            message = f"There is no model {format_untrusted(name)}; this server has {self.model_name!r}."
            raise RequestError(404, message, "model", "model_not_found")
        messages, images = self._read_messages(body.get("messages"))
        options = body.get("stream_options", {})
        if not isinstance(options, Mapping):
            raise RequestError(400, "stream_options must be an object.", "stream_options")
        return ChatRequest(
            messages,
            images,
            _read_max_tokens(body),
            temperature=_read_number(body, "temperature", 0.0, 0.0, 2.0),
            top_p=_read_number(body, "top_p", 1.0, 1e-6, 1.0),
            seed=_read_seed(body),
            stop=_read_stop(body),
            stream=_read_flag(body, "stream"),
            include_usage=_read_flag(options, "include_usage"),
        )

    def _read_messages(self, turns: Any) -> tuple[tuple[Message, ...], tuple[LazyImage, ...]]:
        if not isinstance(turns, list) or not turns:
            raise RequestError(400, "messages must be a list with at least one message.", "messages")
        turns = [_translate_turn(turn) for turn in turns]
        if self.image_root is None:
            _require_data_urls(turns)
        try:
            messages, images = read_turns(turns, (), self._make_context(), "messages")
        except RecordError as error:
            raise RequestError(400, f"{error.reason}.", "messages") from None
        _check_turn_order(messages)
        return messages, images

    def _make_context(self) -> RecordContext:
        settings = ReaderSettings(
            source="request",
            format="messages",
            image_root=self.image_root or Path(os.devnull),
            max_pixels=self.max_pixels,
            language=Language.auto,
            kind=None,
            markup=self.has_markup,
            marks_are_text=True,  # "<image>" in a client's text is text
        )
        return RecordContext("the request", settings)


def _check_fields(body: Mapping[str, Any]) -> None:
    for key, value in body.items():
        if key in _FIXED_FIELDS and value != _FIXED_FIELDS[key]:
            message = f"{key}={format_untrusted(value, 40)} is not served; only {_FIXED_FIELDS[key]!r} is."
            raise RequestError(400, message, key, "unsupported_value")
        if key not in {*_USED_FIELDS, *_IGNORED_FIELDS, *_FIXED_FIELDS}:
            raise RequestError(
                400, f"The field {format_untrusted(key, 40)} is not served.", str(key)[:40], "unsupported_parameter"
            )


def _translate_turn(turn: Any) -> Any:
    """Return a message in the form of a record: OpenAI's `developer` is the system, and `name` has no effect."""
    if not isinstance(turn, Mapping):
        return turn
    turn = {key: value for key, value in turn.items() if value is not None and key not in ("name", "refusal")}
    return {**turn, "role": "system"} if turn.get("role") == "developer" else turn


def _require_data_urls(turns: list[Any]) -> None:
    """Refuse images that are not in the request itself: no path of the server is opened, and no URL is fetched."""
    for number, turn in enumerate(turns):
        content = turn.get("content") if isinstance(turn, Mapping) else None
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, Mapping) or part.get("type") in ("text", "input_text", "output_text"):
                continue
            for key in ("image_url", "image", "path", "url"):
                value = part.get(key)
                value = value.get("url") if isinstance(value, Mapping) else value
                if value is not None and not (isinstance(value, str) and value.startswith(_IMAGE_URL)):
                    message = (
                        f"messages[{number}]: an image must be in the request, as a data URL ({_IMAGE_URL}png;base64,...). "
                        "This server opens files only below serve.image_root, which is not set, and fetches no URL."
                    )
                    raise RequestError(400, message, "messages", "invalid_image_url")


def _check_turn_order(messages: tuple[Message, ...]) -> None:
    first = 1 if messages[0].role is Role.system else 0
    for number, message in enumerate(messages[first:]):
        expected = (Role.user, Role.assistant)[number % 2]
        if message.role is not expected:
            text = f"messages[{number + first}] is the {message.role}'s; user and assistant take turns, user first."
            raise RequestError(400, text, "messages")
    if messages[-1].role is not Role.user:
        raise RequestError(400, "The last message must be the user's.", "messages")


def _read_max_tokens(body: Mapping[str, Any]) -> int | None:
    given = [key for key in ("max_completion_tokens", "max_tokens") if key in body]
    if not given:
        return None
    value = body[given[0]]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        message = f"{given[0]} must be a whole number from 1 on, found {format_untrusted(value, 40)}."
        raise RequestError(400, message, given[0])
    return value


def _read_number(body: Mapping[str, Any], key: str, default: float, low: float, high: float) -> float:
    value = body.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        low_text = "above 0" if low == 1e-6 else f"from {low:g}"
        message = f"{key} must be a number {low_text} to {high:g}, found {format_untrusted(value, 40)}."
        raise RequestError(400, message, key)
    return float(value)


def _read_seed(body: Mapping[str, Any]) -> int:
    value = body.get("seed")
    if value is None:
        return int.from_bytes(os.urandom(8), "big")
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(400, f"seed must be a whole number, found {format_untrusted(value, 40)}.", "seed")
    return value % 2**64


def _read_stop(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get("stop", [])
    texts = [value] if isinstance(value, str) else value
    is_valid = isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)
    if not is_valid or len(texts) > MAX_STOP_STRINGS:
        raise RequestError(400, f"stop must be a text or a list of at most {MAX_STOP_STRINGS} texts.", "stop")
    return tuple(texts)


def _read_flag(body: Mapping[str, Any], key: str) -> bool:
    value = body.get(key, False)
    if not isinstance(value, bool):
        raise RequestError(400, f"{key} must be true or false, found {format_untrusted(value, 40)}.", key)
    return value
