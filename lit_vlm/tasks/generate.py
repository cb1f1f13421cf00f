"""task=generate: a model at an OpenAI-compatible endpoint writes new turns for the records of a mixture. Read top to bottom."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lit_vlm.config import Run
from lit_vlm.config.choices import GenerationKind
from lit_vlm.config.schema import DataConfig
from lit_vlm.config.task_settings import GenerateConfig
from lit_vlm.curation.generation import ReplyError, ReplyStatus, make_messages
from lit_vlm.curation.generation_prompts import PROMPTS, choose_language, find_unsuitable, render_prompt
from lit_vlm.data.generated import GENERATED_SUFFIX, GeneratedTurns, write_generated
from lit_vlm.data.selection import RowsIdentity, identify_rows
from lit_vlm.data.sources import open_source
from lit_vlm.evaluation.endpoint import ChatEndpoint, EndpointRequest, compute_request_key, make_body, read_api_key
from lit_vlm.evaluation.judge_answers import encode_image
from lit_vlm.evaluation.reply_ledger import EndpointReply, ReplyLedger, TokenUsage, compute_cost, estimate_usage
from lit_vlm.fault_tolerance.run_lock import RunLock
from lit_vlm.files import atomic_write, write_json
from lit_vlm.formatting import format_count
from lit_vlm.redaction import redact, redact_text
from lit_vlm.reports.curation import CurationExample, ShownRecord, show_record
from lit_vlm.reports.generation import GenerationPage, write_generation_page
from lit_vlm.runs.run_folder import get_command_line
from lit_vlm.tasks.curate_results import require_same_request
from lit_vlm.tasks.judge import make_wait_reporter
from lit_vlm.tasks.terminal import console, say
from lit_vlm.types import Language, RecordError, Sample, Source, UserError

LEDGER_FILE, REJECTED_FILE, SUMMARY_FILE, PAGE_FILE = "requests.jsonl", "rejected.jsonl", "summary.json", "page.html"
SECTION, OUTPUT_KEY = "generate", "generate.output"
PROGRESS_SECONDS = 30.0
MAX_REASON_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class TextRequest:
    """Text that is asked for: the record, the kind and the language."""

    source_id: int
    position: int
    kind: GenerationKind
    language: Language
    sample: Sample


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of a request: the new turns, or the reason why there are none."""

    source_id: int
    position: int
    kind: GenerationKind
    status: ReplyStatus
    turns: GeneratedTurns | None = None
    reason: str = ""


@dataclass(slots=True)
class GenerationSession:
    """All outcomes, and the numbers of the requests."""

    outcomes: list[Outcome]
    models: Counter[str]
    usages: list[TokenUsage]
    num_sent: int = 0
    cost: float | None = None


def generate(run: Run) -> None:
    """Generate turns; write one file for each source, a list of rejected replies, a summary and a page.

    An interrupted run resumes from its replies.

    Raises:
        UserError: a source cannot be opened, the endpoint cannot be used, requests failed, or no reply was accepted.
    """
    config, settings = run.config, run.config.generate
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("task=generate is one process. Start it with python run.py, not with torchrun.")
    output = Path(settings.output) if settings.output else run.dir
    sources = open_sources(config.data, Path(config.data.index_dir or Path(config.run_dir) / "index"), config.seed)
    identities = [identify_rows(source) for source in sources]
    request = describe_request(settings, sources, identities)
    if settings.dry_run:
        show_estimate(sources, settings, ReplyLedger(output / LEDGER_FILE, OUTPUT_KEY))
        return
    key = read_api_key(settings, SECTION)
    with RunLock(output, f"Wait for it, or write elsewhere with {OUTPUT_KEY}=...") as run_lock:
        run_lock.acquire()
        kept = f"; the replies in {LEDGER_FILE} stay"
        require_same_request(output, request, overwrite=config.overwrite, what="request", setting=OUTPUT_KEY, kept=kept)
        write_json(output / SUMMARY_FILE, {"status": "running", "request": request}, indent=2)
        session = collect_outcomes(sources, settings, key, ReplyLedger(output / LEDGER_FILE, OUTPUT_KEY))
        write_results(output, sources, identities, session, settings, request)
    show_results(output, sources, session)
    require_results(output, session)


