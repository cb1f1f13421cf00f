"""HTTP around the operations: GraphQL, the stream of a run's rows, uploads."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from lit_vlm.sweep.loopback.operations import Operations
from lit_vlm.sweep.loopback.state import ENTITY, RunState, State, SweepState

KEY = "0123456789abcdef" * 2 + "01234567"  # of nobody: the server takes it, and only it
STREAM = re.compile(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream")


class Loopback:
    """The server, while its context is open.

    Args:
        port: 0 takes any that is free.
        silent_seconds: see `State`.

    Attributes:
        unknown: operations and addresses that were asked for and are not here.
        requests: names of GraphQL operations, in order.
    """

    def __init__(self, port: int = 0, silent_seconds: float = 300.0) -> None:
        self.state = State(silent_seconds)
        self.unknown: list[str] = []
        self.requests: list[str] = []
        self._lock = threading.RLock()
        self._failing: list[int] = []  # [status, how many requests more]; empty: answers
        self._http = _Server(("127.0.0.1", port), _Handler)
        self._http.owner = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._operations = Operations(self.state, self.url)

    def __enter__(self) -> Loopback:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def runs(self) -> dict[str, RunState]:
        return self.state.runs

    @property
    def sweeps(self) -> dict[str, SweepState]:
        return self.state.sweeps

    def path(self, sweep: str) -> str:
        """What `wandb agent` is given."""
        return f"{ENTITY}/{self.sweeps[sweep].project}/{sweep}"

    def environment(self, **more: str) -> dict[str, str]:
        """For a client's process: this server and key, no telemetry, nothing of the user's own W&B settings but the folders."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        own = {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_ENTITY": ENTITY,
            "WANDB_ERROR_REPORTING": "false",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return kept | own | more

    def fail(self, status: int = 500, count: int = 1 << 60) -> None:
        """Answer the next `count` requests with an error."""
        self._failing = [status, count]

    def recover(self) -> None:
        self._failing = []

    def answer(self, method: str, path: str, key: str | None, body: bytes) -> tuple[int, Any]:
        """Status and JSON to a request."""
        with self._lock:
            if self._failing and self._failing[1] > 0:
                self._failing[1] -= 1
                return self._failing[0], {"error": "out of order"}
            if path.startswith("/storage/"):  # uploads go by signed addresses, without the key
                self._operations.store(path.removeprefix("/storage/"), body)
                return 200, {}
            if key != KEY:
                return 401, {"error": "user is not logged in"}
            if found := STREAM.fullmatch(path):
                return 200, self._operations.stream(unquote(found[3]), json.loads(body or b"{}"))
            if path == "/graphql":
                return 200, self._graphql(json.loads(body))
            self.unknown.append(f"{method} {path}")
            return 404, {}

    def _graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        named = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
        name = request.get("operationName") or (named[1] if named else "?")
        self.requests.append(name)
        operation = self._operations.find(name)
        if operation is None:
            self.unknown.append(name)
            return {"data": {}}
        try:
            return {"data": operation(request.get("variables") or {})}
        except Exception as error:  # a fault of this server must show, and not be asked again for minutes
            self.unknown.append(f"{name}: {error!r}")
            return {"errors": [{"message": f"{name}: {error!r}"}]}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    owner: Loopback

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that drops an idle connection is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        path = self.path.partition("?")[0]
        status, answer = self.server.owner.answer(self.command, path, _key_in(self.headers), body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, format: str, *values: Any) -> None:
        """The terminal is the client's."""


def _key_in(headers: Any) -> str | None:
    """The key of `Authorization: Basic`, whose user is "api"."""
    kind, _, text = (headers.get("Authorization") or "").partition(" ")
    if kind.lower() != "basic":
        return None
    return base64.b64decode(text).decode(errors="replace").partition(":")[2]
