"""HTTP server of the operations: GraphQL, the file stream of a run's rows, uploads."""

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

from sweeps.wandb_server.operations import Operations
from sweeps.wandb_server.state import ENTITY, RunState, ServerState, SweepState

API_KEY = "0123456789abcdef" * 2 + "01234567"  # a fictitious key, the only one that the server accepts
STREAM_PATH = re.compile(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream")


class LoopbackServer:
    """W&B server that runs while its context is open.

    Args:
        port: 0 chooses a free port.
        heartbeat_timeout: see `ServerState`.

    Attributes:
        unknown: requested operations and paths that the server does not have.
        requests: names of the requested GraphQL operations, in order.
    """

    def __init__(self, port: int = 0, heartbeat_timeout: float = 300.0) -> None:
        self.state = ServerState(heartbeat_timeout)
        self.unknown: list[str] = []
        self.requests: list[str] = []
        self._lock = threading.RLock()
        self._failing: list[int] = []  # [status, number of requests that still fail]; empty: no request fails
        self._http = _HTTPServer(("127.0.0.1", port), _RequestHandler)
        self._http.owner = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._operations = Operations(self.state, self.url)

    def __enter__(self) -> LoopbackServer:
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
        """Return the sweep's path, the argument of `wandb agent`."""
        return f"{ENTITY}/{self.sweeps[sweep].project}/{sweep}"

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment for a client's process: this server and its key, no telemetry, no W&B settings of the user."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        settings = {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": API_KEY,
            "WANDB_ENTITY": ENTITY,
            "WANDB_ERROR_REPORTING": "false",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return inherited | settings | more

    def fail(self, status: int = 500, count: int = 1 << 60) -> None:
        """Answer the next `count` requests with an error."""
        self._failing = [status, count]

    def recover(self) -> None:
        """Answer requests again after `fail`."""
        self._failing = []

    def answer(self, method: str, path: str, key: str | None, body: bytes) -> tuple[int, Any]:
        """Handle a request; return the status and the JSON answer."""
        with self._lock:
            if self._failing and self._failing[1] > 0:
                self._failing[1] -= 1
                return self._failing[0], {"error": "out of order"}
            if path.startswith("/storage/"):  # uploads go to signed addresses, without the key
                self._operations.store_file(path.removeprefix("/storage/"), body)
                return 200, {}
            if key != API_KEY:
                return 401, {"error": "user is not logged in"}
            if match := STREAM_PATH.fullmatch(path):
                return 200, self._operations.append_rows(unquote(match[3]), json.loads(body or b"{}"))
            if path == "/graphql":
                return 200, self._handle_graphql(json.loads(body))
            self.unknown.append(f"{method} {path}")
            return 404, {}

    def _handle_graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        match = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
        name = request.get("operationName") or (match[1] if match else "?")
        self.requests.append(name)
        operation = self._operations.find(name)
        if operation is None:
            self.unknown.append(name)
            return {"data": {}}
        try:
            return {"data": operation(request.get("variables") or {})}
        except Exception as error:  # a bug of this server must be visible; otherwise the client would retry for minutes
            self.unknown.append(f"{name}: {error!r}")
            return {"errors": [{"message": f"{name}: {error!r}"}]}


class _HTTPServer(ThreadingHTTPServer):
    """HTTP server with a thread for each connection."""

    daemon_threads = True
    owner: LoopbackServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore the error of a client that drops an idle connection."""


class _RequestHandler(BaseHTTPRequestHandler):
    """Handler that passes requests to `LoopbackServer.answer`."""

    protocol_version = "HTTP/1.1"
    server: _HTTPServer

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        path = self.path.partition("?")[0]
        status, answer = self.server.owner.answer(self.command, path, _get_api_key(self.headers), body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _handle

    def log_message(self, format: str, *values: Any) -> None:
        """Print nothing: the terminal belongs to the client."""


def _get_api_key(headers: Any) -> str | None:
    """Return the key of `Authorization: Basic`, whose user is "api"; None without it."""
    kind, _, text = (headers.get("Authorization") or "").partition(" ")
    if kind.lower() != "basic":
        return None
    return base64.b64decode(text).decode(errors="replace").partition(":")[2]
