"""CapFilt of BLIP (Li et al., arXiv 2201.12086, section 3.3): a captioner writes a synthetic text for each picture, and a filter
keeps those of the web texts and the synthetic texts that match their picture.

Nothing is deleted: the texts that stay are a new source that points at the pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from lit_vlm.curation.features import OnProgress, hash_content
from lit_vlm.curation.ledger import ModelLedger
from lit_vlm.curation.mixture import (
    CuratedMixture,
    CurationResult,
    Example,
    ExampleRecord,
    ResultTable,
    ScoreDistribution,
    choose_examples,
    iterate_batches,
    map_records,
    read_images,
)
from lit_vlm.curation.prune import load_picture
from lit_vlm.curation.text_hashes import normalise_text
from lit_vlm.curation.text_quality import is_hangul
from lit_vlm.data.generated import GeneratedTurns
from lit_vlm.model.image_text import SAMPLING, BlipCaptioner
from lit_vlm.types import Language, LazyImage, Message, Record, RecordError, Role, Sample, Source

CAPTIONS = "captions"  # name of the ledger
WEB, SYNTHETIC = "web", "synthetic"
_TITLES = {WEB: "web texts", SYNTHETIC: "synthetic texts"}


@dataclass(frozen=True, slots=True)
class PictureText:
    """Text about the picture of a record.

    Attributes:
        record: number of the record.
        origin: web: the record's own; synthetic: the captioner's.
        score: probability that it matches; None: it was not scored, because its picture cannot be read.
    """

    record: int
    origin: str
    text: str
    score: float | None = None


def read_web_texts(
    sources: Sequence[Source], kinds: Sequence[str], *, workers: int, on_progress: OnProgress | None = None
) -> tuple[list[str | None], dict[int, str]]:
    """Read the captions of records of some kinds with one picture and one answer; None for the others.

    Returns:
        The texts of all records, and the messages of those that cannot be read by number.
    """

    def read(record: Record) -> str | None:
        if not isinstance(record, Sample) or record.kind.value not in kinds or len(record.images) != 1:
            return None
        if sum(message.role is Role.assistant for message in record.messages) != 1:
            return None
        return normalise_text(record.messages[-1].text)

    return map_records(sources, read, workers=workers, on_progress=on_progress)


def caption_records(
    sources: Sequence[Source],
    places: Sequence[tuple[int, int]],
    captioner: BlipCaptioner,
    index_dir: Path,
    seed: int,
    *,
    batch_size: int,
    workers: int,
    on_progress: OnProgress | None = None,
) -> tuple[list[str | None], dict[int, str]]:
    """Write a caption for the picture of each record. Arguments and results as of `score_captions`.

    Args:
        seed: with the content of the picture it decides what is sampled, so an interrupted pass goes on with the same captions.
    """
    ledger, errors = ModelLedger(index_dir, CAPTIONS, captioner.digest), dict[int, str]()
    captions: list[str | None] = [None] * len(places)

    def look_up(number: int, images: tuple[LazyImage, ...] | str) -> tuple[int, str, Any]:
        try:
            if isinstance(images, str):
                return number, "", images
            image = images[0]
            key = xxhash.xxh3_128_hexdigest(hash_content(image) + f"{seed} {SAMPLING}".encode())
            return number, key, None if key in ledger else load_picture(image)
        except RecordError as error:
            return number, "", str(error)

    with ThreadPoolExecutor(workers) as pool:
        for numbers in iterate_batches(range(len(places)), batch_size):
            read = read_images(sources, [places[number] for number in numbers])
            found = list(pool.map(look_up, numbers, read))
            errors |= {number: image for number, _, image in found if isinstance(image, str)}
            missing = {key: image for number, key, image in found if image is not None and number not in errors}
            if missing:
                seeds = [int(key[:15], 16) for key in missing]
                ledger.add(dict(zip(missing, captioner.caption(list(missing.values()), seeds), strict=True)))
            for number, key, _ in found:
                captions[number] = None if number in errors else ledger[key]
            if on_progress:
                on_progress("pictures", numbers[-1] + 1, len(places))
    return captions, errors


def filter_texts(
    mixture: CuratedMixture,
    texts: Sequence[PictureText],
    *,
    min_score: float,
    num_shown: int,
    num_others: int,
) -> CurationResult:
    """Keep the texts that match their picture.

    Args:
        texts: of all records that were looked at, each with a score if its picture can be read.
        min_score: probability of a match from which a text stays.
        num_others: records that were not looked at.
    """
    texts = [one for one in texts if one.score is not None and not mixture.is_out[one.record]]
    languages = {one.record: find_language(one.text) for one in texts if one.origin == WEB}
    kept, out = list[PictureText](), list[PictureText]()
    for one in texts:
        is_kept = (one.score or 0.0) >= min_score and find_language(one.text) is languages.get(one.record)
        (kept if is_kept else out).append(one)
    lines = [
        mixture.describe(one.record) | {"text": one.origin, "score": round(one.score or 0.0, 4), "caption": one.text}
        for one in out
    ]
    notes = []
    if num_others:
        notes.append(
            f"Records of other kinds, or without one picture and one answer, which are not in the new source: {num_others:,}."
        )
    num_foreign = sum(find_language(one.text) is not languages.get(one.record) for one in texts)
    if num_foreign:
        notes.append(
            f"Synthetic texts in another language than the record's, which leave whatever their score: {num_foreign:,}."
        )
    return CurationResult(
        sorted(one.record for one in out if one.origin == WEB),
        lines,
        [("records that were looked at", len(languages)), ("texts in the new source", len(kept))],
        _show_texts(mixture, out, "left out", num_shown),
        _show_texts(mixture, kept, "stays", num_shown),
        notes=notes,
        tables=[make_text_table(texts, kept)],
        scores=[_make_distribution(texts, min_score)],
        generated=make_turns(mixture, kept),
    )


def find_language(text: str) -> Language:
    """Find the language of a caption: Korean if it has Hangul, else English."""
    return Language.ko if any(map(is_hangul, text)) else Language.en


def make_turns(mixture: CuratedMixture, kept: Sequence[PictureText]) -> dict[str, list[GeneratedTurns]]:
    """Make the turns of the new samples of each source: the record's own with the text that stays as its answer."""
    result: dict[str, list[GeneratedTurns]] = {source.name: [] for source in mixture.sources}
    for one in sorted(kept, key=lambda one: (one.record, one.origin != WEB)):
        source = mixture.sources[mixture.features.source_ids[one.record]]
        position = int(mixture.features.positions[one.record])
        record = source[position]
        assert isinstance(record, Sample)
        messages = (
            record.messages if one.origin == WEB else (*record.messages[:-1], _answer(record.messages[-1], one.text))
        )
        turns = GeneratedTurns(position, f"{record.id}-{one.origin}", record.kind, record.language, messages)
        result[source.name].append(turns)
    return result


