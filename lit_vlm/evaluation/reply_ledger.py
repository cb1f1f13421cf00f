"""Replies of a chat endpoint on disk, and the budget of the requests that got them."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_vlm.config.task_settings import EndpointConfig
from lit_vlm.files import append_line, handle_write_errors, read_json_lines
from lit_vlm.types import UserError

MILLION = 1e6
# Assumptions of the estimate before a run; the summary of a run has the tokens that the endpoint reported.
CHARACTERS_PER_TOKEN = 4  # of a text without Hangul and Chinese characters
TOKENS_PER_MESSAGE = 4  # role and separators
TOKENS_PER_IMAGE = 1000
_WIDE_CHARACTER = re.compile("[\u1100-\u11ff\u3040-\u30ff\u3130-\u318f\u3400-\u9fff\uac00-\ud7a3]")


class BudgetError(UserError):
    """Error for a request that the budget does not cover."""


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens of some requests.

    Attributes:
        is_estimated: the endpoint did not report them.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    is_estimated: bool = False


@dataclass(frozen=True, slots=True)
class EndpointReply:
    """Reply to one request.

    Attributes:
        text: the answer; "" if the model wrote none.
        is_refused: the endpoint marked the reply as a refusal, or its content filter withheld it.
        finish_reason: reason for the end of the answer, e.g. "stop" or "length".
        model: name of the model that the endpoint reported.
    """

    text: str
    is_refused: bool
    finish_reason: str
    model: str
    usage: TokenUsage


class ReplyLedger:
    """Append-only JSONL file of replies, by the SHA-256 of the request. A line that a killed process cut off is skipped.

    Several threads may call `add` at once.

    Args:
        path: file of the ledger. It need not exist.
        setting: setting that names its folder, for error messages.
    """

    def __init__(self, path: Path, setting: str) -> None:
        self.path, self.setting = path, setting
        self._replies: dict[str, EndpointReply] = {}
        for row in read_json_lines(path):
            reply = _parse_reply(row)
            if reply is not None:
                self._replies[row["key"]] = reply

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> EndpointReply | None:
        """Return the reply to a request; None if there is none."""
        return self._replies.get(key)

    def add(self, key: str, reply: EndpointReply) -> None:
        """Append a reply. It is on the disk when this returns."""
        line = json.dumps({"key": key, **asdict(reply)}, ensure_ascii=False).encode("utf-8", "replace")
        with handle_write_errors(self.path.parent, "The replies", self.setting):
            append_line(self.path, line)
        self._replies[key] = reply

    def list_usages(self) -> list[TokenUsage]:
        """List the tokens of all replies."""
        return [reply.usage for reply in self._replies.values()]


def _parse_reply(row: dict[str, Any]) -> EndpointReply | None:
    """Parse a line of the ledger; None if it is not one."""
    try:
        usage = TokenUsage(**row["usage"])
        fields = {name: row[name] for name in ("text", "is_refused", "finish_reason", "model")}
        is_valid = isinstance(row["key"], str) and isinstance(row["text"], str)
        return EndpointReply(**fields, usage=usage) if is_valid else None
    except (KeyError, TypeError):
        return None


class Budget:
    """Budget of requests and of cost. Requests in flight reserve their highest possible cost.

    Args:
        settings: limits and prices.
        spent: tokens of earlier replies, which count too.
        section: section of the settings, for error messages.

    Attributes:
        num_requests: requests so far, failed ones and earlier ones included.
        cost: cost so far, in the unit of the prices.
    """

    def __init__(self, settings: EndpointConfig, spent: Iterable[TokenUsage], section: str) -> None:
        self.settings, self.section = settings, section
        earlier = list(spent)
        self.num_requests = len(earlier)
        self.cost = sum(compute_cost(usage, settings) or 0.0 for usage in earlier)
        self._reserved: list[float] = []
        self._changed = threading.Condition()

    def reserve(self, estimate: TokenUsage) -> float:
        """Reserve a request before it is sent; wait while requests in flight may leave enough. Returns its highest cost.

        Raises:
            BudgetError: the budget does not cover it.
        """
        cost = compute_cost(estimate, self.settings) or 0.0
        maximum, max_cost = self.settings.max_requests, self.settings.max_cost
        with self._changed:
            if maximum is not None and self.num_requests >= maximum:
                raise BudgetError(
                    f"{self.section}.max_requests={maximum} is reached. All replies so far are kept. A higher value continues."
                )
            while max_cost is not None and self.cost + sum(self._reserved) + cost > max_cost:
                if not self._reserved:
                    raise BudgetError(
                        f"{self.section}.max_cost={max_cost:g} does not cover the next request: {self.cost:.4g} is spent, and it may "
                        f"cost {cost:.2g}. All replies so far are kept. A higher value continues."
                    )
                self._changed.wait()
            self.num_requests += 1
            self._reserved.append(cost)
        return cost

    def settle(self, reserved: float, usage: TokenUsage | None) -> None:
        """Replace a reservation by the cost of the reply; None: there was no reply, and it is taken to cost nothing."""
        with self._changed:
            self._reserved.remove(reserved)
            self.cost += (compute_cost(usage, self.settings) or 0.0) if usage else 0.0
            self._changed.notify_all()


def compute_cost(usage: TokenUsage, settings: EndpointConfig) -> float | None:
    """Compute the cost of tokens in the unit of the prices; None without prices."""
    if settings.price_input is None or settings.price_output is None:
        return None
    return (usage.input_tokens * settings.price_input + usage.output_tokens * settings.price_output) / MILLION


def estimate_usage(messages: Iterable[dict[str, Any]], max_new_tokens: int) -> TokenUsage:
    """Estimate the tokens of a request whose answer is as long as it may be."""
    count = 0
    for message in messages:
        parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
        count += TOKENS_PER_MESSAGE
        count += sum(estimate_tokens(part["text"]) if "text" in part else TOKENS_PER_IMAGE for part in parts)
    return TokenUsage(count, max_new_tokens, is_estimated=True)


def estimate_tokens(text: str) -> int:
    """Estimate the tokens of a text: one for each Hangul syllable or Chinese character, and for four other characters."""
    num_wide = len(_WIDE_CHARACTER.findall(text))
    return num_wide + math.ceil((len(text) - num_wide) / CHARACTERS_PER_TOKEN)
