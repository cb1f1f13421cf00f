"""Log of chat requests and their answers on disk, so that a request that was answered once is not sent to a model again.

`recording_endpoint.py` serves it over HTTP. This module needs neither FastAPI nor a model.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lit_vlm.files import append_line, handle_write_errors, read_json_lines, replace_file

# fields without effect on the answer; the log belongs to one model, so its name is among them
_IGNORED_FIELDS = {
    *("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options"),
}
_DATA_URL = "data:"
_DIGEST = "sha256:"


@dataclass(frozen=True, slots=True)
class LoggedAnswer:
    """Answer of the log.

    Attributes:
        key: key of its request, from `compute_request_key`.
        text: the whole answer, control tokens spelled out.
        finish_reason: "stop" or "length", as the model's server said.
        usage: numbers of tokens, as the model's server counted them.
        seconds: time until the answer was there; 0 for an answer that `AnswerLog` got otherwise.
        request: the canonical request, with a digest in place of each image.
    """

    key: str
    text: str
    finish_reason: str = "stop"
    usage: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    request: dict[str, Any] = field(default_factory=dict)


class ChatAnswerLog:
    """Append-only log of answers: one JSON object per line, on disk when `add` returns. All methods are thread-safe.

    A last line that a killed process cut off is skipped, so its request is asked again. Of two lines with the same key the
    first counts.

    Args:
        path: the JSONL file; it is made by the first answer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._answers: dict[str, LoggedAnswer] = {}
        for row in read_json_lines(path):
            if (answer := _parse_answer(row)) is not None:
                self._answers.setdefault(answer.key, answer)

    def __len__(self) -> int:
        return len(self._answers)

    def __iter__(self) -> Iterator[LoggedAnswer]:
        return iter(list(self._answers.values()))

    def get(self, key: str) -> LoggedAnswer | None:
        """Return the answer of a request; None if it has none."""
        return self._answers.get(key)

    def add(self, answer: LoggedAnswer) -> None:
        """Append an answer, unless its request has one.

        Raises:
            UserError: the disk is full or the folder is not writable.
        """
        with self._lock, handle_write_errors(self.path.parent, "The answers", "run_dir"):
            if answer.key not in self._answers:
                line = json.dumps(asdict(answer), ensure_ascii=False)
                append_line(self.path, line.encode("utf-8", "backslashreplace"))
                self._answers[answer.key] = answer


class RequestFolder:
    """Folder of collected requests: `requests.jsonl` has one request per line, `images/` each of their images once.

    An image is named by its digest, as in the canonical requests, with `.bin` as suffix.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._keys = {row["key"] for row in read_json_lines(folder / "requests.jsonl") if "key" in row}

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: str, request: dict[str, Any], images: Mapping[str, bytes]) -> None:
        """Store a request, unless it is stored already.

        Args:
            request: the canonical request.
            images: encoded image files by digest.
        """
        with self._lock, handle_write_errors(self.folder, "The requests", "run_dir"):
            if key in self._keys:
                return
            for digest, data in images.items():
                path = self.get_image_path(digest)
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with replace_file(path, durable=False) as temporary:
                        temporary.write_bytes(data)
            line = json.dumps({"key": key, "request": request}, ensure_ascii=False)
            append_line(self.folder / "requests.jsonl", line.encode("utf-8", "backslashreplace"))
            self._keys.add(key)

    def get_image_path(self, digest: str) -> Path:
        """Return the path of an image's file."""
        return self.folder / "images" / f"{digest.removeprefix(_DIGEST)}.bin"

    def read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the key and the body of each stored request, with data URLs again, in the order of arrival."""
        seen: set[str] = set()
        for row in read_json_lines(self.folder / "requests.jsonl"):
            if "key" in row and row["key"] not in seen:
                seen.add(row["key"])
                yield row["key"], _replace_texts(row["request"], self._load_data_url)

    def _load_data_url(self, text: str) -> str:
        path = self.get_image_path(text)
        if not text.startswith(_DIGEST) or not path.is_file():
            return text
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"  # readers look at the bytes


def canonicalize_request(body: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Convert the body of a chat-completion request to the form that its key is made from.

    Fields without effect on the answer, such as the model's name, and fields that are null are left out. The content of each
    data URL is replaced by its SHA-256.

    Returns:
        The canonical request, and the replaced contents by digest.
    """
    contents: dict[str, bytes] = {}

    def replace_data_url(text: str) -> str:
        if not text.startswith(_DATA_URL):
            return text
        header, _, payload = text.partition(",")
        try:
            data = base64.b64decode(payload, validate=True) if header.endswith(";base64") else payload.encode()
        except (binascii.Error, ValueError):
            return text  # no image; the model's server says so
        digest = _DIGEST + hashlib.sha256(data).hexdigest()
        contents[digest] = data
        return digest

    request = {name: value for name, value in body.items() if name not in _IGNORED_FIELDS and value is not None}
    return _replace_texts(request, replace_data_url), contents


def compute_request_key(canonical: Mapping[str, Any]) -> str:
    """Compute the SHA-256 of a canonical request, 64 hexadecimal digits; the order of its fields has no effect."""
    text = json.dumps(canonical, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def describe_request(canonical: Mapping[str, Any], max_characters: int = 80) -> str:
    """Return the beginning of the last text of a request, on one line, for messages."""
    texts: list[str] = []
    for message in canonical.get("messages") or ():
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, list) else [{"text": content}]
        found = [part.get("text") for part in parts if isinstance(part, Mapping)]
        texts += [one for one in found if isinstance(one, str)]
    text = " ".join(texts[-1].split()) if texts else ""
    return text if len(text) <= max_characters else f"{text[:max_characters]}…"


def _replace_texts(value: Any, function: Any) -> Any:
    """Return a JSON value with `function` applied to each of its texts."""
    if isinstance(value, Mapping):
        return {name: _replace_texts(item, function) for name, item in value.items()}
    if isinstance(value, list):
        return [_replace_texts(item, function) for item in value]
    return function(value) if isinstance(value, str) else value


def _parse_answer(row: Mapping[str, Any]) -> LoggedAnswer | None:
    key, text = row.get("key"), row.get("text")
    if not (isinstance(key, str) and isinstance(text, str)):
        return None
    names = ("finish_reason", "usage", "seconds", "request")
    return LoggedAnswer(key, text, **{name: row[name] for name in names if name in row})
