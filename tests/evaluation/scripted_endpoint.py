"""Endpoint of a model that can look at the pictures of made benchmarks; it can fail and stop."""

import threading
from contextlib import contextmanager

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from made_benchmarks import answer_request
from waiting import PATIENCE

from lit_vlm.serving.recording_endpoint import run_in_thread


class ScriptedModel:
    """Model behind an endpoint.

    Attributes:
        num_asked: requests so far.
        fail: returns the status with which request number n fails, 1 for the first; None: it is answered.
        gate: requests wait while it is not set.
    """

    def __init__(self, fail=lambda number: None):
        self.num_asked, self.fail, self.gate = 0, fail, threading.Event()
        self.gate.set()
        self.app = FastAPI()
        self.app.add_api_route("/v1/chat/completions", self.complete, methods=["POST"])
        self.app.add_api_route("/v1/models", lambda: {"data": [{"id": "scripted"}]})

    def complete(self, body: dict):
        self.num_asked += 1
        number = self.num_asked
        self.gate.wait(PATIENCE)
        if (status := self.fail(number)) is not None:
            return JSONResponse({"error": {"message": "the model is too small"}}, status)
        message = {"role": "assistant", "content": answer_request(body)}
        usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
        return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}

    @contextmanager
    def run(self, port=0):
        with run_in_thread(self.app, port) as url:
            yield url