def open_sources(data: DataConfig, index_dir: Path, seed: int) -> list[Source]:
    """Open the sources of the mixture, as training reads them without a held-out share."""
    options: dict[str, Any] = {"max_image_pixels": data.max_image_pixels, "seed": seed, "cache": index_dir}
    return [open_source(name, source, **options) for name, source in data.sources.items()]


def describe_request(
    settings: GenerateConfig, sources: Sequence[Source], identities: Sequence[RowsIdentity]
) -> dict[str, Any]:
    """Describe what is asked for: all that changes the result, as JSON values without secrets."""
    names = ("model", "temperature", "max_new_tokens", "extra", "images", "limit")
    prompts = {
        f"{kind.value}_{language.value}": {"version": prompt.version, "sha256": prompt.sha256}
        for (kind, language), prompt in PROMPTS.items()
        if kind in settings.kinds
    }
    values = {
        "kinds": [kind.value for kind in settings.kinds],
        "language": settings.language.value,
        **{name: getattr(settings, name) for name in names},
        "prompts": prompts,
        "sources": {source.name: one.content for source, one in zip(sources, identities, strict=True)},
    }
    return json.loads(json.dumps(redact(values)))


def iterate_requests(
    sources: Sequence[Source], settings: GenerateConfig, outcomes: list[Outcome]
) -> Iterator[EndpointRequest]:
    """Iterate over the requests for all records; add an outcome for each record and kind that is not asked for."""
    for source_id, source in enumerate(sources):
        for position in range(min(len(source), settings.limit or len(source))):
            try:
                sample = source[position]
            except RecordError as error:
                outcomes += [
                    Outcome(source_id, position, kind, ReplyStatus.unsuitable, reason=str(error))
                    for kind in settings.kinds
                ]
                continue
            for kind in settings.kinds:
                request = _make_request(source_id, position, sample, kind, settings)
                if isinstance(request, EndpointRequest):
                    yield request
                else:
                    outcomes.append(Outcome(source_id, position, kind, ReplyStatus.unsuitable, reason=request))


def _make_request(
    source_id: int, position: int, sample: Any, kind: GenerationKind, settings: GenerateConfig
) -> EndpointRequest | str:
    """Make the request for one text; or return the reason why it cannot be asked for."""
    if not isinstance(sample, Sample):
        return "it is a preference pair"
    language = choose_language(sample, kind, settings.language)
    if reason := find_unsuitable(sample, kind, language, sends_images=settings.images):
        return reason
    content: Any = render_prompt(sample, kind, language)
    if settings.images or kind is GenerationKind.caption:
        try:
            urls = [encode_image(image) for image in sample.images]
        except RecordError as error:
            return str(error)
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content = [*parts, {"type": "text", "text": content}] if parts else content
    tag = TextRequest(source_id, position, kind, language, sample)
    return EndpointRequest([{"role": "user", "content": content}], tag=tag)


def collect_outcomes(
    sources: Sequence[Source], settings: GenerateConfig, key: str | None, ledger: ReplyLedger
) -> GenerationSession:
    """Collect the replies for all records, from the ledger, else from the endpoint; sorted by source, position and kind."""
    endpoint = ChatEndpoint(settings, SECTION, key, ledger, make_wait_reporter(SECTION))
    num_records = sum(min(len(source), settings.limit or len(source)) for source in sources)
    say(
        f"{format_count(num_records, 'record')}, {', '.join(kind.value for kind in settings.kinds)}, by {settings.model} at "
        f"{settings.endpoint}; {format_count(len(ledger), 'reply is', 'replies are')} there already"
    )
    session, last_report = GenerationSession([], Counter(), []), time.monotonic()
    for request, reply in endpoint.send_all(iterate_requests(sources, settings, session.outcomes)):
        session.outcomes.append(make_outcome(request.tag, reply))
        if isinstance(reply, EndpointReply):
            session.models[reply.model] += 1
            session.usages.append(reply.usage)
        if time.monotonic() - last_report > PROGRESS_SECONDS:
            last_report = time.monotonic()
            say(f"{len(session.outcomes):,} of {format_count(num_records * len(settings.kinds), 'text')}")
    order = {kind: place for place, kind in enumerate(settings.kinds)}
    session.outcomes.sort(key=lambda one: (one.source_id, one.position, order[one.kind]))
    session.num_sent = endpoint.num_sent
    session.cost = endpoint.budget.cost if settings.price_input is not None else None
    return session


