"""A server in this process, and models that answer a given text."""

import base64
import io
import threading
from dataclasses import dataclass

import openai
import uvicorn
from waiting import PATIENCE, until

from lit_vlm.evaluation.generation import get_end_of_answer_id
from lit_vlm.model.continuous_batching import ContinuousBatcher
from lit_vlm.serving.app import ChatService, ServerLimits, create_app
from lit_vlm.serving.chat_request import RequestReader
from lit_vlm.serving.worker import GenerationWorker
from lit_vlm.tasks.serve import format_url, list_loopback_names, open_socket


@dataclass
class Server:
    url: str
    worker: GenerationWorker | None

    @property
    def batcher(self):
        return self.worker.batcher

    def make_client(self, key="none", **settings):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE, **settings)


def run_server(service, running, host="127.0.0.1"):
    """Run a service in a thread, on a free port, as task=serve does."""
    return run_app(create_app(service, list_loopback_names(host)), [service], running, host)


def run_app(app, services, running, host="127.0.0.1", port=0):
    """Run an application of these services in a thread."""
    for service in services:
        service.worker.start()
    listening = open_socket(host, port)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    until(lambda: server.started)
    workers = [service.worker for service in services]
    running.append((server, thread, workers))
    return Server(format_url(listening), workers[0] if workers else None)


def stop_servers(running):
    for server, thread, workers in running:
        server.should_exit = True
        thread.join()
        for worker in workers:
            worker.stop()
            worker.join()
    running.clear()


def make_test_service(
    model,
    processor,
    batcher_class=ContinuousBatcher,
    name="tiny",
    token=None,
    image_root=None,
    max_sequences=8,
    **limits,
):
    """Make the service of a model, with a batcher of this class."""
    batcher = batcher_class(model, {get_end_of_answer_id(processor)}, max_sequences=max_sequences)
    reader = RequestReader(name, image_root, 10**8, has_markup=True)
    settings = {
        "max_context_tokens": 2048,
        "max_new_tokens": 16,
        "max_waiting": 64,
        "max_request_bytes": 64 * 10**6,
    }
    return ChatService(reader, processor, GenerationWorker(batcher), ServerLimits(**(settings | limits)), token)


class ScriptedBatcher(ContinuousBatcher):
    """Batcher whose model answers `tokens`, whatever it computes."""

    tokens: list[int]

    def _choose_tokens(self, hidden, sequences):
        super()._choose_tokens(hidden, sequences)
        for sequence in sequences:
            sequence.ids[-1] = self.tokens[len(sequence.ids) - 1]


def make_data_url(image, image_format="PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return f"data:image/{image_format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def script(processor, text, ends=True):
    tokens = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return type("Scripted", (ScriptedBatcher,), {"tokens": tokens + [get_end_of_answer_id(processor)] * ends})
