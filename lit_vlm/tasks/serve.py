"""task=serve: an OpenAI-compatible server of a finished model."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_vlm.config import Run
from lit_vlm.config.schema import DataConfig, ModelConfig, TrainerConfig
from lit_vlm.config.task_settings import ServeConfig
from lit_vlm.evaluation.generation import get_end_of_answer_id
from lit_vlm.fault_tolerance.signals import EXIT_STATUS, StopRequest, use_listener
from lit_vlm.model.continuous_batching import ContinuousBatcher
from lit_vlm.serving.chat_request import RequestReader
from lit_vlm.serving.worker import GenerationWorker
from lit_vlm.tasks.pretrained import open_pretrained
from lit_vlm.tasks.terminal import say
from lit_vlm.types import SPECIAL_TOKENS, UserError

try:
    import uvicorn

    from lit_vlm.serving.app import ChatService, ServerLimits, create_app
except ImportError:  # packages of the extra `serve`
    uvicorn = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from fastapi import FastAPI

TOKEN_VARIABLE = "LIT_VLM_TOKEN"


def serve(run: Run) -> None:
    """Serve the model at `init_from` until the process is stopped.

    Raises:
        UserError: no model is given, a package is missing, the port is in use, or a token is missing.
    """
    init_from = require_server("serve", run.init_from)
    config, settings = run.config, run.config.serve
    token = read_token(settings.host)
    with open_socket(settings.host, settings.port) as listening:  # first: loading a large model takes minutes
        options = make_service_options(config.trainer, config.data, config.seed)
        service = make_service(init_from, settings, config.model, token, **options)
        app = create_app(service, list_loopback_names(settings.host) if token is None else None)
        text = f"{service.reader.model_name}: serving on {format_url(listening)}/v1. Ctrl-C ends it."
        run_server(app, [service], listening, text)


def require_server(task: str, init_from: str | None) -> str:
    """Require the packages of a server and a model; return `init_from`. UserError if one is missing."""
    require_server_packages(task)
    if init_from is None:
        raise UserError(
            f"task={task} needs a model: init_from=runs/<name>/hf, or the hub id of a model of LLaVA's, LLaVA-NeXT's or LLaVA-OneVision's class."
        )
    return init_from


def require_server_packages(task: str) -> None:
    """Require the packages of a server. UserError if one is missing."""
    if uvicorn is None:
        raise UserError(f"task={task} needs FastAPI and Uvicorn: pip install -e '.[serve]' -c constraints.txt")


def make_service_options(trainer: TrainerConfig, data: DataConfig, seed: int) -> dict[str, Any]:
    """Make the options of `make_service` from the settings."""
    return {"accelerator": trainer.accelerator, "seed": seed, "max_image_pixels": data.max_image_pixels}


def run_server(app: FastAPI, services: Sequence[ChatService], listening: socket.socket, text: str) -> None:
    """Run an application and the workers of its models until the process is stopped.

    Args:
        text: shown when the server listens.

    Raises:
        SystemExit: after a signal, with its exit status.
    """
    for service in services:
        service.worker.start()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]  # this process has a handler of its own
    requests: list[StopRequest] = []

    def stop(request: StopRequest) -> None:
        requests.append(request)
        server.should_exit = True

    say(text)
    with use_listener(stop):
        server.run(sockets=[listening])
    for service in services:
        service.worker.stop()
        service.worker.join()
    if requests:
        raise SystemExit(EXIT_STATUS[requests[0]])


def make_service(
    init_from: str, settings: ServeConfig, model_settings: ModelConfig, token: str | None, **options: Any
) -> ChatService:
    """Load the model and make its service; the worker is not started yet.

    Args:
        token: see `ChatService`.
        options: accelerator, seed and max_image_pixels.
    """
    max_pixels = options.pop("max_image_pixels")
    pretrained = open_pretrained(init_from, model_settings, **options)
    processor = pretrained.processor
    reader = RequestReader(
        model_name=settings.model_name or get_model_name(init_from),
        image_root=resolve_image_root(settings),
        max_pixels=max_pixels,
        has_markup=all(token in processor.template.control_ids for token in SPECIAL_TOKENS),
    )
    model = pretrained.load()
    batcher = ContinuousBatcher(
        model,
        {get_end_of_answer_id(processor)},
        max_sequences=settings.max_sequences,
        max_cache_tokens=settings.max_cache_tokens,
    )
    limits = ServerLimits(
        max_context_tokens=min(model.config.text_config.max_position_embeddings, settings.max_cache_tokens),
        max_new_tokens=settings.max_new_tokens,
        max_waiting=settings.max_waiting,
        max_request_bytes=settings.max_request_mb * 10**6,
    )
    return ChatService(reader, processor, GenerationWorker(batcher), limits, token)


def read_token(host: str) -> str | None:
    """Read the token of the server from the environment. UserError if the address needs one and there is none."""
    token = os.environ.get(TOKEN_VARIABLE) or None
    if token is None and not is_loopback(host):
        raise UserError(
            f"serve.host={host} can be reached from other machines, and {TOKEN_VARIABLE} is not set. Put a secret of at least 16 "
            f"characters into the environment variable {TOKEN_VARIABLE}, which clients send as their api_key, or leave out serve.host."
        )
    if token is not None and len(token) < 16:
        raise UserError(f"{TOKEN_VARIABLE} has {len(token)} characters; a token needs at least 16.")
    return token


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def list_loopback_names(host: str) -> list[str]:
    """List the names by which this machine's clients address the server; an IPv6 address stands in brackets."""
    return ["localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host]


def format_url(listening: socket.socket) -> str:
    """Format the URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def get_model_name(init_from: str) -> str:
    """Return the name of a model for clients: a hub id, or the name of the run or of the folder."""
    path = Path(init_from)
    if not path.is_dir():
        return init_from
    path = path.resolve()
    return path.parent.name if path.name == "hf" else path.name


def resolve_image_root(settings: ServeConfig) -> Path | None:
    """Return the folder of `serve.image_root`. UserError if it is no folder."""
    if settings.image_root is None:
        return None
    folder = Path(settings.image_root).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"serve.image_root={settings.image_root} is no folder.")
    return folder


def open_socket(host: str, port: int) -> socket.socket:
    """Open a listening socket. UserError if the port is in use or the address is not of this machine."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"serve.port={port} is in use on {host}. Choose another port, or end the server that has it."
            ) from None
        raise UserError(f"serve.host={host} serve.port={port}: {error.strerror or error}.") from None
