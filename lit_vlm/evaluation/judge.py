"""A model as judge of answers: the requests, the reading of its replies, and the results with all counts.

A reply without a readable verdict is counted and left out of the mean; it is never a score of 0.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lit_vlm.config.choices import JudgeKind
from lit_vlm.config.task_settings import JudgeConfig
from lit_vlm.evaluation.endpoint import EndpointRequest, RequestFailure
from lit_vlm.evaluation.judge_answers import AnswerRow, encode_image
from lit_vlm.evaluation.judge_prompts import JudgePrompt
from lit_vlm.evaluation.reply_ledger import EndpointReply
from lit_vlm.types import Language

MAX_SCORE = 10.0


class VoteStatus(StrEnum):
    """Status of a vote, and of an answer with all its votes."""

    judged = "judged"
    refused = "refused"  # the judge declines
    cut = "cut"  # judge.max_new_tokens ended the reply before a verdict
    unreadable = "unreadable"  # no verdict in the asked form
    undecided = "undecided"  # as many votes for correct as for incorrect
    failed = "failed"  # no reply, after all retries


@dataclass(frozen=True, slots=True)
class VoteKey:
    """Place of a vote: the answer, its position in the prompt, and the number of the vote."""

    row: int
    is_swapped: bool
    number: int


@dataclass(frozen=True, slots=True)
class Vote:
    """A vote of the judge.

    Attributes:
        scores: of the answer, 0 to 10 (correctness: 0 or 1); of both answers for pairwise, the judged one first. None
            unless the status is judged.
        text: the reply, or the reason of a failure.
    """

    status: VoteStatus
    scores: tuple[float, ...] | None
    text: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """Judgement of one answer, from all its votes.

    Attributes:
        score: 0 to 10 (correctness: 0 or 1); None unless the status is judged.
        other_score: of the other answer.
        preference: 1 if the answer is better in each order, -1 if it is worse in each, else 0.
        is_consistent: both orders prefer the same answer, or neither; None with one order.
    """

    status: VoteStatus
    score: float | None = None
    other_score: float | None = None
    preference: int | None = None
    is_consistent: bool | None = None


def iterate_requests(
    rows: Sequence[AnswerRow], prompts: Mapping[Language, JudgePrompt], settings: JudgeConfig
) -> Iterator[EndpointRequest]:
    """Iterate over the requests for all answers: `votes` of each, twice as many if a pair is shown in both orders."""
    orders = (False, True) if settings.kind is JudgeKind.pairwise and settings.swap else (False,)
    for index, row in enumerate(rows):
        urls = [encode_image(image) for image in row.images]
        for is_swapped in orders:
            material = select_material(row.material, settings.kind, is_swapped)
            content: Any = prompts[row.language].render(material)
            if urls:
                images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
                content = [*images, {"type": "text", "text": content}]
            for number in range(settings.votes):
                yield EndpointRequest(
                    [{"role": "user", "content": content}], number, VoteKey(index, is_swapped, number)
                )


def select_material(material: Mapping[str, str], kind: JudgeKind, is_swapped: bool) -> dict[str, str]:
    """Select the texts that a kind of judgement shows. A pair is judged without the reference."""
    hidden = ("reference", "rubric") if kind is JudgeKind.pairwise else ("other",)
    shown = {name: text for name, text in material.items() if name not in hidden}
    if is_swapped:
        shown["answer"], shown["other"] = shown["other"], shown["answer"]
    return shown


# ---- replies

_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_MARKDOWN = re.compile(r"[*`]|(?<!\w)_+|_+(?!\w)")
_NUMBER = r"(?P<value>-?\d+(?:\.\d+)?)(?![\d.,]*\d)(?:\s*/\s*(?P<maximum>\d+)(?!\d))?"
_RANGE = r"(?:\s*\([^()\n]{0,20}\))?"
_SCORE = re.compile(rf"(?:점수|score){_RANGE}\s*[:：]\s*{_NUMBER}", re.IGNORECASE)
_PAIR_SCORE = re.compile(rf"(?:점수|score)\s*(?P<position>[12]){_RANGE}\s*[:：]\s*{_NUMBER}", re.IGNORECASE)
_BARE_SCORE = re.compile(rf"\s*{_NUMBER}\s*점?\s*\.?\s*")
_VERDICT = re.compile(r"(?:판정|verdict)\s*[:：]\s*(?P<verdict>맞음|틀림|incorrect|correct)", re.IGNORECASE)
_VERDICTS = {"맞음": 1.0, "correct": 1.0, "틀림": 0.0, "incorrect": 0.0}
_REFUSAL = re.compile(
    r"\s*(?:I'?m sorry|I am sorry|Sorry|I (?:can(?:no|')?t|am unable|won't)|죄송|미안|(?:도와|평가해|채점해)\s?드릴 수 없)",
    re.IGNORECASE,
)


def parse_vote(reply: EndpointReply | RequestFailure, kind: JudgeKind, is_swapped: bool) -> Vote:
    """Parse a reply. The last verdict in it counts; thoughts in `<think>` do not."""
    if isinstance(reply, RequestFailure):
        return Vote(VoteStatus.failed, None, reply.reason)
    text = _MARKDOWN.sub("", remove_thoughts(reply.text))
    scores = None if reply.is_refused else _PARSERS[kind](text)
    if scores is not None:
        return Vote(VoteStatus.judged, scores[::-1] if is_swapped else scores, reply.text)
    is_refusal = is_refusal_reply(reply)
    if not is_refusal and reply.finish_reason == "length":
        return Vote(VoteStatus.cut, None, reply.text)
    return Vote(VoteStatus.refused if is_refusal else VoteStatus.unreadable, None, reply.text)


def remove_thoughts(text: str) -> str:
    """Remove the thoughts in `<think>`, also unfinished ones."""
    return _THOUGHTS.sub("", text)


def is_refusal_reply(reply: EndpointReply) -> bool:
    """Return True if the endpoint marked a reply as a refusal, or it begins like one."""
    text = _MARKDOWN.sub("", remove_thoughts(reply.text)).replace("’", "'")
    return reply.is_refused or _REFUSAL.match(text) is not None


def _parse_score(text: str) -> tuple[float, ...] | None:
    matches = list(_SCORE.finditer(text))
    match = matches[-1] if matches else _BARE_SCORE.fullmatch(text)
    score = _read_score(match)
    return None if score is None else (score,)


def _parse_pair(text: str) -> tuple[float, ...] | None:
    last = {match["position"]: _read_score(match) for match in _PAIR_SCORE.finditer(text)}
    first, second = last.get("1"), last.get("2")
    return None if first is None or second is None else (first, second)


def _parse_verdict(text: str) -> tuple[float, ...] | None:
    verdicts = [match["verdict"].lower() for match in _VERDICT.finditer(text)]
    return (_VERDICTS[verdicts[-1]],) if verdicts else None


def _read_score(match: re.Match[str] | None) -> float | None:
    """Read a score from 0 to 10; None for any other number, and for one of another maximum ("3/5")."""
    if match is None or match["maximum"] not in (None, "10"):
        return None
    score = float(match["value"])
    return score if 0 <= score <= MAX_SCORE else None


_PARSERS = {
    JudgeKind.rating: _parse_score,
    JudgeKind.correctness: _parse_verdict,
    JudgeKind.pairwise: _parse_pair,
}


# ---- results


def combine_votes(kind: JudgeKind, votes: Mapping[VoteKey, Vote]) -> Judgement:
    """Combine the votes on one answer: the median of the scores, the majority of the verdicts.

    Votes that give no score are left out. An answer with a failed vote is failed, because the next start asks for it
    again. An answer has its most frequent other status if an order has no score.
    """
    statuses = Counter(vote.status for vote in votes.values())
    if statuses[VoteStatus.failed]:
        return Judgement(VoteStatus.failed)
    by_order: dict[bool, list[tuple[float, ...]]] = {key.is_swapped: [] for key in votes}
    for key, vote in votes.items():
        if vote.scores is not None:
            by_order[key.is_swapped].append(vote.scores)
    if not all(by_order.values()):
        del statuses[VoteStatus.judged]
        return Judgement(statuses.most_common(1)[0][0])
    medians = [tuple(map(statistics.median, zip(*scores, strict=True))) for scores in by_order.values()]
    if kind is JudgeKind.correctness and medians[0][0] == 0.5:
        return Judgement(VoteStatus.undecided)
    score = statistics.fmean(median[0] for median in medians)
    if kind is not JudgeKind.pairwise:
        return Judgement(VoteStatus.judged, score)
    signs = [(median[0] > median[1]) - (median[0] < median[1]) for median in medians]
    return Judgement(
        VoteStatus.judged,
        score,
        statistics.fmean(median[1] for median in medians),
        signs[0] if len(set(signs)) == 1 else 0,
        len(set(signs)) == 1 if len(signs) == 2 else None,
    )


def summarize_judgements(kind: JudgeKind, judgements: Iterable[Judgement]) -> dict[str, Any]:
    """Summarise the judgements of a group: counts by status, and means over the judged answers.

    The relative score is 100 x sum of the scores / sum of the other scores, as of LLaVA-Bench.
    """
    listed = list(judgements)
    judged = [one for one in listed if one.status is VoteStatus.judged]
    scores = [one.score for one in judged if one.score is not None]
    counts = Counter(one.status.value for one in listed)
    summary: dict[str, Any] = {"answers": len(listed), **{status.value: counts[status.value] for status in VoteStatus}}
    summary["mean"] = statistics.fmean(scores) if scores else None
    summary["standard_error"] = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
    if kind is not JudgeKind.pairwise:
        return summary
    others = [one.other_score for one in judged if one.other_score is not None]
    agreements = [one.is_consistent for one in judged if one.is_consistent is not None]
    summary |= {
        "other_mean": statistics.fmean(others) if others else None,
        "relative_score": 100 * sum(scores) / sum(others) if sum(others) else None,
        "wins": sum(one.preference == 1 for one in judged),
        "ties": sum(one.preference == 0 for one in judged),
        "losses": sum(one.preference == -1 for one in judged),
        "order_agreement": statistics.fmean(agreements) if agreements else None,
    }
    return summary
