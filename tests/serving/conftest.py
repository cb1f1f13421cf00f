"""A server of the tiny model in this process, and OpenAI's own client for it."""

from contextlib import contextmanager

import pytest
from served import make_test_service, run_server, stop_servers

from lit_vlm.config.parse import parse
from lit_vlm.tasks.serve import make_service


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


def _start_servers(model, processor):
    running = []

    def start(*args, host="127.0.0.1", **settings):
        return run_server(make_test_service(model, processor, *args, **settings), running, host)

    yield start
    stop_servers(running)