def make_outcome(asked: TextRequest, reply: Any) -> Outcome:
    """Make the outcome of a reply, or of a failure."""
    place = (asked.source_id, asked.position, asked.kind)
    if not isinstance(reply, EndpointReply):
        return Outcome(*place, ReplyStatus.failed, reason=reply.reason)
    try:
        kind, messages = make_messages(reply, asked.sample, asked.kind, asked.language)
    except ReplyError as error:
        return Outcome(*place, error.status, reason=error.reason)
    record_id = f"{asked.sample.id}-{asked.kind.value}-{asked.language.value}"
    turns = GeneratedTurns(asked.position, record_id, kind, asked.language, messages)
    return Outcome(*place, ReplyStatus.accepted, turns)


def count_statuses(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """Count the statuses of each kind."""
    counts = Counter((one.kind, one.status) for one in outcomes)
    kinds = dict.fromkeys(one.kind for one in outcomes)
    return {kind.value: {status.value: counts[kind, status] for status in ReplyStatus} for kind in kinds}


def write_results(
    output: Path,
    sources: Sequence[Source],
    identities: Sequence[RowsIdentity],
    session: GenerationSession,
    settings: GenerateConfig,
    request: dict[str, Any],
) -> None:
    """Write the files of turns, the rejected replies, the page and, last, the summary."""
    origin = {"model": settings.model, "models": dict(session.models), "prompts": request["prompts"]}
    for source_id, (source, identity) in enumerate(zip(sources, identities, strict=True)):
        rows = [one.turns for one in session.outcomes if one.source_id == source_id and one.turns is not None]
        path = output / f"{source.name}{GENERATED_SUFFIX}"
        if rows:
            write_generated(path, source, identity, origin, rows, OUTPUT_KEY)
        else:
            path.unlink(missing_ok=True)
    with (
        atomic_write(output / REJECTED_FILE, "The list", OUTPUT_KEY) as draft,
        draft.open("w", encoding="utf-8") as stream,
    ):
        for one in session.outcomes:
            if one.turns is None:
                line = {"source": sources[one.source_id].name, "position": one.position, "kind": one.kind.value}
                line |= {"status": one.status.value, "reason": shorten_reason(one.reason)}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    counts = count_statuses(session.outcomes)
    write_generation_page(
        output / PAGE_FILE,
        GenerationPage(
            f"Generated by {settings.model}",
            counts,
            [
                (name, ", ".join(value) if isinstance(value, list) else str(value))
                for name, value in request.items()
                if name not in ("prompts", "sources") and value
            ],
            choose_examples(sources, session.outcomes, settings.num_shown, accepted=True),
            choose_examples(sources, session.outcomes, settings.num_shown, accepted=False),
            get_command_line(),
        ),
    )
    has_failed = any(one.status is ReplyStatus.failed for one in session.outcomes)
    summary = {
        "status": "incomplete" if has_failed else "finished",
        "request": request,
        "counts": counts,
        "models": dict(session.models),
        "requests": {"sent": session.num_sent, "used": len(session.usages)},
        "tokens": {
            "input": sum(usage.input_tokens for usage in session.usages),
            "output": sum(usage.output_tokens for usage in session.usages),
        },
        "cost": session.cost,
    }
    write_json(output / SUMMARY_FILE, summary, indent=2)


def shorten_reason(reason: str) -> str:
    """Shorten the reason of a rejected reply, without secrets."""
    text = redact_text(reason, "prompt")
    return text if len(text) <= MAX_REASON_CHARACTERS else f"{text[:MAX_REASON_CHARACTERS]}..."


def choose_examples(
    sources: Sequence[Source], outcomes: Sequence[Outcome], count: int, *, accepted: bool
) -> list[CurationExample]:
    """Choose examples for the page, as many of each kind and status: the record beside its new turns or the reason."""
    groups: dict[tuple[GenerationKind, ReplyStatus], list[Outcome]] = {}
    for one in outcomes:
        if (one.turns is not None) is accepted:
            groups.setdefault((one.kind, one.status), []).append(one)
    share = -(-count // max(len(groups), 1))
    chosen = [one for group in groups.values() for one in group[:share]][:count]
    return [_show_outcome(sources[one.source_id], one) for one in chosen]


def _show_outcome(source: Source, outcome: Outcome) -> CurationExample:
    """Show the record of an outcome beside its new turns, or the reason why there are none."""
    try:
        record = source[outcome.position]
        assert isinstance(record, Sample)
        text = "\n".join(f"{message.role}: {message.text}" for message in record.messages)
        shown = show_record("record", record.origin, text, record.images)
    except (RecordError, AssertionError) as error:
        shown = ShownRecord("record", f"{source.name}[{outcome.position}]", str(error))
    if outcome.turns is not None:
        lines = "\n".join(f"{message.role}: {message.text}" for message in outcome.turns.messages)
        new = ShownRecord("new turns", outcome.turns.language.value, lines)
    else:
        new = ShownRecord(outcome.status.value, "", shorten_reason(outcome.reason))
    return CurationExample(f"{outcome.kind.value}: {outcome.status.value}", (shown, new))


def show_estimate(sources: Sequence[Source], settings: GenerateConfig, ledger: ReplyLedger) -> None:
    """Show the requests that a run would send, with their estimated tokens and highest cost. Nothing is sent or written."""
    outcomes: list[Outcome] = []
    num_texts, to_send = 0, dict[str, TokenUsage]()
    for request in iterate_requests(sources, settings, outcomes):
        num_texts += 1
        key = compute_request_key(make_body(request, settings), request.number)
        if ledger.get(key) is None:
            to_send[key] = estimate_usage(request.messages, settings.max_new_tokens)
    inputs = sum(usage.input_tokens for usage in to_send.values())
    outputs = sum(usage.output_tokens for usage in to_send.values())
    cost = compute_cost(TokenUsage(inputs, outputs, True), settings)
    table = Table(title="generate.dry_run: nothing is sent", title_justify="left", show_header=False)
    for name, text in (
        ("texts to ask for", f"{num_texts:,}"),
        ("not suitable", f"{len(outcomes):,}"),
        ("requests to send", f"{len(to_send):,}"),
        ("input tokens, estimated", f"~{inputs:,}"),
        ("output tokens, at most", f"{outputs:,}"),
        (
            "cost, at most",
            "unknown: set generate.price_input and generate.price_output" if cost is None else f"~{cost:,.4g}",
        ),
    ):
        table.add_row(name, text)
    console.print(table)


def show_results(output: Path, sources: Sequence[Source], session: GenerationSession) -> None:
    """Show a table of the statuses, and the settings that train on the new turns."""
    counts = count_statuses(session.outcomes)
    shown = [status.value for status in ReplyStatus if any(row[status.value] for row in counts.values())]
    table = Table(title="generated texts", title_justify="left")
    for heading in ("kind", *shown):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for kind, row in counts.items():
        table.add_row(kind, *(f"{row[status]:,}" for status in shown))
    console.print(table)
    tokens = (sum(getattr(usage, name) for usage in session.usages) for name in ("input_tokens", "output_tokens"))
    say(
        f"{format_count(session.num_sent, 'request')} sent; {next(tokens):,} input and {next(tokens):,} output tokens"
        f"{'' if session.cost is None else f'; cost {session.cost:.4g}'}"
    )
    say(f"{output / PAGE_FILE}   {output / REJECTED_FILE}   {output / SUMMARY_FILE}")
    names = [source.name for source in sources if (output / f"{source.name}{GENERATED_SUFFIX}").is_file()]
    if names:
        overrides = (f"data.sources.{name}.generated={output / name}{GENERATED_SUFFIX}" for name in names)
        say(f"Train on the new turns with: {' '.join(overrides)}")


def require_results(output: Path, session: GenerationSession) -> None:
    """Raise UserError if requests failed, or if no reply was accepted."""
    statuses = Counter(one.status for one in session.outcomes)
    if failed := statuses[ReplyStatus.failed]:
        raise UserError(
            f"{format_count(failed, 'request')} failed, see {output / REJECTED_FILE}. The same command asks only for these again."
        )
    if not statuses[ReplyStatus.accepted]:
        found = (
            ", ".join(f"{count:,} {status.value}" for status, count in statuses.most_common()) or "there are no records"
        )
        raise UserError(f"{output}: no text was accepted: {found}. See {REJECTED_FILE} there for the reasons.")
