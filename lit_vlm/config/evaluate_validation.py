"""Validation of task=evaluate, and the name of its folder."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from lit_vlm.config.choices import Task
from lit_vlm.config.endpoint_validation import find_endpoint_errors
from lit_vlm.config.schema import RunConfig
from lit_vlm.evaluation.benchmarks import BENCHMARKS, JudgeUse, list_harness_tasks
from lit_vlm.types import find_nearest, format_suggestion

_UNSAFE = re.compile(r"[^\w.+-]+")


def find_evaluate_errors(config: RunConfig) -> Iterator[str]:
    """Yield an error message for each missing or unusable setting of task=evaluate."""
    settings = config.evaluate
    if config.init_from is None:
        yield "init_from is not set: task=evaluate scores a finished model, init_from=runs/<name>/hf, a hub id or an endpoint's URL."
    elif is_url(config.init_from) and (error := _find_url_error(config.init_from)):
        yield error
    if config.init_from is not None and not is_url(config.init_from):
        for name in ("model_name", "key_variable"):
            if getattr(settings, name) is not None:
                yield f"evaluate.{name}: is read with an endpoint only, and init_from={config.init_from} is none. Leave it out."
    if not config.benchmarks:
        yield f"benchmarks is not set: name some of {', '.join(BENCHMARKS)}, or tasks of lmms-eval: benchmarks=[k_dtcbench]."
    for name, count in Counter(config.benchmarks).items():
        if count > 1:
            yield f"benchmarks: {name} is named {count} times."
        if name not in BENCHMARKS and name not in list_harness_tasks():
            nearest = find_nearest(name, BENCHMARKS) or find_nearest(name, list_harness_tasks())
            yield (
                f"benchmarks: there is no {name}; there are {', '.join(BENCHMARKS)}, and the tasks of"
                f" lmms-eval.{format_suggestion(nearest)}"
            )
    judged = [name for name in config.benchmarks if name in BENCHMARKS and BENCHMARKS[name].judge is JudgeUse.needed]
    if judged and config.judge.endpoint is None:
        yield f"benchmarks: {', '.join(judged)}: scored by a judge. Set judge.endpoint=http://... and judge.model=..., or leave it out."
    elif config.judge.endpoint is not None:
        yield from find_endpoint_errors("judge", config.judge)
    if config.evaluate.num_concurrent > config.serve.max_waiting:
        yield (
            f"evaluate.num_concurrent={settings.num_concurrent}: more requests than serve.max_waiting={config.serve.max_waiting}"
            " accepts. Lower the first, or raise the second."
        )


def find_training_benchmark_errors(config: RunConfig) -> Iterator[str]:
    """Yield an error message for each benchmark that a stage cannot be scored on while it trains."""
    names = config.benchmarks
    compares = config.task is Task.preflight and config.evaluate.files is not None  # the data, with these benchmarks
    if names and config.evaluate.every_steps is None and not compares:
        yield (
            f"benchmarks: is read with task=evaluate, or with evaluate.every_steps=<steps> while a stage trains, and task is"
            f" {config.task.value}. Write one of them, or leave benchmarks out."
        )
        return
    for name, count in Counter(names).items():
        if count > 1:
            yield f"benchmarks: {name} is named {count} times."
        if name not in BENCHMARKS:
            nearest = format_suggestion(find_nearest(name, BENCHMARKS))
            yield f"benchmarks: while a stage trains, there is no {name}; there are {', '.join(BENCHMARKS)}.{nearest}"
        elif config.evaluate.every_steps is not None and BENCHMARKS[name].judge is JudgeUse.needed:
            yield f"benchmarks: {name} is scored by a judge, which no stage asks while it trains. Score it with task=evaluate."


def is_url(init_from: str) -> bool:
    """Return True if a name is the URL of an endpoint."""
    return "://" in init_from


def _find_url_error(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        is_usable = False
    if not is_usable or parts.username or parts.password or parts.query:
        return (
            f"init_from={url}: is no URL of an endpoint. Give http://host:port/v1 without name, password and query; a key comes from"
            " the environment variable that evaluate.key_variable names."
        )
    return None


def get_evaluation_name(config: RunConfig) -> str:
    """Return the folder of an evaluation below run_dir: `evaluate/tiny/2_sft` for runs/tiny/2_sft/hf.

    For a model elsewhere it is the last part of its path with a digest of the whole.
    """
    if config.run_name:
        return config.run_name
    init_from = config.init_from or "none"
    if is_url(init_from):
        name = _UNSAFE.sub("-", init_from.partition("://")[2].strip("/"))
        return f"evaluate/{name}" + (
            f"-{_UNSAFE.sub('-', config.evaluate.model_name)}" if config.evaluate.model_name else ""
        )
    folder = Path(init_from).expanduser()
    if not folder.is_absolute() and not folder.is_dir():  # a hub id: paths of this machine are absolute by now
        return f"evaluate/{_UNSAFE.sub('-', init_from).strip('-.') or 'model'}"
    folder = folder.resolve()
    folder = folder.parent if folder.name == "hf" else folder
    root = Path(config.run_dir).resolve()
    if folder.is_relative_to(root) and folder != root:
        return f"evaluate/{folder.relative_to(root).as_posix()}"
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    return f"evaluate/{_UNSAFE.sub('-', folder.name) or 'model'}-{digest}"
