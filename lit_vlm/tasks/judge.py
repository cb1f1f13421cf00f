"""task=judge: a model at an OpenAI-compatible endpoint judges a file of answers. Read top to bottom."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lit_vlm.config import Run
from lit_vlm.config.choices import JudgeKind
from lit_vlm.config.task_settings import JudgeConfig
from lit_vlm.evaluation.endpoint import ChatEndpoint, compute_request_key, make_body, read_api_key
from lit_vlm.evaluation.judge import (
    Judgement,
    Vote,
    VoteKey,
    VoteStatus,
    combine_votes,
    iterate_requests,
    parse_vote,
    summarize_judgements,
)
from lit_vlm.evaluation.judge_answers import SAMPLES_FILE, AnswerRow, read_answers
from lit_vlm.evaluation.judge_prompts import JudgePrompt, load_prompts
from lit_vlm.evaluation.reply_ledger import EndpointReply, ReplyLedger, TokenUsage, compute_cost, estimate_usage
from lit_vlm.fault_tolerance.run_lock import RunLock
from lit_vlm.files import atomic_write, handle_write_errors, read_json, write_json
from lit_vlm.formatting import format_count, format_percent
from lit_vlm.redaction import redact, redact_text
from lit_vlm.tasks.terminal import console, say
from lit_vlm.types import Language, UserError

LEDGER_FILE, JUDGED_FILE, SUMMARY_FILE = "requests.jsonl", "judged.jsonl", "summary.json"
SECTION, OUTPUT_KEY = "judge", "judge.output"
PROGRESS_SECONDS = 30.0
ALL = "all"


def judge_answers(run: Run) -> None:
    """Judge a file of answers; write `judged.jsonl` and `summary.json`. An interrupted run resumes from its replies.

    Raises:
        UserError: rows cannot be judged, the endpoint cannot be used, the budget is used up, requests failed, or no answer
            got a score.
    """
    settings = run.config.judge
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("task=judge is one process. Start it with python run.py, not with torchrun.")
    assert settings.answers is not None
    path = Path(settings.answers)
    rows = read_answers(path, settings, run.config.data.max_image_pixels)
    prompts = load_prompts(settings.kind, Path(settings.prompt) if settings.prompt else None)
    folder = Path(settings.output) if settings.output else choose_output(path, settings.kind)
    used = {language: prompts[language] for language in sorted({row.language for row in rows})}
    identity = make_identity(settings, used)
    if settings.dry_run:
        require_same_judge(folder, identity, run.config.overwrite)
        show_estimate(rows, prompts, settings, ReplyLedger(folder / LEDGER_FILE, OUTPUT_KEY))
        return
    key = read_api_key(settings, SECTION)
    with RunLock(folder, f"Wait for it, or write elsewhere with {OUTPUT_KEY}=...") as run_lock:
        run_lock.acquire()
        require_same_judge(folder, identity, run.config.overwrite)
        summary = {"status": "running", "judge": identity}
        save_summary(folder, summary)
        ledger = ReplyLedger(folder / LEDGER_FILE, OUTPUT_KEY)
        session = collect_votes(rows, prompts, settings, key, ledger)
        judgements = [combine_votes(settings.kind, votes) for votes in session.votes]
        summary |= summarize(rows, judgements, session, settings.kind)
        summary["answers"] = describe_answers(path, len(rows))
        write_judged(folder / JUDGED_FILE, rows, judgements, session.votes)
        save_summary(folder, summary)
    show_results(summary, settings.kind, folder)
    require_results(session, judgements, folder)


def choose_output(path: Path, kind: JudgeKind) -> Path:
    """Choose the folder of the results: beside the file of answers, or inside the run folder."""
    file = path / SAMPLES_FILE if path.is_dir() else path
    return file.parent / f"{file.stem}_judged" / kind.value


def make_identity(settings: JudgeConfig, prompts: dict[Language, JudgePrompt]) -> dict[str, Any]:
    """Make the description of the judge, with all that changes its replies, as JSON values."""
    names = ("model", "votes", "temperature", "max_new_tokens", "extra", "images")
    return {
        "kind": settings.kind.value,
        **{name: getattr(settings, name) for name in names},
        **({"swap": settings.swap} if settings.kind is JudgeKind.pairwise else {}),
        "prompts": {
            language.value: {"name": one.name, "version": one.version, "sha256": one.sha256}
            for language, one in prompts.items()
        },
    }


def require_same_judge(folder: Path, identity: dict[str, Any], overwrite: bool) -> None:
    """Raise UserError if the folder has results of another judge and they are not to be replaced."""
    path = folder / SUMMARY_FILE
    remedy = f"Remove it, or write elsewhere with {OUTPUT_KEY}=..."
    known = (read_json(path, remedy) or {}).get("judge")
    if known is None or overwrite:
        return
    current = json.loads(json.dumps(redact(identity)))
    different = [name for name in sorted({*known, *current}) if known.get(name) != current.get(name)]
    if different == ["prompts"]:  # a file with more rows may have one more language
        pairs = [
            (known["prompts"][name], prompt) for name, prompt in current["prompts"].items() if name in known["prompts"]
        ]
        different = different if any(old != new for old, new in pairs) else []
    if different:
        raise UserError(
            f"{path} is of another judge: it differs in {', '.join(different)}. Write elsewhere with {OUTPUT_KEY}=..., or replace the "
            "results with overwrite=true; the replies in requests.jsonl stay."
        )


@dataclass(slots=True)
class JudgeSession:
    """Votes on all answers, and the numbers of their requests.

    Attributes:
        votes: of each answer.
        models: number of replies by the name of the model that the endpoint reported.
        usages: tokens of the replies that these votes used.
    """

    votes: list[dict[VoteKey, Vote]]
    models: Counter[str]
    usages: list[TokenUsage]
    num_sent: int = 0
    num_retried: int = 0
    cost: float | None = None


def collect_votes(
    rows: list[AnswerRow],
    prompts: dict[Language, JudgePrompt],
    settings: JudgeConfig,
    key: str | None,
    ledger: ReplyLedger,
) -> JudgeSession:
    """Collect the votes on all answers: from the ledger, else from the endpoint."""
    num_known = len(ledger)
    endpoint = ChatEndpoint(settings, SECTION, key, ledger, make_wait_reporter(SECTION))
    session = JudgeSession([{} for _ in rows], Counter(), [])
    total = len(rows) * settings.votes * (2 if settings.kind is JudgeKind.pairwise and settings.swap else 1)
    say(
        f"{format_count(len(rows), 'answer')}, {format_count(total, 'vote')} of {settings.model} at {settings.endpoint}; "
        f"{format_count(num_known, 'reply is', 'replies are')} there already"
    )
    started = last_report = time.monotonic()
    for count, (request, reply) in enumerate(endpoint.send_all(iterate_requests(rows, prompts, settings)), 1):
        place: VoteKey = request.tag
        session.votes[place.row][place] = parse_vote(reply, settings.kind, place.is_swapped)
        if isinstance(reply, EndpointReply):
            session.models[reply.model] += 1
            session.usages.append(reply.usage)
        if time.monotonic() - last_report > PROGRESS_SECONDS:
            last_report = time.monotonic()
            minutes = (last_report - started) / count * (total - count) / 60
            say(f"{count:,} of {format_count(total, 'vote')}; {format_count(round(minutes), 'minute')} left")
    session.num_sent, session.num_retried = endpoint.num_sent, endpoint.num_retried
    session.cost = endpoint.budget.cost if settings.price_input is not None else None
    return session


def make_wait_reporter(section: str) -> Callable[[str, float], None]:
    """Make a function that prints why requests wait, at most once in `PROGRESS_SECONDS`."""
    last = -PROGRESS_SECONDS

    def report(reason: str, seconds: float) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            say(f"{section}.endpoint: {reason}; tries again in {seconds:.0f} s")

    return report


def summarize(
    rows: list[AnswerRow], judgements: list[Judgement], session: JudgeSession, kind: JudgeKind
) -> dict[str, Any]:
    """Summarise all judgements, by group and together, with the numbers of votes, requests, tokens and cost."""
    groups: dict[str, list[Judgement]] = defaultdict(list)
    for row, judgement in zip(rows, judgements, strict=True):
        groups[row.group].append(judgement)
    votes = Counter(vote.status.value for answer in session.votes for vote in answer.values())
    failed = votes[VoteStatus.failed.value]
    return {
        "status": "incomplete" if failed else "finished",
        ALL: summarize_judgements(kind, judgements),
        "groups": {name: summarize_judgements(kind, group) for name, group in sorted(groups.items())},
        "votes": {status.value: votes[status.value] for status in VoteStatus if status is not VoteStatus.undecided},
        "models": dict(session.models),
        "requests": {"sent": session.num_sent, "retried": session.num_retried},
        "tokens": {
            "input": sum(usage.input_tokens for usage in session.usages),
            "output": sum(usage.output_tokens for usage in session.usages),
            "replies_with_estimated_tokens": sum(usage.is_estimated for usage in session.usages),
        },
        "cost": session.cost,
    }


def describe_answers(path: Path, num_rows: int) -> dict[str, Any]:
    """Describe the file of answers: name, SHA-256 and number of rows that were judged."""
    file = path / SAMPLES_FILE if path.is_dir() else path
    return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "rows": num_rows}


def save_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write `summary.json`."""
    with handle_write_errors(folder, "The results", OUTPUT_KEY):
        write_json(folder / SUMMARY_FILE, summary, indent=2)


