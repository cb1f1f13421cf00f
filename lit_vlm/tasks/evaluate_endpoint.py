"""Model of task=evaluate as an endpoint: a checkpoint that this process serves, or the endpoint at a URL."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2

from lit_vlm.config.evaluate_validation import is_url
from lit_vlm.config.schema import ModelConfig
from lit_vlm.config.task_settings import EndpointConfig, EvaluateConfig, JudgeConfig, ServeConfig
from lit_vlm.evaluation.endpoint import make_lmms_eval_variables, read_api_key
from lit_vlm.files import compute_weights_digest
from lit_vlm.serving.answer_log import ChatAnswerLog
from lit_vlm.serving.app import create_app
from lit_vlm.serving.recording_endpoint import LOOPBACK_HOSTS, AnswerRecorder, Upstream, run_in_thread, run_recorder
from lit_vlm.tasks.serve import get_model_name, make_service
from lit_vlm.tasks.terminal import say
from lit_vlm.types import UserError

CHECK_SECONDS = 30.0  # for the list of an endpoint's models


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """Model that is evaluated.

    Attributes:
        init_from: folder, hub id or URL.
        name: name for tables.
        digest: SHA-256 of its files, or of URL and name where only these are known. Answers of models with different digests
            are never mixed.
        upstream: its endpoint; None: this process serves it.
    """

    init_from: str
    name: str
    digest: str
    upstream: Upstream | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what evaluation.json says about the model."""
        served = None if self.upstream is None else self.upstream.base_url
        return {"init_from": self.init_from, "name": self.name, "digest": self.digest, "endpoint": served}


def find_model(init_from: str, settings: EvaluateConfig, device: str) -> EvaluatedModel:
    """Find the model, its name and its digest. No weights are loaded.

    Args:
        device: trainer.accelerator, which decides the precision of a served checkpoint.

    Raises:
        UserError: the endpoint cannot be reached or has several models.
    """
    if is_url(init_from):
        base_url = init_from.rstrip("/").removesuffix("/chat/completions")
        key = read_api_key(EndpointConfig(key_variable=settings.key_variable), "evaluate")
        upstream = Upstream(base_url, settings.model_name, key, settings.timeout_seconds)
        name = settings.model_name or find_served_name(upstream)
        digest = hashlib.sha256(f"{base_url} {name}".encode()).hexdigest()
        return EvaluatedModel(init_from, name, digest, replace(upstream, model=name))
    folder = Path(init_from)
    hasher = hashlib.sha256(device.encode())
    if folder.is_dir():
        hasher.update(compute_weights_digest(folder).encode())
        for path in sorted([*folder.glob("*.json"), *folder.glob("*.jinja")]):
            hasher.update(path.name.encode() + path.read_bytes())
    else:
        hasher.update(init_from.encode())
    return EvaluatedModel(init_from, get_model_name(init_from), hasher.hexdigest())


def find_served_name(upstream: Upstream) -> str:
    """Find the name of the only model of an endpoint.

    Raises:
        UserError: the endpoint cannot be reached, or has several models or none.
    """
    headers = {"Authorization": f"Bearer {upstream.api_key}"} if upstream.api_key else {}
    try:
        with httpx2.Client(timeout=CHECK_SECONDS, trust_env=not upstream.is_local) as client:
            response = client.get(f"{upstream.base_url}/models", headers=headers)
        rows = response.json()["data"] if response.status_code == 200 else None
    except httpx2.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"init_from={upstream.base_url}: cannot be reached: {reason}. Start the endpoint, or correct the URL; it ends in /v1."
        ) from None
    except (ValueError, KeyError, TypeError):
        rows = None
    if not isinstance(rows, list):
        raise UserError(
            f"init_from={upstream.base_url}: answered {response.status_code} to /models, and a list of models is needed. Correct"
            " the URL (it usually ends in /v1), set evaluate.key_variable if it needs a key, or evaluate.model_name."
        )
    names = [str(row.get("id")) for row in rows if isinstance(row, dict)]
    if len(names) != 1:
        raise UserError(
            f"init_from={upstream.base_url}: has {len(names)} models ({', '.join(names[:8])}). Name one: evaluate.model_name=..."
        )
    return names[0]


@contextmanager
def open_endpoint(
    model: EvaluatedModel, serve: ServeConfig, model_settings: ModelConfig, **options: Any
) -> Iterator[Upstream]:
    """Open the endpoint of a model for the duration of a block: the one at its URL, or its checkpoint served in this process.

    Args:
        options: accelerator, seed and max_image_pixels.
    """
    if model.upstream is not None:
        yield model.upstream
        return
    say(f"Loading {model.init_from}")
    service = make_service(model.init_from, serve, model_settings, None, **options)
    service.worker.start()
    try:
        with run_in_thread(create_app(service, LOOPBACK_HOSTS)) as url:
            yield Upstream(url, model=service.reader.model_name)
    finally:
        service.worker.stop()
        service.worker.join()


@dataclass(frozen=True, slots=True)
class EvaluationJudge:
    """Judge behind a recorder, which keeps its replies.

    Attributes:
        recorder: its replies and failures.
        base_url: address of the recorder.
    """

    settings: JudgeConfig
    recorder: AnswerRecorder
    base_url: str

    @property
    def name(self) -> str:
        """Model and address, for tables."""
        return f"{self.settings.model} at {self.settings.endpoint}"

    def make_variables(self, *, has_full_url: bool) -> dict[str, str]:
        """Make the environment variables by which the harness finds the judge."""
        return make_lmms_eval_variables(replace(self.settings, endpoint=self.base_url), None, has_full_url=has_full_url)


@contextmanager
def open_judge(settings: JudgeConfig, folder: Path) -> Iterator[EvaluationJudge | None]:
    """Put a recorder before the judge for the duration of a block; None if no judge is set.

    Args:
        folder: folder of its replies. Replies of different judges are in different files.
    """
    if settings.endpoint is None:
        yield None
        return
    base_url = settings.endpoint.rstrip("/")
    key = read_api_key(settings, "judge")
    digest = hashlib.sha256(f"{base_url} {settings.model}".encode()).hexdigest()
    upstream = Upstream(base_url, settings.model, key, settings.timeout_seconds)
    recorder = AnswerRecorder(ChatAnswerLog(folder / f"{digest[:16]}.jsonl"), upstream=upstream)
    with run_recorder(recorder) as url:
        yield EvaluationJudge(settings, recorder, url)
