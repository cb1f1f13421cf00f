"""The demo's application in this process, with scripted answers."""

from dataclasses import dataclass
from typing import Any

import pytest
from browsing import browser, open_page  # noqa: F401
from served import Server, make_test_service, run_app, script, stop_servers

from lit_vlm.demo.pages import create_demo_app
from lit_vlm.tasks.serve import list_loopback_names
from lit_vlm.types import SPECIAL_TOKENS

ANSWER = "<obj>빨간 원</obj><bbox>0.1, 0.2, 0.5, 0.6</bbox>이 있어요. <b>굵게</b>"


@dataclass
class Demo:
    """A running demo; `batchers` hold the tokens that its models answer."""

    server: Server
    services: list[Any]
    running: list[Any]

    @property
    def url(self) -> str:
        return f"{self.server.url}/"


@pytest.fixture
def start_demo(model, processor):
    """Return a function that starts the demo of models that answer these texts."""
    running = []

    def start(*answers, names=("tiny", "other"), ends=True, without_tokens=(), port=0, **settings):
        answers = answers or (ANSWER,)
        settings = {"max_new_tokens": 1500} | settings
        services = [
            make_test_service(model, processor, script(processor, text, ends), name, **settings)
            for text, name in zip(answers, names, strict=False)
        ]
        for number in without_tokens:
            services[number].processor = Tokenless(processor)
        folders = [f"runs/{name}/hf" for name in names]
        app = create_demo_app(services, folders, list_loopback_names("127.0.0.1"))
        return Demo(run_app(app, services, running, port=port), services, running)

    yield start
    stop_servers(running)


class Tokenless:
    """Processor of a model that has none of the control tokens."""

    def __init__(self, processor):
        self._processor = processor
        self.template = TokenlessTemplate(processor.template)

    def __getattr__(self, name):
        return getattr(self._processor, name)


class TokenlessTemplate:
    def __init__(self, template):
        self._template = template
        self.control_ids = {key: value for key, value in template.control_ids.items() if key not in SPECIAL_TOKENS}

    def __getattr__(self, name):
        return getattr(self._template, name)