def write_judged(
    path: Path, rows: list[AnswerRow], judgements: list[Judgement], votes: list[dict[VoteKey, Vote]]
) -> None:
    """Write one line for each answer: its texts, its judgement and all votes."""
    lines = [
        {
            "id": row.id,
            "origin": row.origin,
            "group": row.group,
            "language": row.language.value,
            **{name: redact_text(text, "prompt") for name, text in row.material.items()},
            **{name: value for name, value in asdict(judgement).items() if value is not None},
            "votes": [
                {"is_swapped": key.is_swapped, "number": key.number, **asdict(answer_votes[key])}
                for key in sorted(answer_votes, key=lambda key: (key.is_swapped, key.number))
            ],
        }
        for row, judgement, answer_votes in zip(rows, judgements, votes, strict=True)
    ]
    with (
        atomic_write(path, "The results", OUTPUT_KEY) as draft,
        draft.open("w", encoding="utf-8", errors="replace") as stream,
    ):
        stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def show_estimate(
    rows: list[AnswerRow], prompts: dict[Language, JudgePrompt], settings: JudgeConfig, ledger: ReplyLedger
) -> None:
    """Show the requests that a run would send, with their estimated tokens and highest cost. Nothing is sent or written."""
    num_votes, to_send = 0, dict[str, TokenUsage]()
    for request in iterate_requests(rows, prompts, settings):
        num_votes += 1
        key = compute_request_key(make_body(request, settings), request.number)
        if ledger.get(key) is None:
            to_send[key] = estimate_usage(request.messages, settings.max_new_tokens)
    usages = to_send.values()
    usage = TokenUsage(sum(one.input_tokens for one in usages), sum(one.output_tokens for one in usages), True)
    cost = compute_cost(usage, settings)
    table = Table(title="judge.dry_run: nothing is sent", title_justify="left", show_header=False)
    for name, text in (
        ("answers", f"{len(rows):,}"),
        ("votes", f"{num_votes:,}"),
        ("requests to send", f"{len(to_send):,}"),
        ("input tokens, estimated", f"~{usage.input_tokens:,}"),
        ("output tokens, at most", f"{usage.output_tokens:,}"),
        ("cost, at most", "unknown: set judge.price_input and judge.price_output" if cost is None else f"~{cost:,.4g}"),
        *(
            (f"prompt, {language.value}", format_prompt_name(prompts[language]))
            for language in sorted({row.language for row in rows})
        ),
    ):
        table.add_row(name, text)
    console.print(table)


