"""Validation of the settings of chat endpoints, and of the tasks judge and generate."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from lit_vlm.config.choices import GenerationKind, JudgeKind
from lit_vlm.config.schema import RunConfig
from lit_vlm.config.task_settings import EndpointConfig
from lit_vlm.redaction import is_secret_name

ENDPOINT_PATH = "/chat/completions"
_VARIABLE = re.compile("[A-Z_][A-Z0-9_]*")


def find_endpoint_errors(section: str, settings: EndpointConfig) -> Iterator[str]:
    """Yield an error message for each missing or unusable setting of an endpoint.

    Args:
        section: section of the settings, e.g. "judge".
    """
    if settings.endpoint is None:
        yield f"{section}.endpoint is not set: give the base address of a server, e.g. {section}.endpoint=http://127.0.0.1:8000/v1."
    else:
        yield from _find_address_errors(f"{section}.endpoint", settings.endpoint)
    if settings.model is None:
        yield f"{section}.model is not set: give the name that the endpoint lists under /models."
    if settings.key_variable is not None:
        yield from _find_variable_errors(f"{section}.key_variable", settings.key_variable)
    has_prices = [price is not None for price in (settings.price_input, settings.price_output)]
    if any(has_prices) and not all(has_prices):
        yield f"{section}.price_input, {section}.price_output: only one is set. Set both, in the same currency."
    if settings.max_cost is not None and not any(has_prices):
        yield f"{section}.max_cost: needs the prices of a million tokens; set {section}.price_input and {section}.price_output."
    for name, alternative in (("model", "model"), ("messages", "prompt"), ("stream", "")):
        if name in settings.extra:
            remedy = f"use {section}.{alternative}" if alternative else "streams are not read; leave it out"
            yield f"{section}.extra.{name}: is set by the program; {remedy}."


def _find_address_errors(key: str, address: str) -> Iterator[str]:
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host:
        yield f"{key}: expected an address like http://127.0.0.1:8000/v1, found {address}."
    elif parts.query or parts.fragment:
        yield f"{key}: must have no ? and no #, found {address}; give further fields with {key.partition('.')[0]}.extra."
    elif parts.path.rstrip("/").endswith(ENDPOINT_PATH):
        yield f"{key}: is the base address, without {ENDPOINT_PATH}: {address.rstrip('/').removesuffix(ENDPOINT_PATH)}"


def _find_variable_errors(key: str, name: str) -> Iterator[str]:
    """Find errors of a variable's name. The text is not repeated if it may be the key itself."""
    if not _VARIABLE.fullmatch(name):
        yield f"{key}: is the name of an environment variable in capitals, such as OPENAI_API_KEY, and not the key itself."
    elif not is_secret_name(name):
        yield (
            f"{key}={name}: the name does not mark its value as a secret, which would then appear in messages. Call the variable"
            f" {name}_API_KEY."
        )


def find_judge_errors(config: RunConfig) -> Iterator[str]:
    """Yield an error message for each missing or contradictory setting of task=judge."""
    judge = config.judge
    if judge.answers is None:
        yield "judge.answers is not set: name a .jsonl file of answers, or the folder of a run."
    yield from find_endpoint_errors("judge", judge)
    if judge.votes > 1 and judge.temperature == 0 and "temperature" not in judge.extra:
        yield f"judge.votes={judge.votes}: all votes would be equal, because judge.temperature is 0; set e.g. judge.temperature=0.7."
    if judge.against is not None and judge.kind is not JudgeKind.pairwise:
        yield f"judge.against: is read with judge.kind=pairwise only, and the kind is {judge.kind.value}."
    if judge.image_root is not None and not judge.images:
        yield "judge.image_root: is read with judge.images=true only."


def find_generate_errors(config: RunConfig) -> Iterator[str]:
    """Yield an error message for each missing or unusable setting of task=generate."""
    kinds = config.generate.kinds
    if not kinds:
        yield f"generate.kinds: is empty; name some of {', '.join(kind.value for kind in GenerationKind)}."
    if len(set(kinds)) != len(kinds):
        yield "generate.kinds: names a kind twice."
    for name, source in config.data.sources.items():
        if source.generated is not None:
            yield f"data.sources.{name}.generated: is read for training; task=generate writes such files from the records' own turns. Leave it out."
    yield from find_endpoint_errors("generate", config.generate)
