"""A small chat endpoint on the loopback interface that fails as a test asks."""

import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY_VARIABLE = "TEST_JUDGE_API_KEY"


def complete(text, **message):
    """Make the body of a completion."""
    finish_reason = message.pop("finish_reason", "stop")
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish_reason}
    return {"model": "judge-2026", "choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}


class ChatServer:
    """Server whose `answer(number, body)` gives (status, body, headers), or calls `Fault` for what is not HTTP.

    Attributes:
        bodies: requests that arrived, in order.
        headers: of the last request.
        max_at_once: requests that were answered at the same time.
    """

    def __init__(self, answer, port=0):
        self.answer, self.bodies, self.headers = answer, [], {}
        self.max_at_once = self._at_once = 0
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._make_handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def port(self):
        return self._server.server_address[1]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _make_handler(server):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.bodies.append(body)
                    server.headers = self.headers
                    number = len(server.bodies) - 1
                    server._at_once += 1
                    server.max_at_once = max(server.max_at_once, server._at_once)
                with suppress(OSError):  # the client may have left
                    self.reply(server.answer(number, body))
                with server.lock:
                    server._at_once -= 1

            def reply(self, found):
                if isinstance(found, Fault):
                    found.reply(self)
                    return
                status, value, headers = (200, found, {}) if isinstance(found, dict) else found
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for name, text in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        return Handler


class Fault:
    """Reply that is not valid HTTP, or late."""

    def __init__(self, reply):
        self.reply = reply


def cut_body(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.close_connection = True


def keep_silent(seconds):
    return Fault(lambda handler: time.sleep(seconds))


def drip(handler):
    """Send a byte now and then, for ever."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.02)
