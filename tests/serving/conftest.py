"""A server of the tiny model in this process, and OpenAI's own client for it."""

import threading
from contextlib import contextmanager
from dataclasses import dataclass

import openai
import pytest
import uvicorn
from waiting import PATIENCE, until

from lit_vlm.config.parse import parse
from lit_vlm.evaluation.generation import get_end_of_answer_id
from lit_vlm.model.continuous_batching import ContinuousBatcher
from lit_vlm.serving.app import ChatService, ServerLimits, create_app
from lit_vlm.serving.chat_request import RequestReader
from lit_vlm.serving.worker import GenerationWorker
from lit_vlm.tasks.serve import format_url, list_loopback_names, make_service, open_socket


@dataclass
class Server:
    url: str
    worker: GenerationWorker

    @property
    def batcher(self):
        return self.worker.batcher

    def make_client(self, key="none", **settings):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE, **settings)


@pytest.fixture
def start_folder_server():
    """Return a function that serves an exported folder as task=serve does, and returns a client."""
    with contextmanager(_start_folder_servers)() as start:
        yield start


@pytest.fixture
def start_server(model, processor, tmp_path):
    """Return a function that starts a server of the tiny model."""
    with contextmanager(_start_servers)(model, processor) as start:
        yield start


def _start_folder_servers():
    running = []

    def start(folder):
        run = parse(["task=serve", f"init_from={folder}", "serve.model_name=tiny", "trainer.accelerator=cpu"])
        options = {"accelerator": "cpu", "seed": 0, "max_image_pixels": 10**8}
        service = make_service(str(folder), run.config.serve, run.config.model, None, **options)
        return run_server(service, running).make_client()

    yield start
    stop_servers(running)


def run_server(service, running, host="127.0.0.1"):
    """Run a service in a thread, on a free port, as task=serve does."""
    service.worker.start()
    listening = open_socket(host, 0)
    app = create_app(service, list_loopback_names(host))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    until(lambda: server.started)
    running.append((server, thread, service.worker))
    return Server(format_url(listening), service.worker)


def stop_servers(running):
    for server, thread, worker in running:
        server.should_exit = True
        thread.join()
        worker.stop()
        worker.join()


def _start_servers(model, processor):
    running = []

    def start(
        batcher_class=ContinuousBatcher, token=None, image_root=None, max_sequences=8, host="127.0.0.1", **limits
    ):
        batcher = batcher_class(model, {get_end_of_answer_id(processor)}, max_sequences=max_sequences)
        reader = RequestReader("tiny", image_root, 10**8, has_markup=True)
        settings = {
            "max_context_tokens": 2048,
            "max_new_tokens": 16,
            "max_waiting": 64,
            "max_request_bytes": 64 * 10**6,
        }
        limits = ServerLimits(**(settings | limits))
        return run_server(ChatService(reader, processor, GenerationWorker(batcher), limits, token), running, host)

    yield start
    stop_servers(running)