def format_prompt_name(prompt: JudgePrompt) -> str:
    """Format name, version and the start of the SHA-256 of a prompt."""
    return f"{prompt.name} {prompt.version}, sha256 {prompt.sha256[:12]}"


def show_results(summary: dict[str, Any], kind: JudgeKind, folder: Path) -> None:
    """Show a table of the groups, and the counts of requests, tokens and cost."""
    table = Table(title=f"{kind.value} by {summary['judge']['model']}", title_justify="left")
    names = ["judged", "refused", "cut", "unreadable", "undecided", "failed"]
    pair_names = ["other", "relative", "win/tie/loss", "orders agree"] if kind is JudgeKind.pairwise else []
    for heading in ("group", "mean", "± s.e.", *pair_names, *names):
        table.add_column(heading, justify="left" if heading == "group" else "right")
    groups = summary["groups"] if len(summary["groups"]) > 1 else {}
    for name, row in (*groups.items(), (ALL, summary[ALL])):
        cells = [_format_score(row["mean"]), _format_score(row["standard_error"])]
        if pair_names:
            cells += [_format_score(row["other_mean"]), _format_score(row["relative_score"], 1)]
            cells += [f"{row['wins']}/{row['ties']}/{row['losses']}", format_percent(row["order_agreement"]) or "-"]
        table.add_row(name, *cells, *(f"{row[status]:,}" for status in names))
    console.print(table)
    tokens, cost = summary["tokens"], summary["cost"]
    say(
        f"{format_count(summary['requests']['sent'], 'request')} sent, {summary['requests']['retried']:,} of them again; {tokens['input']:,} "
        f"input and {tokens['output']:,} output tokens{'' if cost is None else f'; cost {cost:.4g}'}"
    )
    if summary[ALL][VoteStatus.cut.value]:
        say("Replies were cut before their verdict: raise judge.max_new_tokens.")
    say(f"{folder / JUDGED_FILE}   {folder / SUMMARY_FILE}")


def _format_score(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def require_results(session: JudgeSession, judgements: list[Judgement], folder: Path) -> None:
    """Raise UserError if requests failed, or if no answer got a score."""
    failed = [vote.text for votes in session.votes for vote in votes.values() if vote.status is VoteStatus.failed]
    if failed:
        reasons = "; ".join(f"{count:,} x {reason}" for reason, count in Counter(failed).most_common(3))
        raise UserError(
            f"{format_count(len(failed), 'request')} failed after all retries ({reasons}). The means leave their answers out. The same "
            "command asks for them again."
        )
    if all(judgement.status is not VoteStatus.judged for judgement in judgements):
        raise UserError(
            f"Not one answer got a score; the table says why, and {folder / JUDGED_FILE} has every reply. Choose another judge, or "
            "raise judge.max_new_tokens."
        )