def _answer(message: Message, text: str) -> Message:
    return replace(message, content=(text,))


def make_text_table(texts: Sequence[PictureText], kept: Sequence[PictureText]) -> ResultTable:
    """Make the table of web and synthetic texts."""
    rows = []
    for origin in (WEB, SYNTHETIC):
        total, stay = (sum(one.origin == origin for one in some) for some in (texts, kept))
        rows.append((_TITLES[origin], f"{total:,}", f"{stay:,}", f"{stay / max(total, 1):.1%}"))
    return ResultTable("Texts", ("kind", "texts", "kept", "share"), rows)


def _make_distribution(texts: Sequence[PictureText], min_score: float) -> ScoreDistribution:
    scores = {
        _TITLES[origin]: [one.score or 0.0 for one in texts if one.origin == origin] for origin in (WEB, SYNTHETIC)
    }
    return ScoreDistribution(
        "probability of a match (ITM)", {name: some for name, some in scores.items() if some}, min_score
    )


def _show_texts(mixture: CuratedMixture, texts: Sequence[PictureText], title: str, count: int) -> list[Example]:
    """Show some texts with their picture, as many of each origin."""
    examples = []
    for one in choose_examples(texts, [one.origin for one in texts], count):
        shown = mixture.show(title, one.record)
        record = ExampleRecord(shown.title, shown.origin, one.text, shown.images)
        examples.append(Example(f"{one.origin} text, score {one.score:.3f}", (record,)))
    return examples
